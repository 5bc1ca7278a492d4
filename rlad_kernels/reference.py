"""The oracle: every op in plain differentiable PyTorch with all N×V logits; any dtype, float64 above all. Imports torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """As ``TokenScores``; every field is filled."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    topk_logp: Tensor
    tail_logp: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, temperature: float | Tensor = 1.0, logit_scale: float = 1.0,
    softcap: float | None = None, vocab_size: int | None = None,
) -> Tensor:  # fmt: skip
    """z = softcap·tanh(logit_scale·(h·W_v + b_v)/softcap)/temperature, ``(…, V)``."""
    z = hidden @ weight[:vocab_size].T
    z = logit_scale * (z if bias is None else z + bias[:vocab_size])
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.dim() else temperature)


def token_scores(z: Tensor, target: Tensor, topk_ids: Tensor | None = None, mask: Tensor | None = None) -> Scores:
    """Everything ``linear_logp`` returns, from logits ``(…, V)``; masked rows (and target −100) are 0 and carry no gradient."""
    keep = target != -100 if mask is None else (target != -100) & (mask != 0)
    z = torch.where(keep.unsqueeze(-1), z, 0)
    target = torch.where(keep, target, 0).long()
    ids = torch.full((*target.shape, 1), -1) if topk_ids is None else torch.where(keep.unsqueeze(-1), topk_ids, -1).long()
    logp = z.log_softmax(-1)
    p = logp.exp()
    inside = torch.zeros(*z.shape[:-1], z.shape[-1] + 1, dtype=torch.bool)
    inside = inside.scatter(-1, torch.where(ids < 0, z.shape[-1], ids), True)[..., :-1]
    slot_logp = torch.where(ids < 0, -torch.inf, logp.gather(-1, ids.clamp_min(0)))
    scores = Scores(
        logp.gather(-1, target.unsqueeze(-1)).squeeze(-1),
        z.logsumexp(-1),
        -torch.where(p > 0, p * torch.where(p > 0, logp, 0), 0).sum(-1),
        slot_logp,
        torch.where(inside, -torch.inf, logp).logsumexp(-1),
        z.mean(-1),
        z.argmax(-1) == target,
        (2 * logp).logsumexp(-1),
    )
    return Scores(*(torch.where(keep.unsqueeze(-1) if x.dim() > keep.dim() else keep, x, 0) for x in scores))


def topk(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, log-probs (descending, the lower id first among equals) and log-mass outside, from logits ``(…, V)``."""
    logp = z.log_softmax(-1)
    order = z.sort(dim=-1, descending=True, stable=True).indices
    outside = logp.gather(-1, order[..., k:])
    return order[..., :k], logp.gather(-1, order[..., :k]), outside.logsumexp(-1)


def gather(z: Tensor, ids: Tensor) -> Tensor:
    """Logits at ``ids (…, K)``, −inf in empty slots."""
    return torch.where(ids < 0, -torch.inf, z.gather(-1, ids.clamp_min(0).long()))
