"""The oracle: every op in plain differentiable PyTorch with all N×V logits; any dtype, float64 above all. Imports torch only."""

from __future__ import annotations

import math
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
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
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


def divergence(
    lq: Tensor,
    lp: Tensor,
    family: str,
    numbers: tuple[float, float, float] = (0.0, 0.0, 0.0),
    forward: Tensor | float = 0.0,
    reverse: Tensor | float = 0.0,
) -> Tensor:
    """The families of ``rlad::divergence_`` from log-probs ``(…, V)`` of student and teacher.

    As their definitions read, plus Σ(q − p) = 0 and the like column by column, so that every term is ≥ 0 and of second order where
    q ≈ p. A column without mass on either side counts 0. ``taid`` is inf where no column has mass on both.
    """
    dead = (lq == -torch.inf) & (lp == -torch.inf)
    lq, lp = torch.where(dead, 0, lq), torch.where(dead, 0, lp)
    q, p, w = lq.exp(), lp.exp(), lp - lq
    a, b, c = numbers

    if family == "sym":
        on = [torch.as_tensor(k, dtype=lq.dtype).expand(lq.shape[:-1]).unsqueeze(-1) for k in (forward, reverse)]
        pairs = ((lp, lq), (lq, lp))
        terms = sum(torch.where(k != 0, k * _kl_terms(x, y), 0) for k, (x, y) in zip(on, pairs, strict=True))
    elif family == "mix":
        far = torch.logaddexp(lp + math.log(c), lq + math.log1p(-c))
        m = torch.where(w.abs() < 1, lq + torch.log1p(c * torch.expm1(w.clamp(-1, 1))), far)  # m = q exactly where p = q
        terms = a * _kl_terms(lp, m) + b * _kl_terms(lq, m)
    elif family == "todi":
        sigma = torch.sigmoid(a * w).detach()
        terms = sigma * _times(p, w) - (1 - sigma) * _times(q, w)
    elif family == "taid":
        mixed = torch.where(dead, -torch.inf, (1 - a) * lq + a * lp).detach()
        some = (mixed > -torch.inf).any(-1, keepdim=True)
        terms = torch.where(some, _kl_terms(torch.where(some, mixed, 0).log_softmax(-1), lq), torch.inf)
    elif family == "alpha_beta":
        terms = _alpha_beta_terms(lq, lp, a, b)
    elif family == "log_square":
        terms = w.square() / 2
    else:
        terms = torch.where(w.abs() < 1, _times(q, torch.expm1(w.clamp(-1, 1))), p - q).abs() / 2
    return torch.where(dead, 0, terms).sum(-1)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x·y, 0 where x is 0 though y may be infinite."""
    return torch.where(x > 0, x * torch.where(x > 0, y, 0), 0)


def _excess(x: Tensor) -> Tensor:
    """e^x − 1 − x for |x| not large; its series near 0, where the difference would cancel."""
    near = x.abs() < 0.05
    small = torch.where(near, x, 0)
    series = torch.ones_like(x)
    for k in range(10, 2, -1):
        series = 1 + small / k * series
    return torch.where(near, small * small / 2 * series, torch.expm1(x) - x)


def _kl_terms(lx: Tensor, ly: Tensor) -> Tensor:
    """x·log(x/y) + y − x ≥ 0; Σ of them is KL(x‖y) where both sum to one."""
    x, r = lx.exp(), lx - ly
    near = r.abs() < 1
    small = torch.where(near, r, 0)
    return torch.where(near, x * _excess(-small), _times(x, torch.where(near, 0, r)) + ly.exp() - x)


def _alpha_beta_terms(lq: Tensor, lp: Tensor, a: float, b: float) -> Tensor:
    """−1/(αβ)·[p^α·q^β − α/s·p^s − β/s·q^s], s = α + β, and its limits where one of α, β, s is 0."""
    s, w = a + b, lp - lq
    near = w.abs() < 1
    small, wide = torch.where(near, w, 0), torch.where(near, 0, w)

    qs, ps = (torch.ones_like(x) if s == 0 else (s * x).exp() for x in (lq, lp))
    if s == 0:
        close, far = _excess(a * small) / a**2, _excess(a * wide) / a**2
    elif a == 0:
        close, far = qs * _excess(b * small) / b**2, (ps - qs - b * _times(qs, wide)) / b**2
    elif b == 0:
        close, far = ps * _excess(-a * small) / a**2, (a * _times(ps, wide) - ps + qs) / a**2
    else:
        close = qs * (_excess(s * small) / (b * s) - _excess(a * small) / (a * b))
        far = -((a * lp + b * lq).exp() - a / s * ps - b / s * qs) / (a * b)
    return torch.where(near, close, far)
