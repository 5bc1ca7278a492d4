"""verl's own registries, aggregation, vanilla loss and model forward, run with ours in their places; in a process of its own.

The process has empty modules for what verl imports and is not installed (Ray, tensordict, …): see verl_world.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.cpu, pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")]


def test_in_a_process_with_verl() -> None:
    """The checks of verl_checks.py; verl itself imports us, as in a run on Ray, from VERL_USE_EXTERNAL_MODULES."""
    env = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "rlad_kernels.integrations.verl", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.verl_checks"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-2:] == ["11", "passed"], done.stdout


def test_without_verl_the_error_names_the_fix() -> None:
    code = "import sys; sys.modules['verl'] = None; import rlad_kernels.integrations.verl"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode and "pip install 'verl==0.9.1'" in done.stderr


def test_the_configuration_in_the_docs_has_keys_that_verl_has() -> None:
    yaml = pytest.importorskip("yaml")
    spec = find_spec("verl")
    assert spec is not None and spec.submodule_search_locations is not None
    known = yaml.safe_load((Path(spec.submodule_search_locations[0]) / "trainer/config/_generated_ppo_trainer.yaml").read_text())
    keys = re.findall(r"(?<![+\w.])((?:\w+\.)+\w+)=", (ROOT / "docs/verl.md").read_text())
    assert len(keys) > 20
    for key in keys:
        node = known
        for part in key.split("."):
            assert part in node, key
            node = node[part]
