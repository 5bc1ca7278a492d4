"""The divergences by name: which family of the row pass each one is, with which numbers, and what their parameters may be.

p is the teacher's distribution, q the student's; only q receives gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rlad_kernels.core.check import is_number


class Kind(NamedTuple):
    """What ``rlad::divergence_`` is told, and what is found from a chunk's log-probs (student's, teacher's) before."""

    family: str
    numbers: tuple[float, float, float] = (0.0, 0.0, 0.0)
    forward: float = 0.0  # coefficients of KL(p‖q) and KL(q‖p) in the family "sym"
    reverse: float = 0.0
    factor: float = 1.0
    coefficients: Callable[[Tensor, Tensor], Tensor] | None = None  # log-probs (C, V) → (2, C), instead of forward and reverse


@dataclass(frozen=True)
class Parameter:
    """A number with its default (None: must be given) and its range, whose ends belong to it where ``closed`` says so."""

    default: float | None
    low: float = -math.inf
    high: float = math.inf
    closed: str = "[]"

    def __str__(self) -> str:
        return f"{self.closed[0]}{self.low:g}, {self.high:g}{self.closed[1]}" if self.low > -math.inf else "finite"

    def holds(self, x: float) -> bool:
        above = x >= self.low if self.closed[0] == "[" else x > self.low
        return -math.inf < x < math.inf and above and (x <= self.high if self.closed[1] == "]" else x < self.high)


@dataclass(frozen=True)
class Divergence:
    """A divergence's parameters by name, and its kind from their values in that order."""

    kind: Callable[..., Kind]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


def _sym(forward: float, reverse: float) -> Kind:
    return Kind("sym", forward=forward, reverse=reverse)


def _mix(forward: float, reverse: float, share: float) -> Kind:
    """forward·KL(p‖m) + reverse·KL(q‖m), m = share·p + (1 − share)·q."""
    return Kind("mix", (forward, reverse, share))


def _jsd(beta: float) -> Kind:
    # The formula tends to 0 at both ends; GKD and those who implement it put the two KLs there.
    return _sym(1, 0) if beta == 0 else _sym(0, 1) if beta == 1 else _mix(beta, 1 - beta, beta)


def _alpha_beta(alpha: float, beta: float, factor: float = 1.0) -> Kind:
    return Kind("log_square", factor=factor) if alpha == beta == 0 else Kind("alpha_beta", (alpha, beta, 0.0), factor=factor)


_MOST = math.log(0.501)  # a log-prob beyond it is the largest of its row


def adaptive_coefficients(lq: Tensor, lp: Tensor, mu: float) -> Tensor:
    """AKL's shares of forward and reverse KL: Σ|p − q| over the teacher's head, and over its tail, as parts of the whole.

    The head: tokens by falling p while their cumulative mass is ≤ μ, the first in any case, and all that tie with the last.
    """
    p = lp.exp()
    falling = p.sort(dim=1, descending=True).values
    last = ((falling.cumsum(1) <= mu).sum(1, keepdim=True) - 1).clamp_min(0)
    head = p >= falling.gather(1, last)
    gap = p - lq.exp()
    sure = (lp > _MOST) & (lq > _MOST)  # both near 1: their difference is what the others' leave
    gap = torch.where(sure, torch.where(sure, 0, gap).sum(1, keepdim=True), gap).abs_()
    whole, part = gap.sum(1), torch.where(head, gap, 0).sum(1)
    forward = torch.where(whole > 0, part / whole, 0.5)
    return torch.stack([forward, 1 - forward])


def _taid(tau: float) -> Kind:
    return _sym(tau, 0) if tau in (0, 1) else Kind("taid", (tau, 0.0, 0.0))  # at 0 the target is the student itself


_SHARE = {"lam": Parameter(0.1, 0, 1, "[)")}
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(lambda: _sym(1, 0)),
    "reverse_kl": Divergence(lambda: _sym(0, 1)),
    "jeffreys": Divergence(lambda: _sym(0.5, 0.5)),
    "jsd": Divergence(_jsd, {"beta": Parameter(0.5, 0, 1)}),
    "skew_kl": Divergence(lambda lam: _mix(1, 0, lam) if lam else _sym(1, 0), _SHARE),
    "skew_rkl": Divergence(lambda lam: _mix(0, 1, 1 - lam) if lam else _sym(0, 1), _SHARE),
    "alpha": Divergence(lambda alpha: _alpha_beta(alpha, 1 - alpha), {"alpha": Parameter(0.5)}),
    "alpha_beta": Divergence(_alpha_beta, {"alpha": Parameter(0.2), "beta": Parameter(0.7)}),
    "power": Divergence(lambda lam: _alpha_beta(1 + lam, -lam), {"lam": Parameter(2 / 3)}),
    "hellinger": Divergence(lambda: _alpha_beta(0.5, 0.5, 0.25)),
    "total_variation": Divergence(lambda: Kind("total_variation")),
    "todi": Divergence(lambda beta: Kind("todi", (beta, 0.0, 0.0)), {"beta": Parameter(1.0, 0, math.inf, "(]")}),
    "akl": Divergence(
        lambda mu: Kind("sym", coefficients=lambda lq, lp: adaptive_coefficients(lq, lp, mu)), {"mu": Parameter(0.5, 0, 1)}
    ),
    "taid": Divergence(_taid, {"tau": Parameter(None, 0, 1)}),
}


def parameters(name: str, divergence: str, given: Mapping[str, float | None]) -> list[float]:
    """The divergence's parameters in its order, defaults filled in.

    Raises:
        ValueError: for an unknown divergence, or a parameter that is missing, not its own, or out of range.
    """
    if not isinstance(divergence, str) or divergence not in DIVERGENCES:
        raise ValueError(f"{name}: divergence must be a callable or one of {[*DIVERGENCES]}, got {divergence!r}")
    wanted = DIVERGENCES[divergence].parameters
    for key, x in given.items():
        if x is not None and key not in wanted:
            has = f"only {', '.join(wanted)}" if wanted else "no parameter"
            raise ValueError(f"{name}: divergence {divergence!r} has {has}, got {key}={x!r}")
    values = []
    for key, parameter in wanted.items():
        x = given.get(key)
        x = parameter.default if x is None else x
        if not is_number(x) or not parameter.holds(x):
            raise ValueError(f"{name}: divergence {divergence!r} wants {key} in {parameter}, got {x!r}")
        values.append(float(x))
    return values
