"""Times of candidates asked in turn, so that clocks and neighbours hit all alike; CUDA events where there are any."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def in_turn(
    candidates: Sequence[Callable[[], object]], device: str, rounds: int, reset: Callable[[], object] | None = None
) -> list[float]:
    """Median seconds of each. With ``reset``, done before each, the device waits for the host: launches are not timed."""

    def once(f: Callable[[], object]) -> float:
        if reset:
            reset()
        if device != "cuda":
            start = time.perf_counter()
            f()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if reset:
            torch.cuda._sleep(500_000)
        begin.record()
        f()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    times = [[once(f) for f in candidates] for _ in range(rounds + 1)]
    return [statistics.median(t[1:]) for t in zip(*times, strict=True)]


def copy_rate(device: str) -> float:
    """Bytes a second of a copy on the device, read and written."""
    source = torch.ones(1 << (30 if device == "cuda" else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / in_turn([lambda: target.copy_(source)], device, 7)[0]
