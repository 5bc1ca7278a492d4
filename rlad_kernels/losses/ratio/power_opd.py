"""PowerOPD: on-policy distillation with a difference of powers for the log-ratio, which is bounded (arXiv 2606.17199)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_range
from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import ClippedLoss


@dataclass(frozen=True, kw_only=True)
class PowerOPD(ClippedLoss):
    """PowerOPD: −r·A, r = exp(s − o), A = π_T^α − π_old^α of the sampled token (arXiv 2606.17199).

    A is within ±1 and has the sign of t − o; A/α goes to t − o, OPD's, as α → 0. The larger α, the more it is of likely tokens.

    Args:
        alpha: α, positive.
        clip, dual_clip, reference, rollout: as of :class:`GRPO`; by default no clip.

    Tensors of a call:
        logp, old_logp, ref_logp, rollout_logp: as of :class:`GRPO`.
        teacher_logp: the teacher's log-probs t of the same tokens; a non-finite value has A = 0 and counts in
            ``invalid_teacher``.

    Metrics: those of :class:`GRPO`, kl_teacher (mean of s − t) and invalid_teacher.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> old, teacher = torch.tensor([0.25, 0.25]).log(), torch.tensor([0.81, 1e-16]).log()
        >>> rk.losses.PowerOPD(alpha=0.5)(old, old_logp=old, teacher_logp=teacher).token_loss
        tensor([-0.4000,  0.5000])
    """

    clip: tuple[float, float] | None = None
    alpha: float = 0.1

    needs = ("old_logp", "teacher_logp")

    def check(self) -> None:
        super().check()
        check_range(self.name, "alpha", self.alpha, 0, math.inf, "()")

    def tokens(self, scores: TokenScores, *, old_logp: Tensor, teacher_logp: Tensor, **shared: Any) -> tuple[Tensor, Metrics]:
        gap, larger = teacher_logp - old_logp, torch.maximum(teacher_logp, old_logp)
        advantages = gap.sign() * (self.alpha * larger).exp() * -torch.expm1(-self.alpha * gap.abs())  # of near powers as well
        invalid = ~(teacher_logp.isfinite() & advantages.isfinite())
        return self.taught(scores.logp, old_logp, teacher_logp, torch.where(invalid, 0, advantages), invalid, **shared)


add_method(
    "power_opd",
    "ratio",
    PowerOPD(),
    formula="−r·A, A = π_T^α − π_old^α, α = .1",
    paper="arXiv 2606.17199",
    confidence="A",
    published=(
        "The official code's sampled_power_diff: α = 0.1 by default, token-mean of a micro-batch, no clip. There π_old is the "
        "detached current policy. The abstract wants a larger α. The paper itself was read in its abstract."
    ),
    note="A is of the order of α for α → 0: OPD's size is A/α.",
)
