"""The engines of docs/scale.md, each in processes that torchrun starts, make the step that one process would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.cpu
@pytest.mark.parametrize("engine", ["ddp", "accelerate", "zero2", "zero3"])
def test_a_step_is_one_processes(engine: str) -> None:
    if engine != "ddp":
        pytest.importorskip("accelerate" if engine == "accelerate" else "deepspeed")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.engine_recipes", engine],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equals one process") == 2
