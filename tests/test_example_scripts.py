"""The examples run from start to end at smoke size, each in a process of its own as a user would start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlad_kernels as rk

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.cpu


def run(script: str, *args: str) -> str:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *args], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_plain_pytorch() -> None:
    assert "gradients equal" in run("plain_pytorch.py")
    assert len((EXAMPLES / "plain_pytorch.py").read_text().splitlines()) < 80


def test_served_teacher() -> None:
    pytest.importorskip("transformers")
    assert "KL to the served teacher" in run("served_teacher.py", "--smoke")


def test_long_context(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    out = run("long_context.py", "--smoke", "--device", "cpu", "--out", str(tmp_path))
    assert "longest context: naive 256, ours 1,024; losses agree" in out
    rows = {(r["way"], r["length"]): r for r in json.loads((tmp_path / "memory.json").read_text())["rows"]}
    assert "stopped" in rows["naive", 1024] and rows["ours", 256]["peak"] < rows["naive", 256]["peak"]
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_the_local_server_says_what_linear_topk_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import local_server
    import served_teacher

    model = served_teacher.tiny(32, scale=20.0)
    sequences = torch.randint(128, (3, 10))
    with local_server.serve(model, "teacher") as url:
        got = served_teacher.ask(url, "teacher", sequences, 4, 8, 128)
        with pytest.raises(SystemExit, match=r"says 400: .*greater than max allowed: 20"):
            served_teacher.ask(url, "teacher", sequences, 4, 21, 128)
        with pytest.raises(SystemExit, match="The model `other` does not exist"):
            served_teacher.ask(url, "other", sequences, 4, 8, 128)
    with torch.no_grad():
        hidden = served_teacher.hidden_of(model, sequences, 4)
        want = rk.linear_topk(hidden, rk.LMHead.from_model(model), 8, target=sequences[:, 4:])
    assert torch.equal(got.ids, want.ids)
    for key, tolerance in (("logp", 1e-5), ("tail_logp", 1e-3), ("target_logp", 1e-5)):
        torch.testing.assert_close(getattr(got, key), getattr(want, key), rtol=tolerance, atol=tolerance)
