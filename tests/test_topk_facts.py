"""The facts of examples/facts_topk.py hold."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FACTS = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "facts_topk.py"))


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["lsm_drift", "expected_gradients", "eopd_toy"])
def test_facts(name: str):
    for fact in FACTS[name](**({"rates": (0.3,), "steps": 300} if name == "eopd_toy" else {})):
        assert fact.holds, fact
