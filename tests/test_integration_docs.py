"""The Python in the pages about trainers runs as printed, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.test_docs import ON_TINY_MODELS, ROOT, blocks
from tests.trl_runs import COMMON, dataset, needs_trl, reward

pytestmark = [pytest.mark.cpu, needs_trl]


@pytest.mark.parametrize("page", ON_TINY_MODELS)
def test_the_pages_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(0, 256, (2, 9))
    options = {**COMMON, "max_steps": 1, "num_generations": 4, "max_completion_length": 6}
    world: dict[str, Any] = {
        "model": tiny.model(), "teacher": tiny.model(seed=1), "reward": reward, "dataset": dataset("GRPO"),
        "tokenizer": tiny.tokenizer(), "options": options, "ids": ids, "labels": ids,
    }  # fmt: skip
    try:
        for code in blocks(ROOT / "docs" / f"{page}.md"):
            exec(code, world)
    finally:
        if page == "trl":
            world["patch"].undo()
    if page != "liger":
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in world["model"].parameters()) or "trainer" in world
