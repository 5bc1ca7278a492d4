"""The Python in README.md and CONTRIBUTING.md runs as printed, and every make target they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.registry import TOKEN_LOSSES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    text = page.read_text()
    found = re.findall(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in code.split("\n")) for indent, code in found]


@pytest.mark.cpu
def test_readme_example_runs_and_its_loss_moves_the_student() -> None:
    (code,) = blocks(ROOT / "README.md")
    world: dict[str, object] = {}
    exec(code, world)
    assert world["hidden"].grad.abs().sum() > 0
    assert world["lm_head"].weight.grad.abs().sum() > 0


def test_contributing_example_is_a_working_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(ROOT / "CONTRIBUTING.md")
    monkeypatch.setattr("rlad_kernels.registry.TOKEN_LOSSES", dict(TOKEN_LOSSES))
    world: dict[str, object] = {}
    exec(code, world)
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    head, target = rk.LMHead(weight), torch.randint(9, (5,))
    out = rk.fused_linear_loss(hidden, head, target, world["entropy_bonus"], inputs={"weight": torch.ones(5)})
    want = -rk.linear_logp(hidden, head, target, entropy=True).entropy.mean()
    assert torch.allclose(out.loss, want, rtol=1e-6)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_and_files_named_in_the_docs_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.cpu
@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_python_on_the_docs_pages_runs(page: Path) -> None:
    for code in blocks(page):
        exec(code, {})
