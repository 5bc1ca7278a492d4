"""The one way a kernel is launched: counted, or recorded for the compile gate instead of run."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

INTERPRETED = (90, 3)  # the interpreter runs Hopper's configurations, on fewer programs than there are tiles

LAUNCHES: Counter[str] = Counter()  # kernel name → launches; tests read it to prove that a kernel ran
_recording: list["Launch"] | None = None
_recorded_for = 90


@dataclass(frozen=True)
class Config:
    """One row of a kernel's launch table: it serves sizes up to `limit`. Nothing is tuned at run time."""

    limit: float
    num_warps: int
    num_stages: int
    blocks: tuple[tuple[str, int], ...]


def config(limit: float, num_warps: int, num_stages: int = 1, **blocks: int) -> Config:
    """`num_stages` is 1 for a kernel that feeds no dot: there is nothing for the software pipeliner to overlap, and enough
    programs per SM are resident to hide the latency instead."""
    return Config(limit, num_warps, num_stages, tuple(blocks.items()))


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
def record(arch: int = 90) -> Iterator[list[Launch]]:
    """Collect launches as a device of `arch` would get them, instead of running them. Meta tensors suffice."""
    global _recording, _recorded_for
    outer = _recording, _recorded_for
    _recording, _recorded_for = [], arch
    try:
        yield _recording
    finally:
        _recording, _recorded_for = outer


def architecture(device: torch.device) -> int:
    """Compute capability × 10 of the device that a launch is for."""
    if _recording is not None:
        return _recorded_for
    if device.type != "cuda":
        return INTERPRETED[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """How many programs a persistent grid has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED[1]


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
        kernel[grid](*args, **flags, **dict(config.blocks), num_warps=config.num_warps, num_stages=config.num_stages)


def require_dtype(op: str, allowed: tuple[torch.dtype, ...] = (torch.float32,), **tensors: torch.Tensor | None) -> None:
    """TypeError naming the op and the argument for a dtype the kernels do not compute in (float64 above all)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(f"{op}: the Triton backend takes {name} in {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
