"""What rounding can do to a formula: evaluated in float64 with every operation off by half an ulp of float32.

A float32 run of a formula has one rounding error, another CPU's run another. Here each operation is given a relative error of
``U`` (half an ulp of 1, the most that a correctly rounded operation makes) of either sign, and each sum one of its terms'
magnitudes; the largest of a few such runs is what any order of the same operations may be off by. It knows where a difference
cancels, because the errors of both sides reach it, and it is the same number on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EPS = 2.0**-23
U = EPS / 2
TRIALS = 8
MARGIN = 2  # times the largest trial: a library rounds at other places than the oracle, and functions to two ulps, not half a one

aten = torch.ops.aten
_coins = torch.randint(0, 2, (1 << 16,), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
ERRORS = U * (2.0 * _coins.double() - 1)
EXACT = {
    "abs", "neg", "sign", "sgn", "where", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "amax", "amin", "max",
    "min", "relu", "sort", "topk", "nan_to_num", "copy_", "_to_copy", "clone", "lift_fresh", "_unsafe_view", "cat", "stack",
    "roll", "flip", "repeat", "gather", "index", "index_select", "scatter", "masked_fill", "masked_fill_", "fill_", "zero_",
    "select_backward", "slice_backward", "value_selecting_reduction_backward", "zeros", "ones", "full", "zeros_like",
    "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "scalar_tensor", "arange",
}  # fmt: skip


def _factor(terms: int) -> float:
    """How many ``U`` of Σ|terms| a sum may be off by: sums of many terms are made in blocks."""
    return 0.0 if terms <= 1 else (1 + math.log2(terms)) / 2


def _count(x: Tensor, dim: Any) -> int:
    dims = range(x.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return math.prod(x.shape[i] for i in dims) if x.ndim else 1


class Roundings(TorchDispatchMode):
    """Every float64 operation off by ``U`` times a sign from a table, so that a run is the same whenever it is repeated."""

    def __init__(self, trial: int) -> None:
        super().__init__()
        self.at = 7919 * trial + 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled; being skipped costs as much as the mode itself

    def errors(self, x: Tensor) -> Tensor:
        """``U`` times a sign for each element."""
        n, at = x.numel(), self.at % ERRORS.numel()
        self.at += n + 1
        drawn = ERRORS if at + n <= ERRORS.numel() else ERRORS.repeat(2 + n // ERRORS.numel())
        return drawn[at : at + n].view(x.shape).to(x.device)

    def off(self, y: Tensor, size: Tensor | None = None) -> Tensor:
        """``y`` with an error of ``U``·``size``, by default of its own size."""
        return y + (y if size is None else size).nan_to_num(0.0, 0.0, 0.0) * self.errors(y)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        rule = getattr(self, "_" + name.strip("_"), None)
        if rule is not None and args[0].dtype == torch.float64:
            return rule(*args, **kwargs)
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or out.dtype != torch.float64 or func.is_view or name in EXACT:
            return out
        if out is args[0]:
            return out.copy_(self.off(out))
        sizes = [x.numel() for x in args if isinstance(x, Tensor)]
        assert not sizes or out.numel() >= max(sizes), f"no rule for the roundings of {func}"
        return self.off(out)

    def _sum(self, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
        y, size = (aten.sum.dim_IntList(t, dim, keepdim) for t in (x, x.abs()))
        return self.off(y, _factor(_count(x, dim)) * size)

    def _mean(self, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
        return self.off(self._sum(x, dim, keepdim) / _count(x, dim))

    def _cumsum(self, x: Tensor, dim: int) -> Tensor:
        return self.off(x.cumsum(dim), _factor(x.shape[dim]) * x.abs().cumsum(dim))

    def _exp(self, x: Tensor) -> Tensor:
        """2^(x·log2 e): an error of |x| half ulps besides its own."""
        y = x.exp()
        return self.off(y, y * (1 + x.abs()))

    def _parts(self, x: Tensor, dim: Any) -> tuple[Tensor, Tensor]:
        """The largest element and log Σ exp(x − largest)."""
        top = x.amax(dim, True).nan_to_num(0.0, 0.0, 0.0)
        return top, self.off(self._sum(self._exp(self.off(x - top)), dim, True).log())

    def _logsumexp(self, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
        lse = self.off(torch.add(*self._parts(x, dim)))
        return lse if keepdim else lse.squeeze(dim)

    def _log_softmax(self, x: Tensor, dim: int, half: bool) -> Tensor:
        top, rest = self._parts(x, [dim])
        return self.off(self.off(x - top) - rest)

    def _softmax(self, x: Tensor, dim: int, half: bool) -> Tensor:
        return self._exp(self._log_softmax(x, dim, half))

    def _log_softmax_backward_data(self, g: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return self.off(g - self.off(self._exp(y) * self._sum(g, [dim], True)))

    def _softmax_backward_data(self, g: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return self.off(y * self.off(g - self._sum(self.off(g * y), [dim], True)))

    def _mm(self, a: Tensor, b: Tensor) -> Tensor:
        return self.off(a @ b, _factor(2 * a.shape[-1]) * (a.abs() @ b.abs()))

    _bmm = _mv = _dot = _mm

    def _addmm(self, c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return self.off(beta * c + alpha * self._mm(a, b))


def spread(
    formula: Callable[[], Tensor | Sequence[Tensor]], eps: float = EPS, trials: int = TRIALS
) -> tuple[list[Tensor], list[float]]:
    """The tensors that ``formula`` gives in float64, and how far rounding to ``eps`` may take the worst element of each."""

    def run() -> list[Tensor]:
        out = formula()
        return [x.detach() for x in ([out] if isinstance(out, Tensor) else out)]

    exact, worst = run(), None
    for trial in range(trials):
        with Roundings(trial):
            found = run()
        off = [largest(a - b) for a, b in zip(found, exact, strict=True)]
        worst = off if worst is None else [max(pair) for pair in zip(worst, off, strict=True)]
    return exact, [MARGIN * w * eps / EPS for w in worst or []]


def largest(x: Tensor) -> float:
    """Of the finite ones: equal infinities have no distance."""
    return x.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if x.numel() else 0.0
