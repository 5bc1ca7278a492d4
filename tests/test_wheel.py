"""The wheel without the extension, and the sources: what is in them, and that nothing is downloaded to build them."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "LICENSE",
    "rlad_kernels",
    "csrc",
    "tests",
)

pytestmark = pytest.mark.cpu


def copied(tmp_path: Path) -> Path:
    """A copy of the sources: setuptools writes beside them."""
    copy = tmp_path / "copy"
    copy.mkdir()
    subprocess.run(["cp", "-r", *SOURCES, str(copy)], cwd=ROOT, check=True)
    for built in copy.glob("rlad_kernels/_C*"):
        built.unlink()
    return copy


def wheel(tmp_path: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    copy = copied(tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", *options, "--wheel-dir", str(tmp_path), str(copy)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def test_a_wheel_without_a_compiler(tmp_path: Path) -> None:
    done = wheel(tmp_path, "--no-build-isolation", RLAD_SKIP_CPP="1")
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("rlad_kernels-*-py3-none-any.whl")
    names = zipfile.ZipFile(made).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "rlad_kernels").rglob("*.py")}
    assert modules | {"rlad_kernels/py.typed"} <= set(names)
    assert not [n for n in names if n.split("/")[0] in ("tests", "bench", "examples", "csrc")]
    assert [n for n in names if n.endswith("licenses/LICENSE")]


def test_a_build_without_torch_says_how(tmp_path: Path) -> None:
    """As in an isolated environment: torch is not there, and the build does not fetch one."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('no torch here')\n")
    done = wheel(tmp_path, "--no-build-isolation", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "install torch, then run `pip install --no-build-isolation .`" in done.stderr + done.stdout


def test_the_sources_are_whole(tmp_path: Path) -> None:
    """What the wheel is built from, every header too, and no test without its helpers."""
    copy = copied(tmp_path)
    command = [sys.executable, "-c", "from setuptools.build_meta import build_sdist; print(build_sdist('.'))"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(copy / done.stdout.splitlines()[-1]) as made:
        names = {name.partition("/")[2] for name in made.getnames()}
    wanted = {
        str(p.relative_to(ROOT))
        for room in ("rlad_kernels", "csrc")
        for p in (ROOT / room).rglob("*")
        if p.suffix in (".py", ".cpp", ".h")
    }
    assert wanted | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "rlad_kernels/py.typed"} <= names
    assert not [name for name in names if name.startswith("tests")]
