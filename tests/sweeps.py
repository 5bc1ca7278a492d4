"""Random problems for the sweep tests, and their float64 twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.backends import reference

EPS32 = 2.0**-23


@dataclass
class Problem:
    """Hidden states, a head and targets; ``oracle`` holds float64 twins of the tensors that take gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ids: Tensor
    mask: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def head(self) -> rk.LMHead:
        return rk.LMHead(self.weight, self.bias, **self.options)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def twin(self, dtype: torch.dtype = torch.float64) -> Problem:
        """The same problem in another dtype, for the reference, NaN at masked rows removed."""
        hidden = self.hidden.detach()
        if self.mask is not None:
            hidden = torch.where((self.mask != 0).unsqueeze(-1), hidden, 0)
        bias = None if self.bias is None else leaf(self.bias.to(dtype))
        return Problem(leaf(hidden.to(dtype)), leaf(self.weight.to(dtype)), bias, self.target, self.ids, self.mask, self.options)

    def logits(self) -> Tensor:
        temperature = self.options.get("temperature", 1.0)
        if isinstance(temperature, Tensor):
            temperature = (1 / (1 / temperature)).to(self.hidden.dtype)  # the library multiplies by the float32 inverse
        return reference.logits(self.hidden, self.weight, self.bias, **{**self.options, "temperature": temperature})

    def expected(self) -> reference.Scores:
        return reference.token_scores(self.logits(), self.target, self.ids, self.mask)


@dataclass(frozen=True, kw_only=True)
class Own(rk.TokenLoss):
    """A loss of one formula on the scores that it names, times ``w`` where that is given."""

    value: Callable[[rk.TokenScores], Tensor] = field(kw_only=False)
    scores: tuple[str, ...] = ("logp",)

    takes = ("w", "teacher")

    def read(self) -> tuple[str, ...]:
        return self.scores

    def tokens(self, scores: rk.TokenScores, *, w: Tensor | None = None, teacher: rk.TopK | None = None) -> tuple[Tensor, Any]:
        loss = self.value(scores)
        return loss if w is None else w * loss, {}


def support(ids: Tensor) -> rk.TopK:
    """A teacher that only says which ids to read."""
    return rk.TopK(ids, torch.zeros_like(ids, dtype=torch.float32))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def problem(
    n: int = 13, d: int = 16, v: int = 101, k: int = 5, *, dtype: torch.dtype = torch.float32, bias: bool = True,
    sigma: float = 3.0, shape: tuple[int, ...] | None = None, **options: Any,
) -> Problem:  # fmt: skip
    """Logits of standard deviation ``sigma``; ids within ``vocab_size``."""
    shape = shape or (n,)
    real = options.get("vocab_size", v)
    return Problem(
        leaf(torch.randn(*shape, d).to(dtype)), leaf((torch.randn(v, d) * sigma / d**0.5).to(dtype)),
        leaf(torch.randn(v).to(dtype)) if bias else None, torch.randint(0, real, shape), torch.randint(0, real, (*shape, k)),
        options=options,
    )  # fmt: skip


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖_F / ‖expected‖_F in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def weighted_sum(scores: tuple[Tensor, ...], cotangents: list[Tensor]) -> Tensor:
    """Σ cotangent·output over finite outputs, a scalar to send back."""
    total = torch.zeros((), dtype=scores[0].dtype)
    for x, c in zip(scores, cotangents, strict=True):
        finite = x.isfinite()
        total = total + (torch.where(finite, x, 0) * torch.where(finite, c.to(x.dtype), 0)).sum()
    return total


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors of a result, in order: of a tensor, a NamedTuple or a dict."""
    if isinstance(x, Tensor):
        return [x]
    parts = list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, tuple) else []
    return [t for part in parts for t in tensors_of(part)]
