"""MOPD: REINFORCE towards the domain's teacher, weighed by the masked ratio to the sampling engine (MiMo-V2-Flash)."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from rlad_kernels.core.check import check_numbers, needs
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.rollout import ICEPOP, Rollout, check_rollout, weigh
from rlad_kernels.losses.ratio.sampled import TokenOptions, on_sampled, reinforced, sampled_loss, teacher_gap
from rlad_kernels.losses.ratio.surrogate import add_kl

MOPD = ICEPOP._replace(policy="current")


@on_sampled("mopd")
def mopd_tokens(
    logp: Tensor, *, rollout_logp: Tensor, teacher_logp: Tensor, advantages: Tensor | None = None, advantage_coef: float = 1.0,
    ref_logp: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3", **rollout: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """−sg[w·A]·s per token, A = t − s + α·Â, and its metrics; all tensors ``(N,)``."""
    gap, metrics = teacher_gap(logp, teacher_logp)
    total = gap if advantages is None else gap + advantage_coef * advantages
    rollout = {**{f"rollout_{k}": v for k, v in MOPD._asdict().items()}, **rollout}
    total, found = weigh(logp, logp, total, rollout_logp=rollout_logp, **rollout)
    return add_kl(reinforced(logp, total), {**metrics, **found}, logp, ref_logp, kl_coef, kl_estimator)


def mopd_loss(
    logp: Tensor, rollout_logp: Tensor, teacher_logp: Tensor, mask: Tensor | None = None, *, advantages: Tensor | None = None,
    advantage_coef: float = 1.0, rollout: Rollout = MOPD, **options: Unpack[TokenOptions],
) -> LossOutput:  # fmt: skip
    """MOPD: −w·A·s, w = sg[π/μ]·1[ε_lo ≤ π/μ ≤ ε_hi], A = sg[t − s] + α·Â (MiMo-V2-Flash report).

    The value is no objective, only its gradient is meant: d/ds = −w·A, exactly 0 outside the bounds.

    Args:
        logp, mask: as in :func:`grpo_loss`.
        rollout_logp: log-probs μ of the engine that sampled, same shape.
        teacher_logp: log-probs t of the teacher of the token's domain (:func:`combine_teachers`); a non-finite value gives t − s
            the value 0 and counts in ``invalid_teacher``.
        advantages, advantage_coef: Â of an outcome reward and α.
        rollout: form and bounds of w; the bounds of the report are not known to us, these are IcePop's .5 and 5.
        options: ref_logp, kl_coef, kl_estimator, reduction, seq_ids and denominator of :func:`grpo_loss`; ``reduction`` is
            ``seq-mean-token-mean`` unless given.

    Returns:
        LossOutput. Metrics: rollout_weight_mean, rollout_clip_frac, kl_teacher (mean of s − t), invalid_teacher, kl_ref.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "mopd_loss"
    needs(name, rollout_logp=rollout_logp, teacher_logp=teacher_logp)
    check_numbers(name, advantage_coef=advantage_coef)
    check_rollout(name, rollout, rollout_logp)
    if rollout.policy != "current":
        raise ValueError(f"{name}: rollout.policy must be 'current', this loss has no old policy; got {rollout.policy!r}")
    options.setdefault("reduction", "seq-mean-token-mean")
    tensors = {"teacher_logp": teacher_logp, "advantages": advantages}
    coef = {"advantage_coef": advantage_coef}
    return sampled_loss(name, mopd_tokens, logp, tensors, mask, coef, rollout_logp=rollout_logp, rollout=rollout, **options)


add_method(
    "mopd", "ratio", mopd_loss, formula="−w·sg[t − s]·s, w = sg[π/μ]·1[ε_lo ≤ π/μ ≤ ε_hi]", needs=("rollout_logp", "teacher_logp"),
    paper="MiMo-V2-Flash", confidence="B", products=3,
)  # fmt: skip
