"""The tuner's promises: rows around today's, nothing else than today's result is timed, and a table that says what is better."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
from bench import tune
from bench.candidates import Call, difference, launched_with, neighbours, source
from rlad_kernels.backends.triton import KERNELS
from rlad_kernels.backends.triton._launch import config, pick, record

pytestmark = pytest.mark.cpu


def test_neighbours_move_one_block_at_a_time_and_keep_one_that_is_the_limit() -> None:
    rows = neighbours(config(128, 4, BLOCK=1024, BLOCK_K=128))
    assert rows[0] == config(128, 4, BLOCK=1024, BLOCK_K=128)
    assert {r.num_warps for r in rows} == {2, 4, 8} and {dict(r.blocks)["BLOCK"] for r in rows} == {512, 1024, 2048}
    assert {dict(r.blocks)["BLOCK_K"] for r in rows} == {128} and len(set(rows)) == len(rows) == 9
    follows = neighbours(config(math.inf, 8, BLOCK=2048, LANES=256))
    assert {(r.num_warps, dict(r.blocks)["LANES"]) for r in follows} == {(4, 128), (8, 256), (16, 512)}


def test_a_row_is_written_as_the_kernels_have_it() -> None:
    for row in (config(512, 4, BLOCK=512), config(math.inf, 8, BLOCK_N=128, GROUP=16)):
        assert eval(source(row), {"config": config, "inf": math.inf}) == row


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_can_be_launched_with_another_row(name: str) -> None:
    """The library's launcher takes it from the table, for any size; afterwards the table is what it was."""
    kernel = KERNELS[name]
    case = next(iter(kernel.cases()))
    row = neighbours(case.launch().config)[1]
    with launched_with(kernel, row), record() as launches:
        case.launcher(*case.args)
    assert [(one.config.num_warps, one.config.blocks) for one in launches if one.kernel is kernel.fn] == [
        (row.num_warps, row.blocks)
    ]
    assert case.launch().config == pick(kernel.table, case.launch().config.limit)


def test_a_call_starts_from_the_same_arguments_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlad_kernels.backends import triton as kernels

    def add(out: torch.Tensor, logits: torch.Tensor, *rest: object) -> None:
        out += logits.sum(0)

    monkeypatch.setitem(kernels.LAUNCHERS, "column_stats_", add)
    wide = torch.ones(4, 8)[:, :5]
    call = Call("column_stats_", (torch.zeros(5), wide, None, torch.ones(4), 1.0, 0.0, torch.ones(4), 128))
    assert call.args[1].stride() == wide.stride() and call.args[1].data_ptr() != wide.data_ptr()
    for _ in range(2):
        (out,) = call.outputs()
        assert out.tolist() == [4.0] * 5
    assert call.bytes() == 4 * (5 + 20 + 4 + 4)


def test_difference() -> None:
    x = torch.tensor([1.0, -math.inf, math.nan])
    assert difference([x], [x.clone()]) == 0
    assert 0 < difference([torch.ones(3) + 1e-6], [torch.ones(3)]) <= 1 < difference([torch.ones(3) + 1e-4], [torch.ones(3)])
    assert difference([torch.tensor([1])], [torch.tensor([2])]) > 1
    assert difference([x], [x.nan_to_num()]) == difference([x], [-x]) == math.inf
    assert difference([torch.ones(2)], [torch.ones(3)]) == math.inf
    assert difference([torch.ones(2)], [torch.zeros(2)]) > 1


def test_the_table_takes_another_row_only_where_it_is_right_and_well_ahead() -> None:
    def case(what: str, *rows: tuple[float, float]) -> dict[str, object]:
        made = [{"config": f"row {i}", "s": s, "gb_s": 1 / s, "difference": d} for i, (s, d) in enumerate(rows)]
        return {"what": what, "shape": (8, 4, 16), "rows": [*made, {"config": "row 9", "why": "OutOfResources"}]}

    cases = [case("fold_kernel", (1.0, 0), (0.9, 0.5), (0.5, 2.0)), case("topk", (1.0, 0), (0.99, 0)), case("x", (1.0, 0))]
    sparse = {"config": "union 0.5", "union": 0.5, "s": 0.002, "exact_s": 0.001}
    text = tune.table([*cases, {"what": "sparse", "shape": (8, 4, 16), "rows": [sparse]}], 2.0, "tune.json")
    assert "tune.json" in text
    assert "| fold_kernel | 8, 4, 16 | 1000.000 | `row 1` | 900.000 | 1 | 0.56 |" in text
    assert "| topk | 8, 4, 16 | 1000.000 | as it is: `row 0` |" in text
    assert "| sparse | 8, 4, 16 | 1.00 | union 0.5 | 2.00 |" in text
