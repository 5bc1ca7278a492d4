"""The benchmark's own promises: nothing wrong is timed, nothing absent is dropped, a run can go on, and its report can be drawn."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import bounds, plan, report, rounds
from bench.gate import Wrong, gate
from bench.inputs import Inputs
from bench.plan import Case
from bench.providers import PROVIDERS
from bench.run import Run

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.cpu


def test_gate_rejects_a_wrong_provider_of_ours_and_reports_a_wrong_peer() -> None:
    fused = PROVIDERS["fused"]
    wrong = dataclasses.replace(fused, loss=lambda x: 1.001 * fused.loss(x))
    with pytest.raises(Wrong, match=r"fused .* is wrong, not slow"):
        gate(wrong, torch.float32, "cpu")
    peer = dataclasses.replace(wrong, bound=None)
    assert gate(peer, torch.float32, "cpu")["d_hidden"] == pytest.approx(1e-3, rel=0.01)


def test_gate_rejects_not_a_number_and_a_gradient_that_is_missing() -> None:
    fused = PROVIDERS["fused"]
    with pytest.raises(Wrong):
        gate(dataclasses.replace(fused, loss=lambda x: fused.loss(x) * float("nan")), torch.float32, "cpu")
    with pytest.raises(Wrong, match="d_weight is missing"):
        gate(dataclasses.replace(PROVIDERS["frozen"], truth=fused.truth), torch.float32, "cpu")


@pytest.mark.parametrize("name", [name for name, p in PROVIDERS.items() if p.bound == PROVIDERS["fused"].bound])
def test_ours_pass_the_gate(name: str) -> None:
    assert gate(PROVIDERS[name], torch.bfloat16, "cpu")


def test_every_process_gets_the_same_inputs() -> None:
    for peaked in (False, True):
        a, b = (Inputs.make(64, 16, 512, torch.float32, "cpu", peaked) for _ in range(2))
        assert all(
            torch.equal(u, v) for u, v in zip(vars(a).values(), vars(b).values(), strict=True) if isinstance(u, torch.Tensor)
        )
        probability = torch.softmax(a.hidden @ a.weight.T, 1).max(1).values.median()
        assert (probability > 0.3) == peaked


def test_groups_keep_the_order_and_split_where_memory_is_short() -> None:
    names = list(PROVIDERS)
    for case in (Case(8, 8, 64, "float32", (), 1), Case(1024, 4096, 10_000_000, "float32", (), 1)):
        split = plan.groups(case, names, "cpu")
        assert [name for group in split for name in group] == names
    assert len(split) == len(names)


def test_a_run_is_written_reported_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command line run with an absent peer; the second finds its case done and starts no worker."""
    from bench import __main__ as cli

    case = Case(16, 8, 256, "float32", ("fused", "verl_triton"), 1)
    growing = [Case(n, 8, 256, "float32", ("fused",), 1, "growth_n") for n in (8, 16)]
    monkeypatch.setitem(plan.PRESETS, "smoke", lambda device: [case])
    monkeypatch.setattr(sys, "argv", ["bench", "--smoke", "--resume", "--out", str(tmp_path)])
    monkeypatch.chdir(ROOT)
    cli.main()
    (path,) = tmp_path.glob("*.json")
    run = json.loads(path.read_text())
    assert set(run) == {"date", "commit", "device", "versions", "cases"}
    ours, absent = run["cases"][0]["rows"]
    assert len(ours["times_s"]) == 1 and len(ours["bare_s"][0]) == 3 and ours["flops"] == 3 * 2 * 16 * 8 * 256
    assert "absent" in absent and "absent: " in path.with_suffix(".md").read_text()

    monkeypatch.setattr(cli, "measure", lambda *_, **__: pytest.fail("measured again"))
    cli.main()
    assert json.loads(path.read_text()) == run

    run["cases"] += [{**dataclasses.asdict(c), "rows": [{**ours, "n": c.n}]} for c in growing]
    path.write_text(json.dumps(run))
    assert {p.suffix for p in report.write(path)} == {".md", ".png"}
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_a_provider_that_dies_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(rounds, "absent", lambda provider, device: None)
    dead, ours = rounds.measure(Case(16, 8, 256, "float32", ("verl_triton", "fused"), 1), "cpu")
    assert dead["absent"] and "times_s" not in dead
    assert ours["times_s"]


def test_one_process_measures_all_and_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The road of a GPU: no worker is started, a wrong provider is not timed and fails the run, the others are measured."""
    from bench import __main__ as cli

    monkeypatch.setattr(rounds, "Process", None)
    fused = PROVIDERS["fused"]
    monkeypatch.setitem(PROVIDERS, "topk", dataclasses.replace(fused, name="topk", loss=lambda x: 2 * fused.loss(x)))
    case = Case(16, 8, 256, "bfloat16", ("linear_logp", "rlad", "topk", "cce"), 2, peaked=True)
    monkeypatch.setitem(plan.PRESETS, "gpu", lambda device: [case])
    monkeypatch.setattr(sys, "argv", ["bench", "--gpu", "--resume", "--out", str(tmp_path)])
    assert cli.main() == 1
    (path,) = tmp_path.glob("*.json")
    (done,) = json.loads(path.read_text())["cases"]
    ours, rlad, wrong, absent = done["rows"]
    assert len(ours["times_s"]) == len(rlad["times_s"]) == 2 and ours["bare_s"] == rlad["bare_s"]
    assert "is wrong, not slow" in wrong["absent"]
    assert absent["absent"] in ("needs a GPU", "not installed: cut_cross_entropy")
    assert "peaked logits" in path.with_suffix(".md").read_text()


def test_naive_is_not_started_where_it_does_not_fit() -> None:
    case = Case(262_144, 8, 10_000_000, "float32", ("naive",), 1)
    (row,) = rounds.measure(case, "cpu", here=True)
    assert "GiB planned" in row["absent"]


def test_no_case_starts_when_time_is_up_and_the_next_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info, path = {"commit": "a", "device": "cpu"}, tmp_path / "deep" / "run.json"
    first = Run(path, info, resume=True)
    assert first.case({"n": 1}, lambda: ["one"]) == {"n": 1, "rows": ["one"]}
    second = Run(path, info, resume=True, seconds=-1)
    assert second.case({"n": 1}, lambda: pytest.fail("again")) == first.cases[0]
    assert second.case({"n": 2}, lambda: pytest.fail("late")) is None
    second.end()
    assert "NOT FINISHED: 1 cases left" in capsys.readouterr().out
    assert json.loads(path.read_text()) == {**info, "cases": first.cases}
    assert Run(path, {**info, "commit": "b"}, resume=True).done == {}


def test_bounds_are_held_beside_what_was_measured() -> None:
    row = {"times_s": [3.3, 3.0, 3.6], "bare_s": [[1.0, 1.0, 1.0]], "extra_bytes": 2**30}
    rows = [{**row, "provider": p} for p in ("fused", "linear_logp", "topk")] + [{**row, "provider": "trl", "times_s": [3.0]}]
    n, d, v = bounds.LARGE
    text = bounds.table([{"n": n, "d": d, "v": v, "rows": rows}])
    for line in (
        "| 1.10 | 1.12 × 3 | met |",
        "| 1.10 | 1 × TRL | MISSED |",
        "| 1.00 | 0.5 GiB | MISSED |",
        "| – | 2 ms | not measured |",
    ):
        assert line in text
    shapes = {(c.n, c.d, c.v) for c in plan.gpu("cuda") if not c.peaked}
    assert {b.shape for b in bounds.BOUNDS} <= shapes
    assert {b.provider for b in bounds.BOUNDS} <= set(PROVIDERS)


def test_real_inputs_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "real.pt"
    torch.save({"hidden": torch.ones(16, 8), "weight": torch.ones(64, 8), "target": torch.arange(16)}, file)
    case, half = plan.real(file)
    assert (case.n, case.d, case.v, case.data, half.dtype) == (16, 8, 64, "real.pt", "bfloat16")
    x = Inputs.make(16, 8, 64, torch.bfloat16, "cpu", data=str(file))
    assert x.hidden.requires_grad and x.hidden.dtype == torch.bfloat16 and x.target.tolist() == list(range(16))


def test_one_case_by_hand() -> None:
    """The command that README.md prints, at a small shape."""
    case = {"provider": "topk", "n": 16, "d": 8, "v": 256, "dtype": "float32", "device": "cpu", "rounds": 0}
    out = subprocess.run(
        [sys.executable, "-m", "bench.worker", json.dumps(case)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    row = json.loads(out.stdout)
    assert row["times_s"] == [] and "extra_bytes" in row and row["errors"]["loss"] < 1e-5
