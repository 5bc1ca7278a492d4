"""``pytest bench``: every provider under pytest-benchmark, at a tiny shape. For comparisons use ``python -m bench``."""

from __future__ import annotations

import pytest
import torch

from bench.gate import gate
from bench.inputs import Inputs
from bench.providers import PROVIDERS, absent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROVIDERS)
def test_speed(benchmark: pytest.FixtureRequest, name: str, dtype: torch.dtype) -> None:
    provider, device = PROVIDERS[name], "cuda" if torch.cuda.is_available() else "cpu"
    if why := absent(provider, device):
        pytest.skip(why)
    try:
        gate(provider, dtype, device)
    except (ImportError, ValueError) as why:
        pytest.skip(str(why))
    x = Inputs.make(128, 64, 4096, dtype, device, provider.peaked)

    def step() -> None:
        provider.step(x)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)  # type: ignore[attr-defined]
