"""CONTRIBUTING's new kernel is the four files that it says: added to a copy of the tree they build, pass the gate, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parent.parent
NEEDED = ("module.cpp", "isa.cpp", "checks.cpp", "simd/*.cpp")  # of the sources: what a build with one pass wants


def written() -> dict[str, str]:
    """The blocks that begin with the path of a file, by path."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return dict(re.findall(r"^```(?:python|cpp)\n(?:#|//) (\S+/\S+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with the new kernel, built with no other C++ pass than its own."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "rlad_kernels", tree / "rlad_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    sources = {path for name in NEEDED for path in (ROOT / "csrc").glob(name)} | set((ROOT / "csrc").rglob("*.h"))
    for path in (*sources, ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "README.md"):
        to = tree / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    for path, code in written().items():
        if path.endswith("contract.py"):
            text = (tree / path).read_text()
            assert text.count("\nROW_OPS = {\n") == 1
            code = text.replace("\nROW_OPS = {\n", f"\nROW_OPS = {{\n{code}")
        (tree / path).parent.mkdir(exist_ok=True)
        (tree / path).write_text(code)
    run(tree, "setup.py", "build_ext", "--inplace")
    return tree


def run(tree: Path, *command: str, **settings: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")} | settings
    done = subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_kernel_is_four_files() -> None:
    assert len(written()) == 4


@pytest.mark.parametrize("interpret", ("0", "1"))
def test_it_runs_on_both_backends(tree: Path, interpret: str) -> None:
    assert "4 passed" in run(tree, "-m", "pytest", "-q", "tests/test_row_max.py", TRITON_INTERPRET=interpret)


def test_the_gate_compiles_it(tree: Path) -> None:
    found = run(tree, "-m", "rlad_kernels.tools.compile_gate", "--kernel", "row_max_kernel", "--jobs", "1")
    assert re.findall(r"row_max_kernel +(\d+) +(\d+)", found) == [("80", "2"), ("90", "2"), ("100", "2")]
