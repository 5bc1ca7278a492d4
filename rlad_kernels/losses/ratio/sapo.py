"""SAPO: a soft gate on the ratio in place of the hard clip (arXiv 2511.20347)."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor

from rlad_kernels.core.check import is_number, needs
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.rollout import weigh
from rlad_kernels.losses.ratio.sampled import SampledOptions, on_sampled, ratio_metrics, sampled_loss
from rlad_kernels.losses.ratio.surrogate import add_kl


def _saturated(tau: float) -> float:
    """log r from which on the gate has no gradient, float64 included, and r may overflow."""
    return min(math.log1p(800 / tau), 80.0)


@on_sampled("sapo")
def sapo_tokens(
    logp: Tensor, *, old_logp: Tensor, advantages: Tensor, tau_pos: float = 1.0, tau_neg: float = 1.05,
    ref_logp: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3", **rollout: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """−(4/τ)·σ(τ(r − 1))·A per token, and its metrics; all tensors ``(N,)``."""
    advantages, found = weigh(logp, old_logp, advantages, **rollout)
    live = advantages != 0
    up = advantages > 0
    tau = torch.where(up, torch.full_like(logp, tau_pos), tau_neg)
    most = torch.where(up, torch.full_like(logp, _saturated(tau_pos)), _saturated(tau_neg))
    r = torch.where(live, (logp - old_logp).clamp(max=most), 0).exp()
    loss = torch.where(live, -(4 / tau) * torch.sigmoid(tau * (r - 1)) * advantages, 0)
    return add_kl(loss, {**ratio_metrics(logp, old_logp), **found}, logp, ref_logp, kl_coef, kl_estimator)


def sapo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, *,
    temperatures: tuple[float, float] = (1.0, 1.05), **options: Unpack[SampledOptions],
) -> LossOutput:  # fmt: skip
    """SAPO: −(4/τ)·σ(τ(r − 1))·Â with r = exp(s − o), τ = τ_pos where Â > 0, else τ_neg (arXiv 2511.20347).

    Where PPO cuts the gradient −rÂ off, the gate weighs it by 4σ(1 − σ): 1 on-policy, falling off on both sides, the faster the
    larger τ.

    Args:
        logp, old_logp, advantages, mask: as in :func:`grpo_loss`.
        temperatures: (τ_pos, τ_neg), both positive.
        options: as of :func:`cispo_loss`; ``reduction`` is ``seq-mean-token-mean`` unless given.

    Returns:
        LossOutput. Metrics: ratio_mean, ratio_max, kl_old, kl_ref, rollout_weight_mean, rollout_clip_frac.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    needs("sapo_loss", old_logp=old_logp, advantages=advantages)
    pair = isinstance(temperatures, tuple | list) and len(temperatures) == 2 and all(map(is_number, temperatures))
    if not (pair and min(temperatures) > 0):
        raise ValueError(f"sapo_loss: temperatures must be (positive Â, other Â), both > 0, got {temperatures!r}")
    tensors, taus = {"old_logp": old_logp, "advantages": advantages}, {"tau_pos": temperatures[0], "tau_neg": temperatures[1]}
    options.setdefault("reduction", "seq-mean-token-mean")
    return sampled_loss("sapo_loss", sapo_tokens, logp, tensors, mask, taus, **options)


add_method(
    "sapo", "ratio", sapo_loss, formula="−(4/τ)·σ(τ(r − 1))·Â, τ = 1 where Â > 0, else 1.05", needs=("old_logp", "advantages"),
    paper="arXiv 2511.20347", confidence="B", products=3,
)  # fmt: skip
