"""The mathematics of a truncated KL per token, plain differentiable PyTorch: support, normalisation, direction, clamps.

``options`` are a :class:`TopKKL`'s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.types import first_occurrence

DIRECTIONS = ("reverse", "forward", "mixed", "jsd")
NORMALIZE = ("both", "teacher", "none", "tail")
CLAMP_GRADIENT = ("kill", "pass")
_LOG_FLOOR = -23 * math.log(2)  # smallest student tail mass told from 1 − Σ in float32: 2^-23


def bounded(x: Tensor, low: float | None, high: float | None, gradient: str) -> Tensor:
    """``x`` clamped; where that binds its gradient is 0 (``kill``) or 1 (``pass``)."""
    if low is None and high is None:
        return x
    y = x.clamp(low, high)
    if gradient == "kill":
        return y
    through = torch.where(x.isfinite(), x, y)
    return y.detach() + (through - through.detach())


def _kl(la: Tensor, lb: Tensor, unit: Tensor, options: Any) -> Tensor:
    """Slots of Σ a(log a − log b), 0 where a = 0.

    Where ``unit``, both sum to one, and Σ(b − a) = 0 is added slot by slot: the terms are then non-negative and of second
    order in the gap, so that rounding in the normalisers does not swamp a small KL.
    """
    live = la > -torch.inf
    la, gap = torch.where(live, la, 0), torch.where(live, la, 0) - torch.where(live, lb, 0)
    a = torch.where(live, la.exp(), 0)
    c = options.log_ratio_clamp
    if c is not None:
        return torch.where(live, a * bounded(gap, -c, c, options.clamp_gradient), 0)
    near = live & unit & (gap.abs() < 1)
    small = torch.where(near, gap, 0)
    far = torch.where(near | ~live, 0, a * gap) + torch.where(unit, lb.exp() - a, 0)
    return torch.where(near, a * (torch.expm1(-small) + small), far)


def divergence(lq: Tensor, lp: Tensor, unit: Tensor, options: Any) -> Tensor:
    """Slots of the chosen divergence between student log-probs ``lq`` and teacher log-probs ``lp``."""
    beta = options.beta
    if options.direction == "reverse":
        return _kl(lq, lp, unit, options)
    if options.direction == "forward":
        return _kl(lp, lq, unit, options)
    if options.direction == "mixed":
        return beta * _kl(lp, lq, unit, options) + (1 - beta) * _kl(lq, lp, unit, options)
    live = (lq > -torch.inf) | (lp > -torch.inf)  # logaddexp(−∞, −∞) has a NaN gradient
    lm = torch.logaddexp(torch.where(live, lp, 0) + math.log(beta), torch.where(live, lq, 0) + math.log1p(-beta))
    lm = torch.where(live, lm, -torch.inf)
    return beta * _kl(lp, lm, unit, options) + (1 - beta) * _kl(lq, lm, unit, options)


def support(ids: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """Slots that count, with a real id (≥ 0, no earlier duplicate) and a finite teacher value; and rows with a non-finite one."""
    finite = teacher_logp.isfinite()
    return first_occurrence(ids) & finite, ((ids >= 0) & ~finite).any(1)


def topk_kl_tokens(
    topk_logp: Tensor,
    ids: Tensor,
    teacher_logp: Tensor,
    tail_logp: Tensor | None,
    teacher_tail: Tensor | None,
    entropy: Tensor | None,
    options: Any,
) -> tuple[Tensor, Tensor]:
    """Per-token divergence on the support S, tensors ``(N, K)`` and ``(N,)``; metrics ``(4, N)``. An empty S gives 0."""
    valid, invalid = support(ids, teacher_logp)
    some = valid.any(1)
    # A row without a support becomes one fake slot of log-prob 0 on both sides: no loss, no NaN from an empty logsumexp.
    none = torch.where(~some.unsqueeze(1) & (torch.arange(ids.shape[1], device=ids.device) == 0), 0.0, -torch.inf)
    lq, lp = torch.where(valid, topk_logp, none), torch.where(valid, teacher_logp, none)
    student_mass = torch.where(some, lq.detach().exp().sum(1), 0)
    teacher_mass = torch.where(some, lp.exp().sum(1), 0)
    clamped = torch.zeros_like(some)
    rest = _outside(lq, tail_logp, entropy, options)
    if options.normalize == "tail":
        assert teacher_tail is not None
        invalid = invalid | teacher_tail.isnan() | (teacher_tail == torch.inf)
        if tail_logp is None:
            held = (lq > -torch.inf).any(1, keepdim=True)  # logsumexp of −∞ alone has a NaN gradient
            total = torch.where(held, lq, -1e4).logsumexp(1)
            clamped = some & ~(total < math.log1p(-(2.0**-23)))
            tail_logp = torch.where(clamped, _LOG_FLOOR, torch.log(-torch.expm1(torch.where(clamped | ~some, -1.0, total))))
        use = (some & teacher_tail.isfinite()).unsqueeze(1)  # the tail is one more slot
        valid = torch.cat([valid, use], 1)
        lq = torch.cat([lq, torch.where(use, tail_logp.unsqueeze(1), -torch.inf)], 1)
        lp = torch.cat([lp, torch.where(use, teacher_tail.unsqueeze(1), -torch.inf)], 1)
    if options.logp_floor is not None:
        floor = (options.logp_floor, None, options.clamp_gradient)
        lq, lp = torch.where(valid, bounded(lq, *floor), lq), torch.where(valid, bounded(lp, *floor), lp)
    unit = torch.zeros_like(some).unsqueeze(1)
    if options.normalize == "both":
        unit = (lq > -torch.inf).any(1, keepdim=True)  # a student without any mass on S stays without
        lq = torch.where(unit, torch.where(unit, lq, 0).log_softmax(1), lq)
    if options.normalize in ("both", "teacher"):
        lp = lp.log_softmax(1)
    loss = divergence(lq, lp, unit, options).sum(1) + rest
    loss = torch.where(some, bounded(loss, options.loss_min, options.loss_max, options.clamp_gradient), 0)
    rows = (student_mass, teacher_mass, invalid.to(loss.dtype), clamped.to(loss.dtype))
    return loss, torch.stack(rows)


def _outside(lq: Tensor, tail_logp: Tensor | None, entropy: Tensor | None, options: Any) -> Tensor | float:
    """Σ_{v∉S} q(log q − L), the reverse KL's part outside S where the teacher's log-prob is L, from the entropy of all of q."""
    if options.outside_logp is None:
        return 0.0
    assert entropy is not None
    live = lq > -torch.inf
    lq = torch.where(live, lq, 0)
    q = torch.where(live, lq.exp(), 0)
    mass = 1 - q.sum(1) if tail_logp is None else tail_logp.exp()
    share = 1 - options.beta if options.direction == "mixed" else 1.0
    return share * (-entropy - (q * lq).sum(1) - options.outside_logp * mass)
