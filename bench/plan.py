"""What is measured: shapes of real models, growth in N and V, and which providers take part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.providers import PROVIDERS
from rlad_kernels.tools.plan import loss_bytes

MODELS = {  # D, V
    "SmolLM2-135M": (576, 49_152),
    "Gemma-3-270M": (640, 262_144),
    "Qwen3-0.6B": (1024, 151_936),
    "Qwen3-1.7B": (2048, 151_936),
    "Qwen3-8B": (4096, 151_936),
    "Llama-3-8B": (4096, 128_256),
}
ODD = (768, 50_257)  # GPT-2's
REFERENCE = (1024, *MODELS["Qwen3-0.6B"])
TRADE = ("naive", "lce", "trl")
OURS = ("linear_logp", "fused")
MODES = ("kept", "half", "frozen", "sparse", "sparse_flat", "fused_sparse", "topk", "topk_kl", "divergence", "scoring")
GROWING = ("naive", *OURS)
FAMILIES = ("naive", *OURS, "topk_kl", "divergence")  # a provider a family of losses
GROWTH_V = 16_384
GPU_PEERS = ("naive", "compiled", "trl", "liger", "liger_jsd", "cce", "quack", "verl_triton")


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
    peaked: bool = False  # logits as peaked as a trained model's, for all


def _growth(dtype: str, d: int, tokens: tuple[int, ...], vocabularies: tuple[int, ...]) -> Iterator[Case]:
    for n in tokens:
        yield Case(n, d, GROWTH_V, dtype, GROWING, 2, "growth_n")
    for v in vocabularies:
        yield Case(1024, d, v, dtype, FAMILIES, 1, "growth_v")


def smoke(_: str) -> Iterator[Case]:
    """Does it run and is it right."""
    yield Case(128, 64, 8192, "float32", (*TRADE, *OURS, "topk", "topk_kl"), 1)


def quick(_: str) -> Iterator[Case]:
    """Ten minutes on two cores: the reference shape in both dtypes, growth in N, and of a family's memory in V."""
    yield Case(*REFERENCE, "float32", (*TRADE, *OURS, *MODES), 2)
    yield Case(*REFERENCE, "bfloat16", (*TRADE, *OURS, *MODES), 2)
    yield from _growth("float32", 256, (1024, 4096, 16_384), (GROWTH_V, 4 * GROWTH_V, 16 * GROWTH_V))


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


def gpu(device: str) -> Iterator[Case]:
    """All in one process, bfloat16, what matters most first; on a CPU the first at toy sizes, without what compiles for long."""
    large, vocab = MODELS["Qwen3-8B"], MODELS["Qwen3-8B"][1]
    core = (*OURS, "scoring", "topk", "naive", "trl")

    def case(n: int, d: int, v: int, *providers: str, peaked: bool = False) -> Case:
        if device == "cpu":
            n, d, v = max(16, n // 256), max(8, d // 64), v // 128
            providers = tuple(p for p in providers if p not in ("compiled", "liger_jsd"))
        return Case(n, d, v, "bfloat16", providers, 3 if n <= 8192 else 1, peaked=peaked)

    yield case(8192, *large, *OURS, *MODES, "naive", "trl")
    yield case(64, 256, vocab, *core)  # nothing to compute: launches
    yield case(262_144, 2048, vocab, "rlad")
    yield case(8192, *large, *OURS, "divergence", *GPU_PEERS)
    yield case(8192, *large, *core, peaked=True)
    if device == "cpu":
        return
    for n in (65_536, 1024, 64):
        yield case(n, *large, *core)
    others = [MODELS[name] for name in ("Gemma-3-270M", "Qwen3-0.6B", "SmolLM2-135M")]
    for n in (8192, 65_536, 1024, 64):
        for d, v in (*others, ODD):
            yield case(n, d, v, *OURS, *MODES, "naive", "trl")


def real(data: Path) -> Iterator[Case]:
    """Real hidden states, head and targets from a file, in both dtypes."""
    tensors = torch.load(data, mmap=True)
    (n, d), v = tensors["hidden"].shape, tensors["weight"].shape[0]
    for dtype in ("float32", "bfloat16"):
        yield Case(n, d, v, dtype, (*TRADE, *OURS, *MODES), 3, data=data.name)


PRESETS = {"smoke": smoke, "quick": quick, "full": full, "gpu": gpu}


def _free(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable"))


def groups(case: Case, names: list[str], device: str) -> list[list[str]]:
    """Those whose inputs fit into memory side by side, next to the one that computes."""
    size = 4 if case.dtype == "float32" else 2
    inputs = (case.n + case.v) * case.d * size
    computing = 3 * inputs + 5 * 4 * case.n * case.v + (1 << 30)
    fit = max(1, int((_free(device) * 0.9 - computing) // (inputs + 400_000_000)))
    return [names[i : i + fit] for i in range(0, len(names), fit)]


def too_large(case: Case, name: str, device: str) -> str | None:
    """Why one that holds all logits is not started."""
    if not PROVIDERS[name].logits:
        return None
    planned = loss_bytes("naive", case.n, case.d, case.v, dtype=getattr(torch, case.dtype), device=device)
    free = _free(device)
    return f"not started: {planned / 2**30:.1f} GiB planned, {free / 2**30:.1f} GiB free" if planned > free else None
