"""A run of the suite that was cut off goes on; each failure has its traceback in a file; where time ends, the rest is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = """
import os

def test_good():
    pass

def test_bad():
    one = 1
    assert one == 2 - int(os.environ["MENDED"])
"""
pytestmark = pytest.mark.cpu


def run(folder: Path, *args: str, mended: bool = False, **variables: str) -> tuple[int, str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "RLAD_"))}
    env = {**own, "PYTHONPATH": str(ROOT), "RLAD_TEST_DONE": "out/done.txt", "MENDED": str(int(mended)), **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-rf", *args]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_two.py").write_text(TESTS)
    failures = tmp_path / "out" / "failures"

    code, out = run(tmp_path, RLAD_GPU_SECONDS="0")
    assert code == 0 and "NOT FINISHED: 2 tests left" in out

    code, out = run(tmp_path, "-n", "1", RLAD_GPU_SECONDS="100")
    assert code == 1 and "1 failed, 1 passed" in out and "one = 1" not in out
    (file,) = failures.iterdir()
    assert file.name == "test_two.py-test_bad.txt" and "one = 1" in file.read_text()
    assert (tmp_path / "out" / "done.txt").read_text() == "test_two.py::test_good\n"

    code, out = run(tmp_path, mended=True)
    assert code == 0 and "1 passed, 1 skipped" in out and "1  passed in an earlier run" in out
    assert not list(failures.iterdir())
