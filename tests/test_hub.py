"""The Kernel Hub's layout: relative imports, a namespace of its own, and ``kernels`` loads it beside the installed library."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.tools import hub
from tests.oracles import hold
from tests.test_docs import ROOT, blocks


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "out" / "hub"
    hub.write(out, "universal", version=3)
    return out


@pytest.mark.cpu
def test_the_layout(tmp_path: Path) -> None:
    variant = hub.write(tmp_path)
    assert variant == tmp_path / "build" / "torch-cuda"
    files = {p.relative_to(variant) for p in variant.rglob("*.py")}
    own = {Path("_ops.py"), Path("rlad_kernels/__init__.py")}
    assert files - own == {p.relative_to(hub.PACKAGE) for room in hub.ROOMS for p in (hub.PACKAGE / room).rglob("*.py")} | {
        Path("__init__.py")
    }
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["name"] == "rlad-kernels" and re.fullmatch(r"_rlad_kernels_cuda_[0-9a-f]{7}", metadata["id"])
    for path in files:
        text = (variant / path).read_text()
        assert not re.search(r"\brlad::|\bops\.rlad\b", text), path
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [n for n in names if n.startswith("rlad_kernels")], path
    assert metadata["id"] in (variant / "_ops.py").read_text()
    assert f'"{metadata["id"]}::' in (variant / "backends" / "contract.py").read_text()
    assert "version=1" in (tmp_path / "README.md").read_text()


@pytest.mark.cpu
def test_the_namespace_is_that_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named() -> str:
        return json.loads((hub.write(tmp_path) / "metadata.json").read_text())["id"]

    first, sources = named(), hub.sources()
    assert named() == first
    sources[Path("core/config.py")] += "# one more line\n"
    monkeypatch.setattr(hub, "sources", lambda: sources)
    assert named() != first


@pytest.mark.cpu
def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*'universal'.*, got 'rocm'"):
        hub.write(tmp_path, "rocm")
    with pytest.raises(ValueError, match="version must be at least 1, got 0"):
        hub.write(tmp_path, version=0)
    for line in ("import rlad_kernels.core", "def f():\n    importlib.import_module('rlad_kernels._C')"):
        with pytest.raises(ValueError, match=r"hub: core/x.py:\d imports rlad_kernels by its absolute name"):
            hub.relative(Path("core/x.py"), line)
    assert hub.relative(Path("a/b/c.py"), "from rlad_kernels.core.head import LMHead") == "from ...core.head import LMHead"
    assert hub.relative(Path("__init__.py"), "from rlad_kernels import losses") == "from . import losses"


@pytest.mark.interpreted
def test_kernels_loads_it_as_the_page_says_and_it_computes(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kernels")
    monkeypatch.chdir(repository.parent.parent)
    (code,) = blocks(ROOT / "docs" / "hub.md")
    world: dict[str, Any] = {}
    exec(code, world)
    kernel, hidden, weight, target, scores = (world[k] for k in ("rk", "hidden", "weight", "target", "scores"))
    variant = repository / "build" / "torch-universal"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert (kernel.__name__, metadata["version"]) == (metadata["id"], 3)

    def oracle(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None])[:, 0]

    hold(scores.logp.detach(), oracle, hidden.detach(), weight)
    assert kernel.linear_logp is not rk.linear_logp
    ours = rk.linear_logp(hidden, rk.LMHead(weight), target)  # both live in one process
    assert torch.equal(ours.logp, scores.logp)
    assert torch.equal(torch.autograd.grad(ours.logp.sum(), hidden)[0], hidden.grad)
    out = kernel.linear_loss(hidden, kernel.LMHead(weight), target, kernel.METHODS["seq_kd"].loss)
    assert torch.allclose(out.loss, -scores.logp.mean(), rtol=1e-6)

    spec = importlib.util.spec_from_file_location("older", variant / "rlad_kernels" / "__init__.py")
    assert spec is not None and spec.loader is not None
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    assert older.linear_logp is kernel.linear_logp and sys.modules[metadata["id"]] is kernel
