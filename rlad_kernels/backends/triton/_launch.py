"""The one way a kernel is launched: counted, or recorded for the compile gate instead of run."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

INTERPRETED = 3  # programs of a persistent grid in the interpreter: fewer than there are tiles

LAUNCHES: Counter[str] = Counter()  # kernel name → launches; tests read it to prove that a kernel ran
_recording: list["Launch"] | None = None


@dataclass(frozen=True)
class Config:
    """One row of a kernel's launch table: it serves sizes up to `limit`. Nothing is tuned at run time."""

    limit: float
    num_warps: int
    blocks: tuple[tuple[str, int], ...]


def config(limit: float, num_warps: int, **blocks: int) -> Config:
    return Config(limit, num_warps, tuple(blocks.items()))


def pick(table: tuple[Config, ...], size: int) -> Config:
    """The first row of the table that serves `size`."""
    for row in table:
        if size <= row.limit:
            return row
    raise ValueError(f"no launch configuration for size {size}, the largest is {table[-1].limit}")


@dataclass(frozen=True)
class Launch:
    """One launch as it would have happened: arguments in the kernel's order, flags by name."""

    kernel: Any
    config: Config
    args: tuple[Any, ...]
    flags: dict[str, Any]


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of running them. Meta tensors suffice."""
    global _recording
    outer, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = outer


def multiprocessors(device: torch.device) -> int:
    """How many programs a persistent grid has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED


def options(config: Config) -> dict[str, int]:
    """What the compiler is told. One stage: no kernel feeds a dot, so there is nothing for the software pipeliner to overlap, and
    enough programs per SM are resident to hide the latency instead."""
    return {"num_warps": config.num_warps, "num_stages": 1}


def launch(kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, **flags: Any) -> None:
    """Run `kernel` over `grid` with the block sizes, warps and stages of `config`. An empty grid is no launch."""
    if 0 in grid:
        return
    if _recording is not None:
        _recording.append(Launch(kernel, config, args, flags))
        return
    LAUNCHES[kernel.__name__] += 1
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    # Triton launches on the current device, which need not be the one that holds the tensors
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **flags, **dict(config.blocks), **options(config))


def require_dtype(op: str, allowed: tuple[torch.dtype, ...] = (torch.float32,), **tensors: torch.Tensor | None) -> None:
    """TypeError naming the op and the argument for a dtype the kernels do not compute in (float64 above all)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(f"{op}: the Triton backend takes {name} in {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
