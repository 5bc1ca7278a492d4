"""A run: what it ran on, how long it may take, and its JSON, written after every case so that a run that was cut off can go on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rlad_kernels
from rlad_kernels.backends.contract import INTERPRET

PEERS = ("triton", "trl", "liger-kernel", "cut-cross-entropy", "verl", "quack-kernels")
Case = dict[str, Any]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _chip(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
    isa = "interpreted" if INTERPRET else torch.ops.rlad.cpu_isa()
    return f"{names[0] if names else platform.machine()}, {isa}, {torch.get_num_threads()} threads"


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy of the tree without git
        return os.environ.get("RLAD_COMMIT", "unknown")


def header(device: str) -> dict[str, Any]:
    versions = {"rlad_kernels": rlad_kernels.__version__, "torch": torch.__version__, **{p: _version(p) for p in PEERS}}
    return {
        "date": datetime.date.today().isoformat(), "commit": _commit(), "device": f"{device}: {_chip(device)}",
        "versions": {k: v for k, v in versions.items() if v},
    }  # fmt: skip


def budget() -> float:
    """Seconds that RLAD_GPU_SECONDS leaves for cases: it also pays for the imports and for the end of the last case."""
    return float(os.environ.get("RLAD_GPU_SECONDS", "inf")) - 20


class Run:
    """Cases, most important first: those that an earlier run of this commit finished are kept, none starts after ``seconds``."""

    def __init__(self, path: Path, info: dict[str, Any], *, resume: bool, seconds: float = math.inf) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(path.read_text()) if resume and path.exists() else {}
        same = old.get("commit") == info["commit"] and old.get("device") == info["device"]
        self.done = {_key(c): c for c in old["cases"]} if same else {}
        self.path, self.info, self.until = path, info, time.monotonic() + seconds
        self.cases: list[Case] = []
        self.left = 0

    def case(self, key: Case, measure: Callable[[], Any]) -> Case | None:
        """The case with its ``rows``, measured if it has not been; None where there is no time left."""
        key = json.loads(json.dumps(key))
        found = self.done.get(_key(key))
        if found is None and time.monotonic() > self.until:
            self.left += 1
            return None
        self.cases.append(found or {**key, "rows": measure()})
        self.path.write_text(json.dumps({**self.info, "cases": self.cases}, indent=1) + "\n")
        return self.cases[-1]

    def end(self) -> None:
        """Say what is left."""
        if self.left:
            print(f"\nNOT FINISHED: {self.left} cases left, the same command goes on", flush=True)


def _key(case: Case) -> str:
    return json.dumps({k: v for k, v in case.items() if k != "rows"}, sort_keys=True)
