"""MOPD: REINFORCE towards the domain's teacher, weighed by the masked ratio to the sampling engine (MiMo-V2-Flash)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from rlad_kernels.core.check import check_numbers
from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.rollout import ICEPOP, Rollout
from rlad_kernels.losses.ratio.sampled import SampledLoss, reinforced, teacher_gap

CURRENT = replace(ICEPOP, policy="current")


@dataclass(frozen=True, kw_only=True)
class MOPD(SampledLoss):
    """MOPD: −w·A·s, w = sg[π/μ]·1[ε_lo ≤ π/μ ≤ ε_hi], A = sg[t − s] + α·Â (MiMo-V2-Flash report).

    The value is no objective, only its gradient is meant: d/ds = −w·A, exactly 0 outside the bounds.

    Args:
        advantage_coef: α.
        rollout: form and bounds of w, of the policy ``current``; the bounds of the report are not known to us, these are
            IcePop's .5 and 5.
        reference: as of :class:`GRPO`.

    Tensors of a call:
        logp, ref_logp: as of :class:`GRPO`.
        rollout_logp: log-probs μ of the engine that sampled, same shape.
        teacher_logp: log-probs t of the teacher of the token's domain (``rk.supports.combine_teachers``); a non-finite value
            gives t − s the value 0 and counts in ``invalid_teacher``.
        advantages: Â of an outcome reward.

    Metrics: rollout_weight_mean, rollout_clip_frac, kl_teacher (mean of s − t), invalid_teacher, kl_ref.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.full((1, 2), -1.0, requires_grad=True)
        >>> mu, teacher = torch.tensor([[-1.0, -9.0]]), torch.zeros(1, 2)
        >>> rk.losses.MOPD()(logp, rollout_logp=mu, teacher_logp=teacher).loss.backward()
        >>> logp.grad
        tensor([[-0.5000,  0.0000]])
    """

    reduction: str = "seq-mean-token-mean"
    rollout: Rollout | None = field(default_factory=lambda: CURRENT)
    advantage_coef: float = 1.0

    needs = ("rollout_logp", "teacher_logp")
    takes = ("advantages", "ref_logp")

    def check(self) -> None:
        super().check()
        check_numbers(self.name, advantage_coef=self.advantage_coef)
        if self.rollout is None or self.rollout.policy != "current":
            raise ValueError(f"{self.name}: rollout.policy must be 'current', this loss has no old policy; got {self.rollout!r}")

    def tokens(
        self,
        scores: TokenScores,
        *,
        rollout_logp: Tensor,
        teacher_logp: Tensor,
        advantages: Tensor | None = None,
        ref_logp: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        logp = scores.logp
        gap, metrics = teacher_gap(logp, teacher_logp)
        total = gap if advantages is None else gap + self.advantage_coef * advantages
        total, found = self.weighed(total, logp, logp, rollout_logp)
        return self.reference.add(reinforced(logp, total), {**metrics, **found}, logp, ref_logp)


add_method(
    "mopd",
    "ratio",
    MOPD(),
    formula="−w·sg[t − s]·s, w = sg[π/μ]·1[ε_lo ≤ π/μ ≤ ε_hi]",
    paper="MiMo-V2-Flash",
    confidence="B",
    published=(
        "1/length over each sequence's tokens, then the expectation over sequences; w and A detached, w of π_θ over μ; the bounds "
        "and the outcome reward's α were not seen (0.5, 5 and 1 here)."
    ),
)
