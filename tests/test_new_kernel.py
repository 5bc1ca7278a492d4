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
NEEDED = (
    "module.cpp",
    "isa.cpp",
    "checks.cpp",
    "simd/*.cpp",
    "*.h",
    "simd/*.h",
)  # of the sources: what a build with one pass wants


def written() -> dict[str, str]:
    """The blocks that begin with the path of a file, by path."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return dict(re.findall(r"^```(?:python|cpp)\n(?:#|//) (\S+/\S+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def run(tree: Path, *command: str, **settings: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")} | settings
    done = subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_kernel_is_four_files(tmp_path: Path) -> None:
    copied = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "rlad_kernels", tmp_path / "rlad_kernels", ignore=copied)
    sources = {path for name in NEEDED for path in (ROOT / "csrc").glob(name)}
    for path in (*sources, ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "README.md"):
        to = tmp_path / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    new = written()
    assert len(new) == 4
    for path, code in new.items():
        to = tmp_path / path
        if to.name == "contract.py":
            assert to.read_text().count("\nROW_OPS = {\n") == 1
            code = to.read_text().replace("\nROW_OPS = {\n", f"\nROW_OPS = {{\n{code}")
        to.parent.mkdir(exist_ok=True)
        to.write_text(code)
    run(tmp_path, "setup.py", "build_ext", "--inplace")
    for interpret in ("0", "1"):
        assert "4 passed" in run(tmp_path, "-m", "pytest", "-q", "tests/test_row_max.py", TRITON_INTERPRET=interpret)
    found = run(tmp_path, "-m", "rlad_kernels.tools.compile_gate", "--kernel", "row_max_kernel", "--jobs", "1")
    assert re.findall(r"row_max_kernel +(\d+) +(\d+)", found) == [("80", "2"), ("90", "2"), ("100", "2")]
