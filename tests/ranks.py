"""Functions on several processes of one group, with a watchdog: a rank that waits for another ends the test, not the suite."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 60  # of work; a process that is being started is not counted
_RUN = f"""
import datetime, gc, sys
import torch, torch.distributed as dist
rank, world, folder, module, name, backend = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
torch.set_num_threads(1)
if backend == "nccl":
    torch.cuda.set_device(rank)
    torch.set_default_device(f"cuda:{{rank}}")  # before the module is imported
import importlib
function = getattr(importlib.import_module(module), name)
store = dist.FileStore(folder + "/store", world)
dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds={SECONDS}))
function(rank, world)
gc.collect()  # DDP's reducer before its group: see tests/engine_recipes.py
dist.barrier()
dist.destroy_process_group()
"""


def on_ranks(function: Callable[[int, int], Any], world: int, backend: str = "gloo") -> None:
    """Run ``function(rank, world)``, of a module's top level, on each rank; under "nccl" each has a GPU of its own.

    Raises:
        AssertionError: with what a rank wrote, where one fails or does not end.
    """
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        args = [str(world), folder, function.__module__, function.__name__, backend]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", _RUN, str(rank), *args], cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for rank in range(world)
        ]
        said = []
        try:
            for process in ranks:
                said.append(process.communicate(timeout=4 * SECONDS)[0].decode())
        finally:
            for process in ranks:
                process.kill()
        failed = [text for process, text in zip(ranks, said, strict=True) if process.returncode]
        assert not failed, "\n\n".join(failed)
