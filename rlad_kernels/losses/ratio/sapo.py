"""SAPO: a soft gate on the ratio in place of the hard clip (arXiv 2511.20347)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.check import is_pair
from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import SampledLoss, ratio_metrics


def _saturated(tau: float) -> float:
    """log r from which on the gate has no gradient, float64 included, and r may overflow."""
    return min(math.log1p(800 / tau), 80.0)


@dataclass(frozen=True, kw_only=True)
class SAPO(SampledLoss):
    """SAPO: −(4/τ)·σ(τ(r − 1))·Â with r = exp(s − o), τ = τ_pos where Â > 0, else τ_neg (arXiv 2511.20347).

    Where PPO cuts the gradient −rÂ off, the gate weighs it by 4σ(1 − σ): 1 on-policy, falling off on both sides, the faster the
    larger τ.

    Args:
        temperatures: (τ_pos, τ_neg), both positive.
        reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.

    Metrics: ratio_mean, ratio_max, kl_old, kl_ref, rollout_weight_mean, rollout_clip_frac.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.zeros(1, 2)
        >>> rk.losses.SAPO(temperatures=(1.0, 2.0))(logp, old_logp=logp, advantages=torch.tensor([[1.0, -1.0]])).token_loss
        tensor([[-2.,  1.]])
    """

    reduction: str = "seq-mean-token-mean"
    temperatures: tuple[float, float] = (1.0, 1.05)

    needs = ("old_logp", "advantages")

    def check(self) -> None:
        super().check()
        if not (is_pair(self.temperatures) and min(self.temperatures) > 0):
            raise ValueError(f"{self.name}: temperatures must be (positive Â, other Â), both > 0, got {self.temperatures!r}")

    def tokens(
        self,
        scores: TokenScores,
        *,
        old_logp: Tensor,
        advantages: Tensor,
        ref_logp: Tensor | None = None,
        rollout_logp: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        logp, (tau_pos, tau_neg) = scores.logp, self.temperatures
        advantages, found = self.weighed(advantages, logp, old_logp, rollout_logp)
        live = advantages != 0
        up = advantages > 0
        tau = torch.where(up, torch.full_like(logp, tau_pos), tau_neg)
        most = torch.where(up, torch.full_like(logp, _saturated(tau_pos)), _saturated(tau_neg))
        r = torch.where(live, (logp - old_logp).clamp(max=most), 0).exp()
        loss = torch.where(live, -(4 / tau) * torch.sigmoid(tau * (r - 1)) * advantages, 0)
        return self.reference.add(loss, {**ratio_metrics(logp, old_logp), **found}, logp, ref_logp, old_logp)


add_method(
    "sapo",
    "ratio",
    SAPO(),
    formula="−(4/τ)·σ(τ(r − 1))·Â, τ = 1 where Â > 0, else 1.05",
    paper="arXiv 2511.20347",
    confidence="B",
    published=(
        "The mean of each sequence's tokens, then of the group's sequences; τ_pos = 1, τ_neg = 1.05, no KL in the objective; the "
        "gradient through the gate. The same here and in verl, whatever its loss_agg_mode."
    ),
)
