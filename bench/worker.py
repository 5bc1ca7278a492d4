"""One provider at one shape in a fresh process: gate, peak memory, times. Prints one JSON line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from bench.providers import PRODUCTS, Inputs, gate, step


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


def _timed(f: object, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()  # type: ignore[operator]
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bare_product(x: Inputs) -> None:
    """One N×D×V product by the library's own matrix multiply, in row chunks so that it needs no N×V buffer."""
    n = max(1, min(x.hidden.shape[0], (256 << 20) // (4 * x.weight.shape[0])))
    for r in range(0, x.hidden.shape[0], n):
        x.hidden.detach()[r : r + n] @ x.weight.detach().T


def measure(provider: str, n: int, d: int, v: int, dtype: str, device: str, rounds: int) -> dict[str, object]:
    kind = getattr(torch, dtype)
    errors = gate(provider, kind, device)
    x = Inputs.make(n, d, v, kind, device)
    step(provider, Inputs.make(8, d, 512, kind, device))  # threads, allocator, kernels: not part of the peak
    peak = Peak(device)
    warm = _timed(lambda: step(provider, x), device)
    gradients = sum(g.nbytes for g in (x.hidden.grad, x.weight.grad) if g is not None)
    extra = peak.bytes() - gradients
    times, bare = [], []
    for _ in range(rounds):
        bare.append(_timed(lambda: bare_product(x), device))
        times.append(_timed(lambda: step(provider, x), device))
    return {
        "provider": provider, "n": n, "d": d, "v": v, "dtype": dtype, "errors": errors, "extra_bytes": extra, "warm_s": warm,
        "times_s": times, "bare_product_s": bare, "products": PRODUCTS[provider], "flops_per_product": 2 * n * d * v,
        "logits_bytes": 4 * n * v,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
