"""Every public class and function shows itself in an example that runs."""

from __future__ import annotations

import doctest
import inspect
import re
import sys
from typing import Any

import pytest
import torch

import rlad_kernels as rk
from tests.test_docs import ON_TINY_MODELS
from tests.test_reference import ENTRIES, make_reference

BASES = {"losses.SampledLoss", "losses.ClippedLoss"}  # what methods share
VALUES = {"METHODS", "losses.TIS", "losses.ICEPOP"}
SHOWN_ON = make_reference.SHOWN_ON
NAMES = [name for name in ENTRIES if name not in BASES | VALUES | {*SHOWN_ON}]


@pytest.mark.cpu
@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name: str) -> None:
    if name.startswith("integrations.transformers"):
        pytest.importorskip("transformers")
    x: Any = make_reference.resolved(name)
    assert inspect.isclass(x) or inspect.isfunction(x)
    tests = doctest.DocTestFinder(recurse=False).find(x, name, module=sys.modules[x.__module__], globs={"torch": torch, "rk": rk})
    assert sum(len(t.examples) for t in tests), f"{name} has no example"
    for test in tests:
        said: list[str] = []
        assert not doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed, "".join(said)


@pytest.mark.cpu
@pytest.mark.parametrize("name", SHOWN_ON)
def test_a_guide_shows_what_has_no_example_of_its_own(name: str) -> None:
    language, code = make_reference.guide_block(name)
    if language == "python":  # run by test_integration_docs.py
        assert SHOWN_ON[name] in ON_TINY_MODELS and re.search(rf"\b{name.rpartition('.')[2]}\(", code)
    else:  # verl's configuration, whose keys test_verl.py checks
        assert "VERL_USE_EXTERNAL_MODULES=rlad_kernels.integrations.verl" in code
