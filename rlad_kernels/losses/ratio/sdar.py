"""SDAR: GRPO plus a gated pull towards the teacher where it likes the sampled token better (ZJU-REAL/SDAR, ms-swift's port)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers
from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import ClippedLoss, teacher_gap


@dataclass(frozen=True, kw_only=True)
class SDAR(ClippedLoss):
    """SDAR: −min(rÂ, clip(r)Â) + coef·sg[σ(gate·(t − s))]·(t − s) (as in the authors' code).

    The second term always raises the sampled token, by coef·σ(gate·(t − s)): it is a gated imitation of the own samples, not a
    KL estimator, and its expected on-policy gradient is 0 where the gate is constant.

    Args:
        kd_coef: factor on the pull.
        gate: slope of the gate.
        clip, dual_clip, reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.
        teacher_logp: the teacher's log-probs t; a non-finite value gives no pull and counts in ``invalid_teacher``.

    Metrics: those of :class:`GRPO`, kl_teacher (mean of s − t) and invalid_teacher.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.zeros(1, requires_grad=True)
        >>> given = {"old_logp": torch.zeros(1), "advantages": torch.zeros(1), "teacher_logp": torch.zeros(1)}
        >>> rk.losses.SDAR()(logp, **given).loss.backward()
        >>> logp.grad
        tensor([-0.0050])
    """

    kd_coef: float = 0.01
    gate: float = 5.0

    needs = ("old_logp", "advantages", "teacher_logp")

    def check(self) -> None:
        super().check()
        check_numbers(self.name, kd_coef=self.kd_coef, gate=self.gate)

    def tokens(
        self, scores: TokenScores, *, old_logp: Tensor, advantages: Tensor, teacher_logp: Tensor, **shared: Any
    ) -> tuple[Tensor, Metrics]:
        logp = scores.logp
        gap, found = teacher_gap(logp, teacher_logp)
        loss, metrics = self.surrogate(logp, old_logp, advantages, **shared)
        use = (logp.detach() - teacher_logp).isfinite()
        pull = torch.where(use, torch.where(use, teacher_logp, 0) - logp, 0)
        return loss + self.kd_coef * torch.sigmoid(self.gate * gap) * pull, {**metrics, **found}


add_method(
    "sdar",
    "ratio",
    SDAR(),
    formula="bnpo + 0.01·sg[σ(5(t − s))]·(t − s)",
    paper="SDAR (ZJU-REAL/SDAR), ms-swift",
    confidence="A",
    published=(
        "The code: token mean of the pull, gate 5, coefficient 0.01, beside verl's GRPO loss (token mean, clip 0.2, dual clip 3) "
        "and 0.001 × k3 to the reference; gate and t detached. Here neither dual clip nor KL."
    ),
)
