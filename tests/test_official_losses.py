"""Our methods against the loss functions of TRL, OpenRLHF and verl that describe the same method: values and gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.official import SEEDS, compare, openrlhf, runs, trl, verl
from tests.trl_runs import needs_trl

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.cpu


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs in float64 also where it says ``.float()``: how it rounds is not what is compared."""
    float32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else float32(x))


@pytest.mark.usefixtures("doubled")
@pytest.mark.skipif(openrlhf.MISSING, reason="openrlhf is not installed: see the Makefile")
@pytest.mark.parametrize(("name", "dtype"), runs(openrlhf.CASES))
def test_openrlhf(name: str, dtype: torch.dtype) -> None:
    assert sum(compare(openrlhf.CASES[name], seed, dtype) for seed in SEEDS)


@needs_trl
@pytest.mark.parametrize(("name", "dtype"), runs(trl.CASES))
def test_trl(name: str, dtype: torch.dtype) -> None:
    assert sum(compare(trl.CASES[name], seed, dtype) for seed in SEEDS)


@cache
def failed_with_verl() -> dict[str, str]:
    """The tracebacks of a process with verl, by case and dtype."""
    done = subprocess.run([sys.executable, "-m", "tests.official.verl"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(verl.MISSING, reason="verl is not installed: see the Makefile")
@pytest.mark.parametrize(("name", "dtype"), runs(verl.CASES))
def test_verl(name: str, dtype: torch.dtype) -> None:
    failed = failed_with_verl().get(f"{name}, {dtype}")
    assert failed is None, failed


def test_nemo_rl() -> None:
    """Of ``nemo_rl_mixed`` and ``nemo_rl_zero_outside`` only the formulas were read: there is no release to compare with."""
    pytest.skip("the registry's nemo-rl is 0.0.0, a placeholder without a loss")
