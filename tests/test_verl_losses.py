"""Our methods beside verl's policy losses of the same papers, in a process of its own (see verl_world.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.cpu
@pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")
def test_in_a_process_with_verl() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.verl_losses"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-2:] == ["3", "passed"], done.stdout
