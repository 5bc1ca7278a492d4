"""Random calls: shapes, strides, dtypes, masks, options, and rubbish where nothing may look."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import rlad_kernels as rk
from tests.conftest import DEVICE, INTERPRET

DTYPES = (torch.float32, torch.bfloat16, torch.float16) + (() if INTERPRET or DEVICE != "cpu" else (torch.float64,))
LAYOUTS = ("plain", "plain", "offset", "padded", "transposed", "every_other", "expanded")
VALUES = ("normal", "normal", "flat", "peaked", "grid")
SPREAD = {"normal": 1.5, "flat": 0.01, "peaked": 6.0, "grid": 1.0}
SHAPES = ((), (0,), (1,), (2,), (5,), (9,), (2, 3), (3, 1, 2), (2, 0))
NAN = float("nan")


class Source:
    """Random tensors from a drawn seed, on the default device."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __repr__(self) -> str:
        return f"Source({self.seed})"

    def _here(self, x: Tensor) -> Tensor:
        return x.to(torch.get_default_device())

    def normal(self, *shape: int) -> Tensor:
        return self._here(torch.randn(shape, generator=self.generator, device="cpu"))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return self._here(torch.randint(low, max(high, low + 1), shape, generator=self.generator, device="cpu"))

    def chance(self, p: float, *shape: int) -> Tensor:
        return self._here(torch.rand(shape, generator=self.generator, device="cpu")) < p

    def values(self, kind: str, *shape: int) -> Tensor:
        return self.integers(-2, 3, *shape).float() if kind == "grid" else self.normal(*shape)


def along(rows: Tensor, x: Tensor) -> Tensor:
    """``rows (…)`` as wide as ``x (…, *)``."""
    return rows.reshape(*rows.shape, *[1] * (x.dim() - rows.dim())) if rows.dim() else rows


def laid(x: Tensor, layout: str) -> Tensor:
    """``x`` in another layout, NaN between its elements; "expanded" repeats its first row with a stride of 0."""
    if layout == "offset":
        return torch.cat([x.new_full((1,), NAN), x.flatten()])[1:].view(x.shape)
    if layout == "padded" and x.dim():
        return torch.cat([x.new_full((*x.shape[:-1], 1), NAN), x, x.new_full((*x.shape[:-1], 2), NAN)], -1)[..., 1:-2]
    if layout == "transposed" and x.dim() > 1:
        return x.mT.contiguous().mT
    if layout == "every_other" and x.dim() > 1:
        return torch.stack([x, torch.full_like(x, NAN)], 1).flatten(0, 1)[::2]
    if layout == "expanded" and x.dim() > 1 and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


@dataclass(repr=False)
class Case:
    """A call: its tensors as given, the rows that count, and its twin in float64 without the rubbish."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ids: Tensor
    mask: Tensor | None
    keep: Tensor  # bool
    source: Source
    kind: str
    options: dict[str, Any]
    tile: tuple[int | None, int | None]
    compaction: bool
    needs: tuple[bool, bool, bool] = field(default=(True, True, True))

    def __repr__(self) -> str:
        def told(x: Any) -> str:
            return f"{x.dtype} {tuple(x.shape)} strides {x.stride()}" if isinstance(x, Tensor) else repr(x)

        return "Case(" + ", ".join(f"{k}={told(v)}" for k, v in vars(self).items()) + ")"

    @property
    def head(self) -> rk.LMHead:
        return rk.LMHead(self.weight, self.bias, **self.options)

    @property
    def shape(self) -> torch.Size:
        return self.target.shape

    @property
    def vocab(self) -> int:
        return self.options["vocab_size"] or len(self.weight)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def poison(self, draw: Callable[..., Any]) -> Tensor:
        """One row that counts becomes NaN, or nearly so, and counts no longer; which it is, as a mask."""
        bad = torch.zeros_like(self.keep)
        if pick(draw, False, False, False, True) and self.compaction and self.keep.any() and 0 not in self.hidden.stride():
            bad[tuple(self.keep.nonzero()[0])] = True
            self.hidden.detach()[bad] = pick(draw, NAN, torch.inf)
            self.keep = self.keep & ~bad
        return bad

    def forbid_nothing(self) -> None:
        """Every id possible: no log-prob is −inf."""
        if self.bias is not None:
            bias = self.bias.detach()
            bias[bias == -torch.inf] = 0.5

    def world(self) -> ExitStack:
        """The process-wide switches of this case."""
        stack = ExitStack()
        stack.enter_context(rk.set_tile(*self.tile))
        stack.enter_context(rk.set_compaction(self.compaction))
        return stack

    def clean(self, x: Tensor, fill: float = 0) -> Tensor:
        """``x (…, *)`` with its rows that do not count replaced."""
        return torch.where(along(self.keep, x), x, fill)

    def spoiled(self, x: Tensor, rubbish: float = NAN) -> Tensor:
        """``x`` with rubbish in the rows that do not count, by mask."""
        masked = torch.zeros_like(self.keep) if self.mask is None else self.mask == 0
        return torch.where(along(masked, x), rubbish, x)


def _mask(source: Source, kind: str, shape: tuple[int, ...]) -> Tensor | None:
    if kind == "none":
        return None
    keep = source.chance(0.0 if kind == "nothing" else 0.7, *shape)
    return {"float": keep.float, "int": keep.long}.get(kind, keep.bool)()


def pick(draw: Callable[..., Any], *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


@st.composite
def cases(
    draw: Callable[..., Any], shapes: tuple[tuple[int, ...], ...] = SHAPES, vocab: int | None = None, like: Case | None = None
) -> Case:
    """Any call on ``shapes``; with ``like`` another head on the same tokens and the same vocabulary."""
    source = Source(draw(st.integers(0, 2**31)))
    dtype, kind = pick(draw, *DTYPES), pick(draw, *VALUES)
    shape, d = tuple(like.shape) if like else pick(draw, *shapes), pick(draw, 1, 2, 3, 8, 17, 40)
    size = like.vocab if like else vocab or pick(draw, 1, 2, 5, 16, 31, 64, 130)
    padding = pick(draw, 0, 0, 1, 3)
    mask = like.mask if like else _mask(source, pick(draw, "none", "bool", "float", "int", "nothing"), shape)
    target = source.integers(0, size, *shape).to(pick(draw, torch.int64, torch.int32))
    if pick(draw, False, True) and not like:
        target = torch.where(source.chance(0.2, *shape), -100, target)
    keep = like.keep if like else (target != -100) & (torch.ones_like(target) if mask is None else mask != 0).bool()
    k = min(pick(draw, 1, 2, 5, 40), size)
    ids = source.integers(-1, size, *shape, k).to(pick(draw, torch.int64, torch.int32))
    hidden = source.values(kind, *shape, d).to(dtype)
    weight = source.values(kind, size + padding, d) * SPREAD[kind] / (1 if kind == "grid" else d**0.5)
    bias = source.values(kind, size + padding) if pick(draw, False, True) else None
    scale = pick(draw, 1.0, 0.25, -1.5)
    if bias is not None and scale > 0 and size > 2 and pick(draw, False, False, True):
        bias[source.integers(0, size, 2)] = -torch.inf  # ids that are forbidden
    temperature = pick(draw, 1.0, 0.5, 2.0, "rows", "one")
    case = Case(
        hidden, weight.to(dtype), None if bias is None else bias.to(dtype), target, ids, mask, keep, source, kind,
        {"logit_scale": scale, "softcap": pick(draw, None, None, 5.0, 30.0), "temperature": temperature,
         "vocab_size": pick(draw, size, size if padding else None)},
        (pick(draw, None, 1, 2, 7), pick(draw, None, 1 if size <= 16 else 7, 7, 16)), pick(draw, True, True, False),
    )  # fmt: skip
    if temperature == "rows":
        case.options["temperature"] = 0.5 + source.normal(*shape).abs()
    elif temperature == "one":
        case.options["temperature"] = torch.tensor(0.8)
    layout = pick(draw, *LAYOUTS), pick(draw, *LAYOUTS)
    if pick(draw, False, True):
        _spoil(case, padding)
    case.hidden, case.weight = (laid(x, how) for x, how in zip((case.hidden, case.weight), layout, strict=True))
    if layout[0] == "expanded":
        case.hidden = case.hidden if case.hidden[:1].isfinite().all() else laid(torch.ones_like(case.hidden), "expanded")
    case.needs = pick(draw, (True, True, True), (True, True, True), (True, False, False), (False, True, True), (True, True, False))
    for x, need in zip((case.hidden, case.weight, case.bias), case.needs, strict=True):
        if x is not None:
            x.requires_grad_(need)
    return case


def _spoil(case: Case, padding: int) -> None:
    """Rubbish at the rows that the mask leaves out, and in the head's rows beyond the vocabulary."""
    if padding and case.options["vocab_size"]:
        case.weight[-padding:] = NAN
        if case.bias is not None:
            case.bias[-padding:] = NAN
    case.hidden = case.spoiled(case.hidden)
    if case.mask is not None:
        case.target = torch.where(case.mask != 0, case.target, 1 << 20)
        case.ids = torch.where((case.mask != 0).unsqueeze(-1), case.ids, -7)
    if isinstance(case.options["temperature"], Tensor) and case.options["temperature"].shape == case.shape:
        case.options["temperature"] = case.spoiled(case.options["temperature"], -1.0)
