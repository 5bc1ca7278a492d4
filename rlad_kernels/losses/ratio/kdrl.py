"""KDRL: a policy gradient and a reverse KL to a teacher at once, joint or in the reward (arXiv 2506.02208)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_choice, check_numbers
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.groups import correct_tokens, wrong_groups
from rlad_kernels.losses.ratio.kl import KL_ESTIMATORS, check_estimator
from rlad_kernels.losses.ratio.sampled import ClippedLoss, teacher_gap

FORMS = ("joint", "in-reward")
TAUGHT = {"all": (), "wrong": ("correct",), "wrong-groups": ("correct", "group_ids")}


@dataclass(frozen=True, kw_only=True)
class KDRL(ClippedLoss):
    """KDRL: −rÂ + β·k(s − t), r = exp(s − o), k an estimator of KL(π‖π_T) (arXiv 2506.02208).

    k2 has the reverse KL's expected gradient while the tokens are the current policy's own: after more inner steps it is not
    importance-corrected. k3 has the forward KL's. k1 raises: backpropagating s − t, as one trainer's joint loss appears to do,
    leaves no trace of the teacher in the gradient.

    Args:
        kd_coef: β; :func:`annealed_coef` gives the paper's schedule. Published: 2e-3 constant, 5e-3 → 1e-3 annealed; 0.2 on logic
            puzzles (arXiv 2609.04108).
        form: ``joint`` as above; ``in-reward``: −r(Â + β·sg[t − s]).
        kd_estimator: k2, k3, k3+, k3++, k4 or k5, for ``joint``.
        teach: ``all``; ``wrong``: the teacher's term only in responses that are not ``correct``; ``wrong-groups``: only where no
            response of the group is.
        clip, dual_clip, reference, rollout: as of :class:`GRPO`; the paper shows no clip.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.
        teacher_logp: the teacher's log-probs t of the same tokens; a non-finite value teaches nothing there and counts in
            ``invalid_teacher``.
        correct: bools or 0/1, ``(B,)`` or the log-probs' shape; needed unless ``teach="all"``. A sequence without a kept
            token does not count.
        group_ids: ints, ``(B,)`` or the log-probs' shape, in any order; needed for ``wrong-groups``.

    Metrics: those of :class:`GRPO`, kl_teacher (mean of s − t, taught or not) and invalid_teacher.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> old, zero = logp.detach(), torch.zeros(2)
        >>> rk.losses.KDRL(kd_coef=1.0)(logp, old_logp=old, advantages=zero, teacher_logp=zero).loss
        tensor(1.2500, grad_fn=<SumBackward0>)
    """

    clip: tuple[float, float] | None = None
    kd_coef: float = 2e-3
    form: str = "joint"
    kd_estimator: str = "k2"
    teach: str = "all"

    needs = ("old_logp", "advantages", "teacher_logp")
    takes = (*ClippedLoss.takes, "correct", "group_ids")

    def check(self) -> None:
        super().check()
        check_numbers(self.name, kd_coef=self.kd_coef)
        check_choice(self.name, "form", self.form, FORMS)
        check_choice(self.name, "teach", self.teach, TAUGHT)
        check_estimator(self.name, "kd_estimator", self.kd_estimator, self.kd_coef)

    def needed(self) -> tuple[str, ...]:
        return (*super().needed(), *TAUGHT[self.teach])

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        rest = {k: x for k, x in super().prepare(batch, tensors).items() if k not in ("correct", "group_ids")}
        if self.teach == "all":
            return rest
        right = correct_tokens(batch, tensors["correct"])
        return {**rest, "taught": ~right if self.teach == "wrong" else wrong_groups(right, tensors["group_ids"])}

    def tokens(
        self,
        scores: TokenScores,
        *,
        old_logp: Tensor,
        advantages: Tensor,
        teacher_logp: Tensor,
        taught: Tensor | None = None,
        **shared: Any,
    ) -> tuple[Tensor, Metrics]:
        logp = scores.logp
        gap, found = teacher_gap(logp, teacher_logp)
        use = (logp.detach() - teacher_logp).isfinite()
        use = use if taught is None else use & taught
        if self.form == "in-reward":
            advantages = advantages + self.kd_coef * torch.where(use, gap, 0)
        loss, metrics = self.surrogate(logp, old_logp, advantages, **shared)
        if self.form == "joint":
            x = torch.where(use, logp - torch.where(use, teacher_logp, 0), 0)  # every estimator is 0 at 0
            loss = loss + self.kd_coef * KL_ESTIMATORS[self.kd_estimator](x)
        return loss, {**metrics, **found}


def annealed_coef(step: int, *, start: float = 5e-3, decrement: float = 5e-5, floor: float = 1e-3) -> float:
    """KDRL's coefficient at a training step: max(start − decrement·step, floor).

    Example:
        >>> import rlad_kernels as rk
        >>> rk.losses.KDRL(kd_coef=rk.losses.annealed_coef(200)).kd_coef
        0.001
    """
    return max(start - decrement * step, floor)


_PAPER = "arXiv 2506.02208"
add_method(
    "kdrl",
    "ratio",
    KDRL(),
    formula="−rÂ + β·½(s − t)², β = 2e-3",
    paper=_PAPER,
    confidence="B",
    note=(
        "k2's gradient is the reverse KL's only on the policy's own samples: it is not importance-corrected over "
        "several updates. Backpropagating s − t itself (k1) would lose the teacher."
    ),
    published=(
        "Secondary sources: the mean over all tokens of the group, no clip shown, no KL to a reference; k2 added to the loss, β = "
        "2e-3, or 5e-3 to 1e-3 in steps of 5e-5 (annealed_coef). The same here."
    ),
)
add_method(
    "kdrl_in_reward",
    "ratio",
    KDRL(form="in-reward"),
    formula="−r(Â + β·sg[t − s]), β = 2e-3",
    paper=_PAPER,
    confidence="B",
    published=(
        "Secondary sources: the mean over all tokens of the group, no clip shown, no KL to a reference; t − s detached into Â; a β "
        "of its own was not seen (2e-3 here)."
    ),
)
add_method(
    "kdrl_wrong",
    "ratio",
    KDRL(teach="wrong"),
    formula="kdrl, the KL only in wrong responses",
    paper=_PAPER,
    confidence="B",
    published=(
        "Secondary sources: the mean over all tokens of the group, no clip shown, no KL to a reference; response-level masking, "
        "the KL on incorrect responses; β as kdrl's."
    ),
)
add_method(
    "kdrl_wrong_groups",
    "ratio",
    KDRL(teach="wrong-groups"),
    formula="kdrl, the KL only in groups that are all wrong",
    paper=_PAPER,
    confidence="B",
    published=(
        "Secondary sources: the mean over all tokens of the group, no clip shown, no KL to a reference; group-level masking, the "
        "KL where the whole group is wrong; β as kdrl's."
    ),
)
