"""Every public class and function shows itself in an example that runs."""

from __future__ import annotations

import doctest
import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

import rlad_kernels as rk

ROOMS = ("losses", "masks", "spans", "supports")


def members(module: ModuleType) -> list[str]:
    """Public names: ``__all__``, or else the functions that the module defines."""
    own = [k for k, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == module.__name__ and k[0] != "_"]
    return [*getattr(module, "__all__", own)]


PUBLIC: dict[str, Any] = {f"rk.{k}": getattr(rk, k) for k in rk.__all__ if k not in (*ROOMS, "METHODS")}
PUBLIC |= {f"rk.{room}.{k}": getattr(getattr(rk, room), k) for room in ROOMS for k in members(getattr(rk, room))}
PUBLIC["Method"] = type(rk.METHODS["grpo"])
BASES = {"rk.losses.SampledLoss", "rk.losses.ClippedLoss"}  # what methods share
SHOWN = {k: x for k, x in PUBLIC.items() if (inspect.isclass(x) or inspect.isfunction(x)) and k not in BASES}


@pytest.mark.cpu
@pytest.mark.parametrize("name", SHOWN)
def test_the_example_runs(name: str) -> None:
    x = SHOWN[name]
    tests = doctest.DocTestFinder(recurse=False).find(x, name, module=sys.modules[x.__module__], globs={"torch": torch, "rk": rk})
    assert sum(len(t.examples) for t in tests), f"{name} has no example"
    for test in tests:
        said: list[str] = []
        assert not doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed, "".join(said)
