"""Candidates for a kernel's launch row: what the library gives the kernel, rows around today's, and whether they do the same."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.inputs import Inputs
from bench.providers import PROVIDERS
from rlad_kernels.backends import triton as kernels
from rlad_kernels.backends.triton._kernel import Kernel
from rlad_kernels.backends.triton._launch import Config, config, options, record

Shape = tuple[int, int, int]  # N, D, V
CALLS = ("linear_logp", "topk", "divergence", "rlad", "topk_kl", "sparse")  # providers that together launch every kernel
SIZES = ("BLOCK", "LANES", "POOL")  # a row's blocks that may be halved and doubled: all but switches
SAME = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}  # of an output's norm; integers are equal


def twins(args: Sequence[Any]) -> list[Any]:
    """Copies with the same strides; arguments that are one tensor stay one."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def twin(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
        if key not in made:
            dense = 0 not in x.stride()
            made[key] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) if dense else x.clone()
        return made[key]

    return [twin(x) for x in args]


class Call:
    """A launcher's arguments in one of the library's own calls, and the same again before each of ours."""

    def __init__(self, name: str, args: Sequence[Any]) -> None:
        schema = getattr(torch.ops.rlad, name).default._schema.arguments[: len(args)]  # those after them keep their defaults
        self.launcher, self.given, self.args = kernels.LAUNCHERS[name], twins(args), twins(args)
        self.names = [a.name for a in schema]
        self.written = [i for i, a in enumerate(schema) if a.alias_info and a.alias_info.is_write and args[i] is not None]
        self.device = next(x.device for x in args if isinstance(x, Tensor))

    def reset(self) -> None:
        for i in self.written:
            self.args[i].copy_(self.given[i])

    def run(self) -> Any:
        return self.launcher(*self.args)

    def outputs(self) -> list[Tensor]:
        """All that it writes and returns."""
        self.reset()
        result = self.run()
        returned = result if isinstance(result, (tuple, list)) else [result]
        return [self.args[i].clone() for i in self.written] + [x for x in returned if isinstance(x, Tensor)]

    def bytes(self) -> int:
        """Each tensor once; of a weight whose rows are gathered, those rows."""
        tensors = {x.data_ptr(): (name, x) for name, x in zip(self.names, self.args, strict=True) if isinstance(x, Tensor)}
        places = next((x.numel() for name, x in tensors.values() if name in ("ids", "sorted_ids")), None)
        total = 0
        for name, x in tensors.values():
            row = x.shape[-1] * x.element_size() if x.dim() else 0
            total += min(x.nbytes, places * row) if places and name in ("weight", "d_weight") else x.nbytes
        return total + sum(x.nbytes for x in self.outputs()[len(self.written) :])


@lru_cache(1)
def calls(shape: Shape, device: str) -> dict[str, Call]:
    """The largest call of each launcher, by its name, as the library makes it at this shape."""
    found: dict[str, Call] = {}
    size: dict[str, int] = {}
    originals = dict(kernels.LAUNCHERS)

    def spy(name: str, *args: Any) -> Any:
        here = sum(x.nbytes for x in args if isinstance(x, Tensor))
        if here > size.get(name, 0):
            kernels.LAUNCHERS[name] = originals[name]
            size[name], found[name] = here, Call(name, args)
            kernels.LAUNCHERS[name] = partial(spy, name)
        return originals[name](*args)

    kernels.LAUNCHERS.update({name: partial(spy, name) for name in originals})
    try:
        for name in CALLS:
            PROVIDERS[name].step(inputs(shape, device, PROVIDERS[name].peaked))
    finally:
        kernels.LAUNCHERS.update(originals)
    return found


@lru_cache(2)
def inputs(shape: Shape, device: str, peaked: bool = False) -> Inputs:
    return Inputs.make(*shape, torch.bfloat16, device, peaked)


def neighbours(row: Config) -> list[Config]:
    """The row, and those around it: one block halved or doubled, half or twice the warps."""
    blocks = dict(row.blocks)
    threads = {"LANES"} if blocks.get("LANES") == 32 * row.num_warps else set()  # it goes with the warps
    shapes = [blocks]
    for name, size in blocks.items():
        if name.startswith(SIZES) and size != row.limit and name not in threads:  # one that is the limit holds a whole row
            shapes += [{**blocks, name: other} for other in (size // 2, size * 2) if other]
    warps = [w for w in (row.num_warps, row.num_warps // 2, row.num_warps * 2) if 1 <= w <= 32]
    return [config(row.limit, w, **b | dict.fromkeys(threads, 32 * w)) for b in shapes for w in warps]


def source(row: Config) -> str:
    """The row as the kernel's file has it."""
    limit = "inf" if math.isinf(row.limit) else f"{row.limit:g}"
    return f"config({', '.join([limit, str(row.num_warps), *(f'{k}={v}' for k, v in row.blocks)])})"


@contextmanager
def launched_with(kernel: Kernel, row: Config) -> Iterator[None]:
    """The kernel's table has this row only."""
    module = vars(sys.modules[kernel.launcher.__module__])
    names = [name for name, value in module.items() if value is kernel.table]
    module.update(dict.fromkeys(names, (replace(row, limit=math.inf),)))
    try:
        yield
    finally:
        module.update(dict.fromkeys(names, kernel.table))


def compile_together(kernel: Kernel, call: Call, rows: Sequence[Config]) -> None:
    """Fill Triton's cache from several threads; what does not compile says so when it is launched."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, ExitStack() as stack:
        try:
            mode = importlib.import_module("triton.runtime._async_compile").AsyncCompileMode
            stack.enter_context(mode(pool, ignore_errors=True))
        except (ImportError, AttributeError, TypeError):  # a Triton without it: each is compiled when it is first launched
            return
        for row in rows:
            with launched_with(kernel, row), record() as launches, suppress(Exception):
                call.run()
            for one in launches:
                with suppress(Exception):
                    one.kernel.warmup(*one.args, grid=(1,), **one.flags, **dict(one.config.blocks), **options(one.config))


def difference(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest distance, relative to the norm, over its dtype's bound: at most 1 is the same; 0 is bitwise."""
    worst = 0.0
    for a, b in zip(mine, theirs, strict=True):
        bound = SAME.get(a.dtype, 1e-30)
        if a.shape != b.shape or not all(torch.equal(f(a), f(b)) for f in (torch.isnan, torch.isposinf, torch.isneginf)):
            return math.inf
        a, b = (x.double().nan_to_num(nan=0, posinf=0, neginf=0) for x in (a, b))
        if not torch.equal(a, b):
            worst = max(worst, ((a - b).norm() / b.norm().clamp_min(1e-30)).item() / bound)
    return worst
