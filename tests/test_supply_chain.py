"""What is installed is pinned by hash, importing does nothing but define, and no file is trusted to run code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
ROOMS = ("rlad_kernels", "bench", "examples", "docs")
SOURCES = [ROOT / "setup.py", *sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))]

pytestmark = pytest.mark.cpu


def pins(text: str) -> dict[str, str]:
    """Versions by normalised name."""
    found = re.findall(r"(?m)^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+)", text)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_lock_has_every_requirement_with_a_hash() -> None:
    text = LOCK.read_text()
    wanted = {k: v for f in ("dev", "alone") for k, v in pins((ROOT / f"requirements-{f}.txt").read_text()).items()}
    wanted.pop("torch")  # the build is the machine's: for CPUs or for CUDA
    locked = pins(text)
    assert {k: locked.get(k) for k in wanted} == wanted, "run `make lock`"
    entries = re.split(r"(?m)^(?=[A-Za-z0-9])", text)[1:]
    assert len(entries) >= len(locked)
    assert not [e.split("\n")[0] for e in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}", e)]
    assert "://" not in text and "index-url" not in text


IMPORT = """
import importlib, os, pkgutil, sys
import torch, torch.distributed, triton

seen = []
REACHES = {"socket", "subprocess", "urllib", "http", "ftplib", "pickle", "shutil", "webbrowser"}
WRITES = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir"}

def hook(event, args):
    written = event == "open" and bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    if written or event.split(".")[0] in REACHES or event in WRITES:
        seen.append((event, str(args)[:200]))

sys.addaudithook(hook)
import rlad_kernels
compiler = "torch._dynamo" in sys.modules
names = [m.name for m in pkgutil.walk_packages(rlad_kernels.__path__, "rlad_kernels.")]
names = [n for n in names if ".integrations" not in n and "__main__" not in n]
for name in names:
    importlib.import_module(name)
print(len(names), compiler, seen)
"""


def test_importing_reaches_for_nothing() -> None:
    """No network, no process, no file written, no pickle: what Python's audit events say of every module."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, compiler, seen = done.stdout.strip().split(" ", 2)
    assert int(count) > 80 and seen == "[]"
    assert compiler == "False", "importing PyTorch's compiler takes longer than all the rest"


def test_no_file_is_trusted() -> None:
    """No pickle, eval or exec, nothing loaded with more than tensors in it, no remote code of a model."""
    bad = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            line = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad += [
                f"{line} imports {n}" for n in names if n.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve")
            ]
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else ""
                bad += [f"{line} calls {name}"] if name in ("eval", "exec") else []
                risky = {"weights_only": False, "trust_remote_code": True, "allow_pickle": True, "shell": True}
                bad += [
                    f"{line} {k.arg}" for k in node.keywords if k.arg in risky and getattr(k.value, "value", None) is risky[k.arg]
                ]
    assert bad == []
