"""The losses' formulas written again in a few lines from the papers, and the bounds that the library's results are held to.

Nothing here calls rlad_kernels. Every formula is plain differentiable PyTorch: float64 inputs give the reference, float32
inputs give what plain float32 PyTorch would have computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.roundings import EPS, largest, spread

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float64, id="float64", marks=pytest.mark.cpu)]


def hold(
    actual: Tensor, formula: Callable[..., Tensor], *inputs: Tensor, plain: Callable[..., Tensor] | None = None,
    scale: float | None = None, calls: int = 1,
) -> float:  # fmt: skip
    """Hold ``actual`` to ``formula(*inputs)`` in float64, by the largest error of any element; gives the budget.

    What rounding can do to ``plain``, else to the same formula, in ``actual``'s dtype, and an ulp of the largest element, for
    each of the ``calls`` of the library that led to it. ``scale`` replaces the largest element where a sum cancels. In float64
    the oracle's own roundings are no finer.
    """
    exact, bound = budget(formula, *inputs, plain=plain, scale=scale, eps=torch.finfo(actual.dtype).eps)
    bound *= calls * (2 if actual.dtype == torch.float64 else 1)
    within(actual, exact, bound)
    return bound


def budget(
    formula: Callable[..., Tensor], *inputs: Tensor, plain: Callable[..., Tensor] | None = None, scale: float | None = None,
    eps: float = EPS,
) -> tuple[Tensor, float]:  # fmt: skip
    """The formula in float64, and how far off a result may be whose operations round to ``eps``."""
    (exact,), (error,) = spread(lambda: formula(*(x.double() for x in inputs)), eps)
    if plain is not None:
        error = spread(lambda: plain(*(x.double() for x in inputs)), eps)[1][0]
    return exact, error + eps * (largest(exact) if scale is None else scale)


def budgets(formula: Callable[[], Sequence[Tensor]]) -> list[tuple[Tensor, float]]:
    """The same for every tensor that a float64 ``formula`` of many results gives, for float32 results."""
    return [(exact, error + EPS * largest(exact)) for exact, error in zip(*spread(formula), strict=True)]


def within(actual: Tensor, exact: Tensor, bound: float, what: str = "") -> None:
    """No element further off than ``bound``; infinities are equal."""
    assert actual.shape == exact.shape
    off = (actual.detach().double() - exact).masked_fill(actual == exact, 0)  # ∞ − ∞
    error = off.abs().max().item() if off.numel() else 0.0
    assert error <= bound, f"{what}: error {error:.3g} exceeds {bound:.3g}"


def gradient(value: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The formula of d Σ value / d (first argument), by autograd."""

    def formula(x: Tensor, *rest: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(value(x, *rest).sum(), x)[0]

    return formula


def straight_through(s: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """A function of ``s`` with this value and this derivative."""
    return value.detach() + slope.detach() * (s - s.detach())


def kl_estimate(s: Tensor, ref: Tensor, name: str) -> Tensor:
    """Estimator of KL(π‖ref) on a sampled token, x = s − ref, with the gradient it is backpropagated with."""
    x = (s - ref).detach()
    k3 = (-x).exp() - 1 + x
    value, slope = {
        "k1": (x, torch.zeros_like(x)),
        "k2": (x**2 / 2, x),
        "k3": (k3, 1 - (-x).exp()),
        "k3+": (k3, x),
        "k3++": (k3, k3 + 1 - (-x).exp()),
        "k4": (x, x),
        "k5": (-x * (-x).exp(), 1 - (-x).exp()),
    }[name]
    return straight_through(s, value, slope)


def surrogate(
    s: Tensor, o: Tensor, a: Tensor, t: Tensor | None = None, *, alpha: float = 1.0, clip: tuple[float, float] = (0.2, 0.2),
    clamp: float | None = None, dual: float | None = None,
) -> Tensor:  # fmt: skip
    """−min(rA, clip(r, 1−ε, 1+ε)A) with r = (π/π_old)^α·(π/π_T)^{1−α} (RLAD Eq. 3 and 4; α = 1 is GRPO)."""
    log_r = s - o
    if t is not None:
        gap = s - t if clamp is None else (s - t).clamp(-clamp, clamp)
        log_r = alpha * (s - o) + (1 - alpha) * gap
    r = log_r.exp()
    loss = -torch.minimum(r * a, r.clamp(1 - clip[0], 1 + clip[1]) * a)
    return loss if dual is None else torch.where(a < 0, torch.minimum(loss, -dual * a), loss)


def reduced(token: Tensor, keep: Tensor, reduction: str, seq_ids: Tensor | None = None, denominator: float | None = None) -> Tensor:
    """A reduction as a loop over sequences: rows of ``(B, T)``, or equal ``seq_ids`` of ``(N,)``."""
    if reduction == "token-mean":
        terms, divisor = list(token[keep]), int(keep.sum())
    else:
        if seq_ids is None:
            rows = [row[kept] for row, kept in zip(token, keep, strict=True)]
        else:
            rows = [token[keep & (seq_ids == i)] for i in seq_ids.unique()]
        terms = [row.mean() if reduction == "seq-mean-token-mean" else row.sum() for row in rows if row.numel()]
        divisor = len(terms)
    total = sum(terms, (token * 0).sum())
    return total / (max(divisor, 1) if denominator is None else denominator)


def truncated_kl(
    lq: Tensor, tail_q: Tensor, ids: Tensor, lp: Tensor, tail_p: Tensor, direction: str = "reverse", normalize: str = "both"
) -> Tensor:
    """Σq log(q/p) or Σp log(p/q) on each row's support, from log-probs ``(N, K)`` and log-masses of the tails ``(N,)``."""
    losses = []
    for row in range(ids.shape[0]):
        known = ids[row].tolist()
        use = [k for k, i in enumerate(known) if i >= 0 and i not in known[:k] and lp[row, k].isfinite()]
        if not use:
            losses.append((lq[row] * 0).nan_to_num().sum())
            continue
        q, p = lq[row, use], lp[row, use]
        if normalize == "both":
            q = q.log_softmax(0)
        if normalize in ("both", "teacher"):
            p = p.log_softmax(0)
        if normalize == "tail" and tail_p[row] > -torch.inf:
            q, p = torch.cat([q, tail_q[row].view(1)]), torch.cat([p, tail_p[row].view(1)])
        losses.append((q.exp() * (q - p)).sum() if direction == "reverse" else (p.exp() * (p - q)).sum())
    return torch.stack(losses)


def share(x: Tensor, inside: Tensor) -> Tensor:
    """``x`` renormalised over the support, 0 outside it."""
    return x * inside / (x * inside).sum(1, keepdim=True)


def centred(q: Tensor, u: Tensor) -> Tensor:
    """d L / d logits from u = ∂L/∂log q."""
    return u - q * u.sum(1, keepdim=True)


def tail_ratio(q: Tensor, p: Tensor, inside: Tensor) -> Tensor:
    """q/p on the support, and outside it the ratio of the two tail masses."""
    return torch.where(inside, q / p, (q * ~inside).sum(1, keepdim=True) / (p * ~inside).sum(1, keepdim=True))


def masked_log(x: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, x, 1).log()


# (normalize, direction) → d loss / d student logits, from probabilities q, p over the vocabulary and the support as a mask.
DLOGITS: dict[tuple[str, str], Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    ("both", "reverse"): lambda q, p, s: centred(share(q, s), share(q, s) * masked_log(share(q, s) / share(p, s), s)),
    ("both", "forward"): lambda q, p, s: share(q, s) - share(p, s),
    ("teacher", "reverse"): lambda q, p, s: centred(q, q * s * (masked_log(q / share(p, s), s) + 1)),
    ("teacher", "forward"): lambda q, p, s: q - share(p, s),
    ("none", "reverse"): lambda q, p, s: centred(q, q * s * ((q / p).log() + 1)),
    ("none", "forward"): lambda q, p, s: q * (p * s).sum(1, keepdim=True) - p * s,
    ("tail", "reverse"): lambda q, p, s: centred(q, q * tail_ratio(q, p, s).log()),
    ("tail", "forward"): lambda q, p, s: torch.where(s, q - p, q * (1 - 1 / tail_ratio(q, p, s))),
}
