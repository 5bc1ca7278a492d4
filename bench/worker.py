"""One provider at one shape in a process of its own: gate, peak memory, times.

With a JSON case as its argument it runs the whole case and prints one JSON line. Without, it takes commands from the driver,
a line each: a case, then ``prepare``, ``warm`` and any number of ``round``s.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from bench.bare import bare_products
from bench.gate import Wrong, gate
from bench.inputs import Inputs
from bench.providers import PROVIDERS

BARE = "bare"
_inputs = lru_cache(2)(Inputs.make)  # workers in one process share the tensors that a process each would have made alike
_gate = cache(lambda provider, dtype, device: gate(PROVIDERS[provider], dtype, device))


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


class Peak:
    """Bytes above what is held now: the allocator's high-water mark on CUDA, the process's on CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.before = _status("VmRSS")

    def bytes(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")) - self.before


class Worker:
    """The commands, in the order in which the driver gives them."""

    def __init__(
        self, provider: str, n: int, d: int, v: int, dtype: str, device: str, data: str | None = None, peaked: bool = False
    ) -> None:
        self.provider = None if provider == BARE else PROVIDERS[provider]
        self.shape, self.dtype, self.device = (n, d, v), getattr(torch, dtype), device
        self.data, self.peaked = data, peaked or (self.provider is not None and self.provider.peaked)

    def prepare(self) -> dict[str, Any]:
        """The gate, then another small shape: threads, kernels and dynamic compilation are not part of the peak."""
        if self.provider is None:
            return {}
        errors = _gate(self.provider.name, self.dtype, self.device)
        self.provider.step(Inputs.make(32, self.shape[1], 512, self.dtype, self.device, self.provider.peaked))
        return {"errors": errors}

    def warm(self) -> dict[str, Any]:
        """The inputs, then the first step at the full shape: the one whose memory counts."""
        self.x = _inputs(*self.shape, self.dtype, self.device, self.peaked, self.data)
        if self.provider is None:
            self.steps = bare_products(self.x)
            return {"warm_s": [self._time(f) for f in self.steps]}
        provider = self.provider
        self.steps = [lambda: provider.step(self.x)]
        peak = Peak(self.device)
        warm = self._time(self.steps[0])
        gradients = sum(g.nbytes for g in (self.x.hidden.grad, self.x.weight.grad) if g is not None)
        extra = peak.bytes() - gradients
        self._rest()
        return {"warm_s": warm, "extra_bytes": extra}

    def round(self) -> list[float]:
        """Seconds of each step; on CUDA the median of three after one that wakes the clocks."""
        times = []
        for f in self.steps:
            repeats = [self._time(f) for _ in range(4 if self.device == "cuda" else 1)]
            times.append(statistics.median(repeats[1:] or repeats))
        self._rest()
        return times

    def close(self) -> None:
        """Let go of the inputs, in a process that goes on."""
        self.__dict__.pop("x", None)
        self.__dict__.pop("steps", None)

    def _time(self, f: Callable[[], object]) -> float:
        cuda = self.device == "cuda"
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _rest(self) -> None:
        """Hold no more than the inputs while others are measured."""
        self.x.hidden.grad = self.x.weight.grad = None
        if self.device == "cuda":
            torch.cuda.empty_cache()


def whole(case: dict[str, Any]) -> dict[str, Any]:
    """One case from start to end, alone on the machine."""
    rounds = case.pop("rounds", 0)
    worker = Worker(**case)
    row = {**case, **worker.prepare(), **worker.warm()}
    return {**row, "times_s": [worker.round()[0] for _ in range(rounds)]}


def answer(worker: Worker, command: str) -> dict[str, Any]:
    """What a command came to: its value, or why there is none."""
    try:
        return {"value": getattr(worker, command)()}
    except Wrong as wrong:
        return {"wrong": str(wrong)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def serve() -> None:
    """Answer the driver. A framework may print: only answers go to the real stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=out, flush=True)

    worker = Worker(**json.loads(input()))
    say({"ready": True})
    for line in sys.stdin:
        say(answer(worker, line.strip()))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(whole(json.loads(sys.argv[1]))))
    else:
        serve()
