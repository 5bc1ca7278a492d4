"""The divergences' row pass where a short cut could end: shares of a mixture, peaked rows, lost masses, its output's place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.sweeps import relative
from tests.test_divergence_rows import COLUMNS, ROWS, Row, Side, apply, expected, isa, slow  # noqa: F401

ONE = torch.ones(2, 2)
SHARES = {
    "half": (0.5, 0.5, 0.5), "tenth": (0.1, 0.9, 0.1), "all-but-a-tenth": (0.9, 0.1, 0.9), "skewed": (1.0, 0.0, 0.9),
    "skewed-back": (0.0, 1.0, 0.1), "uneven": (0.7, 0.6, 0.2),
}  # fmt: skip


def found(student: Side, teacher: Side, row: Row, out: Tensor | None = None, accumulate: bool = False) -> tuple[Tensor, Tensor]:
    value, out = torch.zeros(len(student.raw), dtype=student.raw.dtype), torch.empty_like(student.raw) if out is None else out
    apply(student, teacher, row, ONE.to(value), out, value, accumulate)
    return value, out


@pytest.mark.parametrize("spread", (0.01, 0.3, 4.0))
@pytest.mark.parametrize("name", SHARES)
def test_mixtures_of_any_share(isa: str, name: str, spread: float) -> None:  # noqa: F811
    x = torch.randn(2, COLUMNS)
    student, teacher = Side(x), Side(x + spread * torch.randn_like(x))
    row = ("mix", SHARES[name], 0.0, 0.0)
    value, grad = expected(student, teacher, row, ONE)
    got = found(student, teacher, row)
    # a log-prob of −10 is known to half an ulp, 5e-7, on each side: of w that much is lost, twice of its square
    tolerance = 3e-6 + 1e-6 / spread
    assert relative(got[0], value) <= 2 * tolerance
    assert relative(got[1], grad) <= tolerance


@slow
@pytest.mark.parametrize("name", ROWS)
def test_peaked_rows(isa: str, name: str) -> None:  # noqa: F811
    """One column has all but 1e-4 of q: its own gradient, minus the sum of the others', keeps its digits."""
    x = torch.randint(-64, 64, (2, 300)) / 32.0
    x[:, 7] = 16.0
    student, teacher = Side(x), Side(x.roll(1, 0) + torch.randint(-64, 64, x.shape) / 64.0)
    _, grad = expected(student, teacher, ROWS[name], ONE)
    _, out = found(student, teacher, ROWS[name])
    assert relative(out, grad) <= 1e-5
    assert relative(out[:, 7], grad[:, 7]) <= 1e-5


@slow
@pytest.mark.parametrize("name", ("forward", "reverse", "mix", "todi", "taid", "total-variation"))
def test_masses_that_underflow(isa: str, name: str) -> None:  # noqa: F811
    x, y = torch.randn(2, COLUMNS) * 40, torch.randn(2, COLUMNS) * 40
    value, grad = expected(Side(x), Side(y), ROWS[name], ONE)
    got = found(Side(x), Side(y), ROWS[name])
    assert relative(got[0], value) <= 2e-5  # half an ulp of a logit of 150 is 8e-6
    assert ((got[1] - grad).abs() <= 4e-5 * grad.abs().amax().clamp(min=1)).all()


@pytest.mark.parametrize("cols", (30, 4096, 4096 + 64, 5001))
@pytest.mark.parametrize("softcap", (0.0, 3.0))
def test_the_place_of_the_result_changes_no_bit(isa: str, cols: int, softcap: float) -> None:  # noqa: F811
    x, row = torch.randn(2, cols) * 3, ROWS["mix"]
    student, teacher = Side(x, softcap=softcap), Side(torch.randn(2, cols))
    want = found(student, teacher, row)
    added = found(student, teacher, row, torch.zeros_like(x), True)
    wide = torch.full((2, cols + 5), 7.0)
    beside = found(student, teacher, row, wide[:, :cols])
    student.raw = x.clone()
    inside = found(student, teacher, row, student.raw)
    for value, out in (added, beside, inside):
        assert torch.equal(value, want[0])
        assert torch.equal(out, want[1])
    assert (wide[:, cols:] == 7).all()
