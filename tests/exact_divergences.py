"""The divergences as their papers have them, in 150 decimal digits: no formula cancels or overflows there, whatever the log-ratios.

And what rounding may cost: every log-prob is off by a few roundings of what it was computed from, every term by a few of its own;
the bounds are how far that moves the value and each entry of the gradient.
"""

from __future__ import annotations

from decimal import Decimal as D
from decimal import localcontext
from typing import NamedTuple

import torch
from torch import Tensor

from rlad_kernels.backends import reference
from rlad_kernels.core.divergence import Kind
from rlad_kernels.engine.shards import Shard

DIGITS = 150  # 1 − e^-200 still has 60 of its own
Row = list[D]
ALONE = Shard(torch.empty(0, 1), 0, 0, "")  # all columns are here


class Rows(NamedTuple):
    """Of rows of logits, in float64: the value (R,) and its gradient (R, V) with respect to the student's tempered logits."""

    value: Tensor
    grad: Tensor


def _log_probs(z: Row) -> Row:
    top = max(z)
    total = sum((x - top).exp() for x in z).ln()
    return [x - top - total for x in z]


def rounded_log_probs(z: Tensor) -> Tensor:
    """Log-probs of float64 logits (R, V), rounded once."""
    with localcontext() as context:
        context.prec = DIGITS
        return torch.tensor([[float(x) for x in _log_probs([D(x) for x in row])] for row in z.tolist()], dtype=torch.float64)


def _times(x: D, y: D) -> D:
    return D(0) if x == 0 else x * y


def _pow(log: D, exponent: D) -> D:
    return D(1) if exponent == 0 else (log * exponent).exp()


def _column(kind: Kind, lq: D, lp: D, target: D, forward: D, reverse: D) -> tuple[D, D]:
    """(term, ∂/∂log q) of one column, from its log-probs."""
    q, p, w = lq.exp(), lp.exp(), lp - lq
    a, b, c = (D(x) for x in kind.numbers)
    if kind.family == "sym":
        value = (_times(forward, _times(p, w)) if forward else D(0)) - (_times(q, w) * reverse if reverse else D(0))
        return value, -forward * p + (reverse * (q - _times(q, w)) if reverse else D(0))
    if kind.family == "mix":
        m, rest = c * p + (1 - c) * q, 1 - c
        value = a * _times(p, lp - m.ln()) + b * _times(q, lq - m.ln())
        return value, -a * p * rest * q / m + b * (_times(q, lq - m.ln()) + q - q * rest * q / m)
    if kind.family == "todi":
        sigma = 1 / (1 + (-a * w).exp())
        return sigma * _times(p, w) - (1 - sigma) * _times(q, w), -sigma * p + (1 - sigma) * (q - _times(q, w))
    if kind.family == "taid":
        p = target.exp()
        return _times(p, target - lq), -p
    if kind.family == "total_variation":
        return abs(p - q) / 2, (q > p) * q / 2 - (q < p) * q / 2
    assert kind.family == "alpha_beta"
    s = a + b
    assert a and b and s
    cross, ps, qs = (a * lp + b * lq).exp(), _pow(lp, s), _pow(lq, s)
    return -(cross - a / s * ps - b / s * qs) / (a * b), -(cross - qs) / a


def _row(kind: Kind, zq: Row, zp: Row, forward: D, reverse: D) -> tuple[D, Row]:
    lq, lp = _log_probs(zq), _log_probs(zp)
    tau = D(kind.numbers[0])
    target = _log_probs([(1 - tau) * x + tau * y for x, y in zip(lq, lp, strict=True)]) if kind.family == "taid" else lp
    none = (D(0), D(0))
    columns = [
        none if x == y == D("-Infinity") else _column(kind, x, y, t, forward, reverse)
        for x, y, t in zip(lq, lp, target, strict=True)
    ]
    factor, total = D(kind.factor), sum(u for _, u in columns)
    return sum(t for t, _ in columns) * factor, [(u - x.exp() * total) * factor for x, (_, u) in zip(lq, columns, strict=True)]


def shares(kind: Kind, zq: Tensor, zp: Tensor) -> Tensor:
    """(2, R): what forward and reverse KL count in each row of the family "sym"."""
    if kind.coefficients is not None:
        return kind.coefficients(zq.log_softmax(1), zp.log_softmax(1), ALONE)
    return torch.tensor([[kind.forward], [kind.reverse]], dtype=zq.dtype).expand(2, len(zq))


def exact(kind: Kind, zq: Tensor, zp: Tensor) -> Rows:
    """From float64 tempered logits (R, V)."""
    values, grads = [], []
    with localcontext() as context:
        context.prec = DIGITS
        weights = shares(kind, zq, zp).t().tolist()
        for q, p, (forward, reverse) in zip(zq.tolist(), zp.tolist(), weights, strict=True):
            value, grad = _row(kind, [D(x) for x in q], [D(x) for x in p], D(forward), D(reverse))
            values.append(float(value))
            grads.append([float(x) for x in grad])
    new = {"dtype": torch.float64}
    return Rows(torch.tensor(values, **new), torch.tensor(grads, **new))


def _terms(kind: Kind, lq: Tensor, lp: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's term and ∂/∂log q, (R, V); the target of "taid" given as ``lp``."""
    family, numbers = ("sym", (0.0, 0.0, 0.0)) if kind.family == "taid" else (kind.family, kind.numbers)
    lq = lq.detach().requires_grad_()
    forward, reverse = (x.unsqueeze(1).expand_as(lq) for x in share)
    value = reference.divergence(lq.unsqueeze(2), lp.unsqueeze(2), family, numbers, forward, reverse)
    return value.detach(), torch.autograd.grad(value.sum(), lq)[0]


def _spread(x: Tensor, share: Tensor, own: Tensor) -> Tensor:
    """``own`` + share·Σx; but of a column with more than half of ``share`` the sum of the others', which it is computed from."""
    large = share > 0.5
    spread = own + share * x.sum(1, keepdim=True)
    return torch.where(large, torch.where(large, 0, spread).sum(1, keepdim=True), spread)


def _slack(z: Tensor, logp: Tensor, eps: float, more: Tensor | float = 0.0) -> Tensor:
    """How far log-probs may be off, (R, V): the logits' roundings, ``more``, and the normaliser's."""
    p, own = logp.exp(), 2 * eps * (1 + z.abs() + z.amax(1, keepdim=True).abs() + logp.abs()) + more
    large = p > 0.5
    others = torch.where(large, 0, p * own).sum(1, keepdim=True)
    rest = torch.where(large, 0, p).sum(1, keepdim=True)
    return torch.where(large, others + 2 * eps * logp.abs() + rest.clamp_max(eps), own)


def bounds(kind: Kind, zq: Tensor, zp: Tensor, eps: float) -> Rows:
    """How far value and gradient may be off in arithmetic of relative precision ``eps``."""
    dead = zq == -torch.inf
    zq, zp = (torch.where(dead, -1e4, z) for z in (zq, zp))
    lq, lp = zq.log_softmax(1), zp.log_softmax(1)
    slack_q, slack_p = _slack(zq, lq, eps), _slack(zp, lp, eps)
    share = shares(kind, zq, zp)
    if kind.family == "taid":
        tau, share = kind.numbers[0], torch.stack([torch.ones_like(share[0]), torch.zeros_like(share[1])])
        mixed, more = (1 - tau) * lq + tau * lp, (1 - tau) * slack_q + tau * slack_p
        log_z = mixed.logsumexp(1, keepdim=True)
        lp = mixed.log_softmax(1)
        slack_p = _slack(mixed, lp, eps, more) + torch.where(log_z > -1, 2 * eps * log_z.abs(), 0)
    value, u = _terms(kind, lq, lp, share)
    q, p, far = lq.exp(), lp.exp(), (lp - lq).abs() >= 1
    moved_value, moved_u = torch.zeros_like(q), torch.zeros_like(q)
    for a in (-1, 1):
        for b in (-1, 1):
            shifted = _terms(kind, lq + a * slack_q, lp + b * slack_p, share)
            moved_value = torch.maximum(moved_value, (shifted[0] - value).abs())
            moved_u = torch.maximum(moved_u, (shifted[1] - u).abs())
    parts, parts_u = p + q, q + p * (share[0].unsqueeze(1) if kind.family in ("sym", "taid") else kind.family == "todi")
    if kind.family == "alpha_beta":
        a, b, s = *kind.numbers[:2], sum(kind.numbers[:2])
        cross, qs, ps = (a * lp + b * lq).exp(), (s * lq).exp(), (s * lp).exp()
        parts, parts_u = (cross + abs(a / s) * ps + abs(b / s) * qs) / abs(a * b), (cross + qs) / abs(a)
    moved_value = 2 * moved_value + 8 * eps * (value.abs() + torch.where(far, parts, 0))
    moved_u = 2 * moved_u + 8 * eps * (u.abs() + torch.where(far, parts_u, 0))
    grad = _spread(moved_u, q, moved_u + q * (slack_q + 4 * eps) * u.sum(1, keepdim=True).abs())
    if kind.coefficients is not None:  # shares are off by what the masses' differences are
        one, none = torch.ones_like(share[0]), torch.zeros_like(share[0])
        (vf, uf), (vr, ur) = (_terms(kind, lq, lp, torch.stack(x)) for x in ((one, none), (none, one)))
        both = (q > 0.5) & (p > 0.5)
        lost = torch.where(both, 0, p * (slack_p + 4 * eps) + q * (slack_q + 4 * eps)).sum(1, keepdim=True)
        off = (4 * lost / torch.where(both, 0, (p - q).abs()).sum(1, keepdim=True).clamp_min(1e-300)).clamp_max(1)
        moved_value += off * (vf - vr).abs()
        grad += _spread(off * (uf - ur).abs(), q, off * (uf - ur).abs())
    tiny = 1e-34 if eps > 1e-10 else 1e-300  # what underflows on the way
    live = ~dead
    return Rows(
        kind.factor * torch.where(live, moved_value, 0).sum(1) + tiny,
        (kind.factor * grad + tiny * (1 + u.abs().sum(1, keepdim=True))) * live,
    )
