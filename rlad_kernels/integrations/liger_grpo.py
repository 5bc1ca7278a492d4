"""The eight losses of Liger's and TRL's GRPO on log-probs ``(B, T)``: per-token losses, their sums, their metrics."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NAME = "LigerFusedLinearGRPOLoss"
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


class Options(NamedTuple):
    beta: float
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    max_completion_length: int | None
    level: str
    delta: float | None
    bias_correction: bool
    sapo: tuple[float, float]  # temperatures for Â > 0 and Â ≤ 0
    vespo_pos: tuple[float, float]  # k, λ for Â ≥ 0
    vespo_neg: tuple[float, float]


def _check(o: Options) -> None:
    if o.loss_type not in LOSSES:
        raise ValueError(f"{NAME}: loss_type must be one of {LOSSES}, got {o.loss_type!r}")
    if o.level not in ("token", "sequence"):
        raise ValueError(f"{NAME}: importance_sampling_level must be token or sequence, got {o.level!r}")
    if o.level == "sequence" and o.loss_type in ("cispo", "sapo", "vespo"):
        raise ValueError(f"{NAME}: loss_type={o.loss_type!r} is per token; set importance_sampling_level='token'")
    if o.loss_type == "dr_grpo" and o.max_completion_length is None:
        raise ValueError(f"{NAME}: loss_type='dr_grpo' needs max_completion_length, got None")
    if o.loss_type == "sapo" and min(o.sapo) <= 0:
        raise ValueError(f"{NAME}: SAPO's temperatures must be positive, got {o.sapo}")


def token_losses(
    o: Options, logp: Tensor, keep: Tensor, advantages: Tensor, *, old: Tensor | None, reference: Tensor | None,
    is_ratio: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Per-token loss, KL to the reference (None without beta) and where the ratio is clipped: ``(B, T)``, or ``(B, 1)`` a sequence.

    Every tensor is finite at masked places. ``advantages (B, 1)``.
    """
    _check(o)
    log_ratio = logp - (logp.detach() if old is None else old)
    if o.level == "sequence":
        log_ratio = (log_ratio.sum(1) / keep.sum(1).clamp(min=1)).unsqueeze(1)
    ratio = log_ratio.exp()
    clipped = ((ratio < 1 - o.epsilon_low) & (advantages < 0)) | ((ratio > 1 + o.epsilon_high) & (advantages > 0))
    if o.loss_type == "cispo":
        loss = -ratio.clamp(max=o.epsilon_high).detach() * advantages * logp
        clipped = (ratio > o.epsilon_high) & (advantages > 0)
    elif o.loss_type == "sapo":
        t = torch.where(advantages > 0, *o.sapo)
        loss = -4 / t * torch.sigmoid(t * (ratio - 1)) * advantages
    elif o.loss_type == "vespo":
        loss = -_vespo(o, log_ratio, advantages, is_ratio) * advantages * logp
    else:
        bounded = ratio if o.delta is None else ratio.clamp(max=o.delta)
        loss = -torch.minimum(bounded * advantages, ratio.clamp(1 - o.epsilon_low, 1 + o.epsilon_high) * advantages)
    if o.loss_type in ("sapo", "vespo"):
        clipped = torch.zeros_like(clipped)
    if is_ratio is not None and o.loss_type != "vespo":
        loss = loss * is_ratio
    if not o.beta:
        return loss, None, clipped
    gap = (logp.detach() if reference is None else reference) - logp
    kl = gap.exp() - gap - 1
    kl = kl * ratio if o.bias_correction else kl
    return loss + o.beta * kl, kl, clipped


@torch.no_grad()
def _vespo(o: Options, log_ratio: Tensor, advantages: Tensor, is_ratio: Tensor | None) -> Tensor:
    """φ(w) = e^λ·w^k·e^(−λw) of the sequence's ratio w, in log space; constant in the loss."""
    floor = math.log(1e-8)
    log_w = log_ratio.clamp(-20, 20).sum(1, keepdim=True)
    if is_ratio is not None:
        log_w = log_w + is_ratio.log().clamp(floor, 20).sum(1, keepdim=True)
    log_w = log_w.clamp(floor, 20)
    k, lam = (torch.where(advantages >= 0, *x) for x in zip(o.vespo_pos, o.vespo_neg, strict=True))
    lam = lam.clamp(min=1e-4)
    return (lam + k * log_w - lam * log_w.exp()).exp().nan_to_num(0, 0, 0)


def total(o: Options, loss: Tensor, keep: Tensor, items: Tensor | float | None) -> Tensor:
    """The loss of the batch: TRL's normalisation for each loss type."""
    lengths, batch = keep.sum(1), len(keep)
    loss = torch.where(keep, loss, 0)
    if o.loss_type == "luspo":
        return loss.sum() / batch
    if o.loss_type in ("grpo", "sapo"):
        return (loss.sum(1) / lengths.clamp(min=1)).sum() / batch
    if o.loss_type == "bnpo":
        return loss.sum() / lengths.sum().clamp(min=1)
    if o.loss_type == "dr_grpo":
        return loss.sum() / (batch * (o.max_completion_length or 1))
    return loss.sum() / _tokens(lengths.sum().float(), items)


def _tokens(here: Tensor, items: Tensor | float | None) -> Tensor:
    """Tokens a process: of the whole accumulated batch if given, else of this one; the mean over processes."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if items is not None:
        here = torch.as_tensor(items, device=here.device, dtype=torch.float32)
    elif distributed:
        torch.distributed.all_reduce(here)
    return (here / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1)


def grpo_metrics(kl: Tensor | None, clipped: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    """Means over the kept tokens: KL to the reference, where there is one, and the clipped share."""
    found = [clipped.float()] if kl is None else [kl.detach(), clipped.float()]
    return tuple(torch.where(keep, x, 0).sum() / keep.sum().clamp(min=1) for x in found)
