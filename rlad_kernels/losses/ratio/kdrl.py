"""KDRL: a policy gradient and a reverse KL to a teacher at once, joint or in the reward (arXiv 2506.02208)."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers, needs
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.groups import correct_tokens, wrong_groups
from rlad_kernels.losses.ratio.sampled import ClippedOptions, accumulated, clipped_loss, on_sampled, teacher_gap
from rlad_kernels.losses.ratio.surrogate import KL_ESTIMATORS, check_kl, ratio_loss_tokens

FORMS = ("joint", "in-reward")
TAUGHT = ("all", "wrong", "wrong-groups")


@on_sampled("kdrl")
def kdrl_tokens(
    logp: Tensor, *, old_logp: Tensor, advantages: Tensor, teacher_logp: Tensor, taught: Tensor | None = None,
    kd_coef: float = 2e-3, form: str = "joint", kd_estimator: str = "k2", clip_low: float = 1.0, clip_high: float = math.inf,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped surrogate + kd_coef·KL where ``taught`` is not 0, and its metrics; all tensors ``(N,)``."""
    gap, found = teacher_gap(logp, teacher_logp)
    use = (logp.detach() - teacher_logp).isfinite()
    use = use if taught is None else use & (taught != 0)
    if form == "in-reward":
        advantages = advantages + kd_coef * torch.where(use, gap, 0)
    clip = {"clip_low": clip_low, "clip_high": clip_high}
    loss, metrics = ratio_loss_tokens(logp, old_logp=old_logp, advantages=advantages, **clip, **options)
    if form == "joint":
        x = torch.where(use, logp - torch.where(use, teacher_logp, 0), 0)  # every estimator is 0 at 0
        loss = loss + kd_coef * KL_ESTIMATORS[kd_estimator](x)
    return loss, {**metrics, **found}


def kdrl_loss(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, *, kd_coef: float = 2e-3,
    form: str = "joint", kd_estimator: str = "k2", teach: str = "all", correct: Tensor | None = None,
    group_ids: Tensor | None = None, **options: Unpack[ClippedOptions],
) -> LossOutput:  # fmt: skip
    """KDRL: −rÂ + β·k(s − t), r = exp(s − o), k an estimator of KL(π‖π_T) (arXiv 2506.02208).

    k2 has the reverse KL's expected gradient while the tokens are the current policy's own: after more inner steps it is not
    importance-corrected. k3 has the forward KL's. k1 raises: backpropagating s − t, as one trainer's joint loss appears to do,
    leaves no trace of the teacher in the gradient.

    Args:
        logp, old_logp, advantages, mask: as in :func:`grpo_loss`.
        teacher_logp: the teacher's log-probs t of the same tokens; a non-finite value teaches nothing there and counts in
            ``invalid_teacher``.
        kd_coef: β; :func:`annealed_coef` gives the paper's schedule. Published: 2e-3 constant, 5e-3 → 1e-3 annealed; 0.2 on logic
            puzzles (arXiv 2609.04108).
        form: ``joint`` as above; ``in-reward``: −r(Â + β·sg[t − s]).
        kd_estimator: k2, k3, k3+, k3++, k4 or k5, for ``joint``.
        teach: ``all``; ``wrong``: the teacher's term only in responses that are not ``correct``; ``wrong-groups``: only where no
            response of the group is.
        correct: bools or 0/1, ``(B,)`` or the log-probs' shape; needed unless ``teach="all"``. A sequence without a kept
            token does not count.
        group_ids: ints, ``(B,)`` or the log-probs' shape, in any order; needed for ``wrong-groups``.
        options: those of :func:`grpo_loss`; the paper shows no clip, and ``clip`` is None, no clip, unless given.

    Returns:
        LossOutput. Metrics: those of :func:`grpo_loss`, kl_teacher (mean of s − t, taught or not) and invalid_teacher.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "kdrl_loss"
    needs(name, old_logp=old_logp, teacher_logp=teacher_logp, advantages=advantages)
    if form not in FORMS:
        raise ValueError(f"{name}: form must be one of {FORMS}, got {form!r}")
    check_numbers(name, kd_coef=kd_coef)
    check_kl(name, "kd_estimator", kd_estimator, kd_coef)
    tensors: dict[str, Tensor | None] = {"old_logp": old_logp, "teacher_logp": teacher_logp, "advantages": advantages}
    tensors["taught"] = taught_tokens(name, logp, mask, teach, correct, group_ids)
    words = {"kd_coef": kd_coef, "form": form, "kd_estimator": kd_estimator}
    options.setdefault("clip", None)
    return clipped_loss(name, kdrl_tokens, logp, tensors, mask, words, **options)


def taught_tokens(
    name: str, logp: Tensor, mask: Tensor | None, teach: str, correct: Tensor | None, group_ids: Tensor | None
) -> Tensor | None:
    """Where the teacher's term counts, bool in ``logp``'s shape; None is everywhere."""
    if teach not in TAUGHT:
        raise ValueError(f"{name}: teach must be one of {TAUGHT}, got {teach!r}")
    if teach == "all":
        return None
    right = correct_tokens(name, correct, accumulated(name, logp).detach(), mask)
    return ~right if teach == "wrong" else wrong_groups(name, right, group_ids)


def annealed_coef(step: int, *, start: float = 5e-3, decrement: float = 5e-5, floor: float = 1e-3) -> float:
    """KDRL's coefficient at a training step: max(start − decrement·step, floor)."""
    return max(start - decrement * step, floor)


_NEEDS, _PAPER = ("old_logp", "teacher_logp", "advantages"), "arXiv 2506.02208"
add_method(
    "kdrl", "ratio", kdrl_loss, formula="−rÂ + β·½(s − t)², β = 2e-3", needs=_NEEDS, paper=_PAPER, confidence="B", products=3,
    note=(
        "k2's gradient is the reverse KL's only on the policy's own samples: it is not importance-corrected over "
        "several updates. Backpropagating s − t itself (k1) would lose the teacher."
    ),
)  # fmt: skip
add_method(
    "kdrl_in_reward", "ratio", kdrl_loss, formula="−r(Â + β·sg[t − s]), β = 2e-3", needs=_NEEDS, paper=_PAPER, confidence="B",
    products=3, options={"form": "in-reward"},
)  # fmt: skip
add_method(
    "kdrl_wrong", "ratio", kdrl_loss, formula="kdrl, the KL only in wrong responses", needs=(*_NEEDS, "correct"), paper=_PAPER,
    confidence="B", products=3, options={"teach": "wrong"},
)  # fmt: skip
add_method(
    "kdrl_wrong_groups", "ratio", kdrl_loss, formula="kdrl, the KL only in groups that are all wrong",
    needs=(*_NEEDS, "correct", "group_ids"), paper=_PAPER, confidence="B", products=3, options={"teach": "wrong-groups"},
)  # fmt: skip
