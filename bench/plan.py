"""What is measured: shapes of real models, growth in N and V, and which providers take part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.providers import PROVIDERS

MODELS = {  # D, V
    "SmolLM2-135M": (576, 49_152),
    "Gemma-3-270M": (640, 262_144),
    "Qwen3-0.6B": (1024, 151_936),
    "Qwen3-1.7B": (2048, 151_936),
    "Qwen3-8B": (4096, 151_936),
    "Llama-3-8B": (4096, 128_256),
}
REFERENCE = (1024, *MODELS["Qwen3-0.6B"])
TRADE = ("naive", "lce", "trl")
OURS = ("linear_logp", "fused")
MODES = ("half", "frozen", "sparse", "fused_sparse", "topk", "topk_kl", "divergence", "scoring")
GROWING = ("naive", *OURS)
GROWTH_V = 16_384


@dataclass(frozen=True)
class Case:
    """One shape and dtype, and those who are measured together at it."""

    n: int
    d: int
    v: int
    dtype: str
    providers: tuple[str, ...]
    rounds: int
    figure: str = "speed"  # or growth_n, growth_v: where the report shows it
    data: str = ""  # the name of a file of real hidden states


def _growth(dtype: str, d: int, tokens: tuple[int, ...], vocabularies: tuple[int, ...] = ()) -> Iterator[Case]:
    for n in tokens:
        yield Case(n, d, GROWTH_V, dtype, GROWING, 2, "growth_n")
    for v in vocabularies:
        yield Case(1024, d, v, dtype, GROWING, 2, "growth_v")


def smoke(_: str) -> Iterator[Case]:
    """Does it run and is it right."""
    yield Case(128, 64, 8192, "float32", (*TRADE, *OURS, "topk", "topk_kl"), 1)


def quick(device: str) -> Iterator[Case]:
    """Ten minutes on two cores: the reference shape in both dtypes, and growth in N."""
    if device == "cuda":
        for n, model in ((8192, "Qwen3-8B"), (8192, "Qwen3-0.6B")):
            yield Case(n, *MODELS[model], "bfloat16", tuple(PROVIDERS), 5)
        yield from _growth("bfloat16", 1024, (1024, 4096, 16_384))
        return
    yield Case(*REFERENCE, "float32", (*TRADE, *OURS, *MODES), 2)
    yield Case(*REFERENCE, "bfloat16", (*TRADE, *OURS, *MODES), 2)
    yield from _growth("float32", 256, (1024, 4096, 16_384))


def full(device: str) -> Iterator[Case]:
    """Everybody, at the shape of every model, and growth in N and V."""
    cuda = device == "cuda"
    n = 8192 if cuda else 1024
    dtypes = ("bfloat16",) if cuda else ("float32", "bfloat16")
    for d, v in MODELS.values():
        for dtype in dtypes:
            yield Case(n, d, v, dtype, tuple(PROVIDERS), 5 if cuda else 3)
    for dtype in dtypes:
        yield from _growth(dtype, 1024, tuple(1024 << i for i in range(5)), tuple(GROWTH_V << i for i in range(5)))


def real(data: Path) -> Iterator[Case]:
    """Real hidden states, head and targets from a file, in both dtypes."""
    tensors = torch.load(data, mmap=True)
    (n, d), v = tensors["hidden"].shape, tensors["weight"].shape[0]
    for dtype in ("float32", "bfloat16"):
        yield Case(n, d, v, dtype, (*TRADE, *OURS, *MODES), 3, data=data.name)


PRESETS = {"smoke": smoke, "quick": quick, "full": full}


def groups(case: Case, names: list[str], device: str) -> list[list[str]]:
    """Those whose inputs fit into memory side by side, next to the one that computes."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = next(
            int(s.split()[1]) * 1024 for s in Path("/proc/meminfo").read_text().splitlines() if s.startswith("MemAvailable")
        )
    size = 4 if case.dtype == "float32" else 2
    inputs = (case.n + case.v) * case.d * size
    computing = 3 * inputs + 5 * 4 * case.n * case.v + (1 << 30)
    fit = max(1, int((free * 0.9 - computing) // (inputs + 400_000_000)))
    return [names[i : i + fit] for i in range(0, len(names), fit)]
