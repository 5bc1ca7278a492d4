"""What is known of a kernel beside its code: its launch table, the limits it is held to, and what the compile gate compiles of it.

A kernel's own file says all of it with :func:`add_kernel`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isinf
from typing import Any

import torch

from ._launch import Config, Launch, record

# 16 bytes a thread for float32, and for the 16-bit types wherever eight neighbours belong to one thread
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v4\.b32", r"st\.global\S*\.v4\.b32"

HALVES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of hidden states and heads
R, C, V, D, J = 1024, 8192, 151936, 4096, 64  # sizes of a real sweep: what matters is which are divisible by 16


@dataclass(frozen=True)
class Case:
    """One call of a launcher on meta tensors; `wide` says whether they allow 16-byte accesses."""

    label: str
    launcher: Callable[..., Any]
    args: tuple[Any, ...]
    wide: bool = True

    def launch(self) -> Launch:
        """The one launch this call makes."""
        with record() as launches:
            self.launcher(*self.args)
        (only,) = launches
        return only


@dataclass(frozen=True)
class Kernel:
    """A kernel, the public launcher that runs it, its table, its cases, and what their machine code is held to."""

    fn: Any
    launcher: Callable[..., Any]
    table: tuple[Config, ...]
    cases: Callable[[], Iterator[Case]]
    max_registers: int  # of a thread
    wide: tuple[str, ...] = ()  # regular expressions of PTX accesses it must contain
    tempers: bool = False  # it makes z of raw logits, whose last product must be rounded before it is used


KERNELS: dict[str, Kernel] = {}


def add_kernel(
    fn: Any, launcher: Callable[..., Any], table: tuple[Config, ...], cases: Callable[[], Iterator[Case]], **limits: Any
) -> None:
    """Make a kernel known to its op, to the tests that count launches, and to the compile gate."""
    KERNELS[fn.__name__] = Kernel(fn, launcher, table, cases, **limits)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def sizes(table: Sequence[Config], large: int) -> list[int]:
    """One size per row of the table: its limit, or `large` for the unlimited row."""
    return [large if isinf(row.limit) else int(row.limit) for row in table]


def flag_sets(*names: str, single: bool = False) -> list[frozenset[str]]:
    """No flag and every flag, and if `single` each alone: the full product would only repeat the same branches."""
    alone = [frozenset([name]) for name in names] if single else []
    return [frozenset(), *alone, frozenset(names)]


def tiles(table: Sequence[Config]) -> list[torch.Tensor]:
    """A tile for each row of the table, one whose last column is cut off (odd vocabularies), and one of a single column."""
    whole = [meta(R, cols) for cols in sizes(table, C)]
    return [*whole, whole[-1][:, :-1], meta(R, 1)]


def tempering(flags: frozenset[str], cols: int) -> tuple[Any, ...]:
    """Bias, inverse temperature, scale and softcap, as far as the flags have them."""
    return meta(cols) if "bias" in flags else None, meta(R), 1.0, 30.0 if "softcap" in flags else 0.0
