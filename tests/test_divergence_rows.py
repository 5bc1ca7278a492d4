"""The row pass of the divergences against their definitions in float64, on every backend and instruction set of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlad_kernels.backends import reference
from rlad_kernels.engine.divergence import taid_normaliser
from tests.conftest import DEVICE, INTERPRET
from tests.sweeps import relative

ISAS = ("generic", "avx2", "avx512") if DEVICE == "cpu" and not INTERPRET else ("default",)
COLUMNS = 700 if INTERPRET else 5001  # an odd number, more than one stretch or block
Row = tuple[str, tuple[float, float, float], float, float]
ROWS: dict[str, Row] = {
    "forward": ("sym", (0.0, 0.0, 0.0), 1.0, 0.0),
    "reverse": ("sym", (0.0, 0.0, 0.0), 0.0, 1.0),
    "both": ("sym", (0.0, 0.0, 0.0), 0.3, 0.7),
    "mix": ("mix", (0.3, 0.7, 0.3), 0.0, 0.0),
    "mix-forward": ("mix", (1.0, 0.0, 0.01), 0.0, 0.0),
    "mix-reverse": ("mix", (0.0, 1.0, 0.99), 0.0, 0.0),
    "todi": ("todi", (2.5, 0.0, 0.0), 0.0, 0.0),
    "alpha-beta": ("alpha_beta", (0.2, 0.7, 0.0), 0.0, 0.0),
    "alpha-beta-swapped": ("alpha_beta", (0.9, 0.4, 0.0), 0.0, 0.0),
    "alpha-0": ("alpha_beta", (0.0, 0.6, 0.0), 0.0, 0.0),
    "beta-0": ("alpha_beta", (0.6, 0.0, 0.0), 0.0, 0.0),
    "sum-0": ("alpha_beta", (0.6, -0.6, 0.0), 0.0, 0.0),
    "negative": ("alpha_beta", (2.0, -1.0, 0.0), 0.0, 0.0),
    "taid": ("taid", (0.4, 0.0, 0.0), 0.0, 0.0),
    "log-square": ("log_square", (0.0, 0.0, 0.0), 0.0, 0.0),
    "total-variation": ("total_variation", (0.0, 0.0, 0.0), 0.0, 0.0),
}

if INTERPRET:  # one or two of a family: their formulas differ in numbers only
    for name in ("both", "mix-forward", "mix-reverse", "alpha-beta-swapped", "negative"):
        del ROWS[name]
slow = pytest.mark.skipif(INTERPRET, reason="adds nothing to the other tests of these formulas, and is slow here")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "default":
        monkeypatch.setenv("RLAD_CPU_ISA", request.param)
        try:
            assert torch.ops.rlad.cpu_isa() == request.param
        except RuntimeError:
            pytest.skip(f"this CPU has no {request.param}")
    return request.param


class Side:
    """Raw logits of one side, what tempers them, and the log-normaliser in two parts."""

    def __init__(self, raw: Tensor, *, bias: bool = False, scale: float = 1.0, softcap: float = 0.0, temps: bool = False) -> None:
        self.raw, self.scale, self.softcap = raw, scale, softcap
        self.bias = torch.randn(raw.shape[1]).to(raw.dtype) if bias else None
        self.inv_temp = (torch.rand(len(raw)) + 0.5 if temps else torch.ones(len(raw))).to(raw.dtype)

    def z(self, raw: Tensor) -> Tensor:
        a = (raw if self.bias is None else raw + self.bias.to(raw.dtype)) * self.scale
        return (self.softcap * torch.tanh(a / self.softcap) if self.softcap else a) * self.inv_temp.to(raw.dtype).unsqueeze(1)

    @property
    def args(self) -> tuple[Any, ...]:
        z = self.z(self.raw.double())
        top = z.amax(1)
        norm = torch.stack([top, (z - top[:, None]).exp().sum(1).log()]).to(self.raw)
        return self.raw, self.bias, self.inv_temp, self.scale, self.softcap, norm


Args = tuple[Any, ...]


def of_columns(args: Args, c: slice) -> Args:
    """Those of some columns."""
    raw, bias, *rest = args
    return raw[:, c], None if bias is None else bias[c].contiguous(), *rest


def rows_of(student: Args, teacher: Args, row: Row, weights: Tensor, cuts: tuple[slice, ...] = (slice(None),)) -> Tensor:
    """What a family wants of each row, with the columns in one part or several."""
    family, numbers, forward, reverse = row
    rows = torch.cat([weights, weights.new_tensor([[forward], [reverse]]).expand_as(weights)])
    if family == "taid":
        parts = weights.new_zeros(len(cuts), 4, weights.shape[1])
        for c, sums in zip(cuts, parts, strict=True):
            sides = (*of_columns(student, c), *of_columns(teacher, c))
            torch.ops.rlad.divergence_(weights[0], None, *sides, rows, "taid_norm", *numbers, False, sums)
        rows[2:] = taid_normaliser(parts[:, :3])
    return rows


def apply(student: Side, teacher: Side, row: Row, weights: Tensor, out: Tensor | None, value: Tensor, accumulate: bool) -> None:
    family, numbers, *_ = row
    rows = rows_of(student.args, teacher.args, row, weights)
    raw, *rest = teacher.args
    raw = raw if out is None else raw.clone()  # which a gradient may overwrite
    torch.ops.rlad.divergence_(value, out, *student.args, raw, *rest, rows, family, *numbers, accumulate)


def expected(student: Side, teacher: Side, row: Row, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ weighted terms and their gradient in float64."""
    raw = student.raw.detach().double().requires_grad_()
    lq, lp = student.z(raw).log_softmax(1), teacher.z(teacher.raw.double()).log_softmax(1)
    value = reference.divergence(lq, lp, *row)
    (grad,) = torch.autograd.grad((value * weights[1].double()).sum(), raw)
    return value.detach() * weights[0].double(), grad


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.cpu)], ids=["f32", "f64"])
@pytest.mark.parametrize("name", ROWS)
def test_value_and_gradient(isa: str, name: str, dtype: torch.dtype) -> None:
    row = ROWS[name]
    x = torch.randn(3, COLUMNS, dtype=dtype) * 2
    y = x * 1.2 + torch.randn_like(x)
    x[:, 5] = y[:, 5] = -torch.inf  # a padded column
    student, teacher = Side(x, bias=True, temps=True), Side(y, scale=0.9)
    weights = torch.tensor([[1.0, 0.3, 2.0], [0.7, -2.0, 0.0]], dtype=dtype)
    value, grad = expected(student, teacher, row, weights)
    out, found = torch.full_like(x, 7.0), torch.full((3,), 7.0, dtype=dtype)
    apply(student, teacher, row, weights, out, found, False)
    reach = max(1.0, sum(map(abs, row[1])))  # an exponent multiplies the error of a log-prob
    tolerance = reach * (2e-6 if dtype == torch.float32 else 1e-13)
    assert ((found.double() - value).abs() <= tolerance * value.abs()).all()
    assert relative(out, grad) <= tolerance
    assert (out[2] == 0).all()
    apply(student, teacher, row, weights, out, found, True)  # adds
    assert relative(out, 2 * grad) <= tolerance
    assert relative(found, 2 * value) <= tolerance
    again = torch.empty_like(found)
    apply(student, teacher, row, weights, None, again, False)
    assert torch.equal(again, found / 2)
    apply(student, teacher, row, weights, student.raw, again, False)  # in place
    assert relative(student.raw, grad) <= tolerance


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", ("plain", "softcap", "parts"))
@pytest.mark.parametrize("name", ("both" if "both" in ROWS else "reverse", "mix", "taid"))
def test_a_narrower_gradient_is_the_same_rounded(isa: str, name: str, kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, COLUMNS) * 2
    student = Side(x, bias=True, temps=True, softcap=9.0 * (kind == "softcap"))
    weights = torch.tensor([[1.0, 0.3, 2.0], [0.7, -2.0, 0.0]])
    row, teacher = ROWS[name], Side(x * 1.2 + torch.randn_like(x), scale=0.9)
    outs = [torch.full((3, COLUMNS + 3), 7.0, dtype=d)[:, :COLUMNS] for d in (torch.float32, dtype)]
    rows = rows_of(student.args, teacher.args, row, weights)
    sums = None
    if kind == "parts":
        sums = torch.zeros(4, 3)
        given = (*student.args, *teacher.args, rows, row[0], *row[1], False)
        torch.ops.rlad.divergence_(torch.zeros(3), None, *given, sums)
    values = [torch.zeros(3), torch.zeros(3)]
    for out, value in zip(outs, values, strict=True):
        raw, *rest = teacher.args
        torch.ops.rlad.divergence_(value, out, *student.args, raw.clone(), *rest, rows, row[0], *row[1], False, sums)
    assert outs[0][:2].count_nonzero() > COLUMNS
    assert torch.equal(outs[1], outs[0].to(dtype))
    assert torch.equal(*values)


@pytest.mark.parametrize("name", ROWS)
def test_columns_in_parts(isa: str, name: str) -> None:
    """The sums of each part, added, and with them each part's gradient; in one row a column has nearly all of q."""
    family, numbers, *_ = row = ROWS[name]
    x = torch.randn(3, 700) * 2
    y = x * 1.2 + torch.randn_like(x)
    x[1, 100] += 20
    y[1, 100] += 18
    student, teacher = Side(x, bias=True, temps=True), Side(y, scale=0.9)
    weights = torch.tensor([[1.0, 0.3, 0.0], [0.7, -2.0, 0.0]])
    value, grad = expected(student, teacher, row, weights)
    cuts = (slice(0, 99), slice(99, 400), slice(400, 700))
    rows = rows_of(student.args, teacher.args, row, weights, cuts)

    def part(out: Tensor | None, sums: Tensor, c: slice) -> None:
        sides = [of_columns(side.args, c) for side in (student, teacher)]
        untouched = torch.full((3,), 7.0)
        given = (*sides[0], sides[1][0].clone(), *sides[1][1:], rows, family, *numbers, False)
        torch.ops.rlad.divergence_(untouched, out, *given, sums)
        assert (untouched == 7).all()

    found = torch.zeros(len(cuts), 4, 3)
    for sums, c in zip(found, cuts, strict=True):
        part(None, sums, c)
    total = found.sum(0)
    assert relative(torch.where(weights[0] == 0, 0, weights[0] * total[0]), value) <= 3e-6 * max(1.0, sum(map(abs, numbers)))
    out = torch.full_like(x, 7.0)
    for c in cuts:
        part(out[:, c], total, c)
    assert relative(out, grad) <= 3e-6 * max(1.0, sum(map(abs, numbers)))


@slow
@pytest.mark.parametrize("name", ROWS)
def test_softcaps(isa: str, name: str) -> None:
    x = torch.randn(2, 300) * 2
    student = Side(x, bias=True, softcap=3.0, scale=1.7, temps=True)
    teacher = Side(x + torch.randn_like(x), bias=True, softcap=6.0, scale=1.3)
    weights = torch.ones(2, 2)
    value, grad = expected(student, teacher, ROWS[name], weights)
    out, found = torch.empty_like(x), torch.empty(2)
    apply(student, teacher, ROWS[name], weights, out, found, False)
    assert relative(found, value) <= 2e-6
    assert relative(out, grad) <= 3e-6


@pytest.mark.parametrize("name", ROWS)
def test_small_divergences_keep_their_relative_accuracy(isa: str, name: str) -> None:
    """w ≈ 1e-3 with logits whose float32 rounding allows 1e-7: six digits fewer and the value would be noise."""
    x = torch.randint(-512, 512, (2, COLUMNS)) / 64.0
    y = x + torch.randint(-8, 8, x.shape) / 4096.0
    student, teacher = Side(x), Side(y)
    weights = torch.ones(2, 2)
    value, grad = expected(Side(x.double()), Side(y.double()), ROWS[name], weights)
    out, found = torch.empty_like(x), torch.empty(2)
    apply(student, teacher, ROWS[name], weights, out, found, False)
    assert relative(found, value) <= 5e-4
    assert relative(out, grad) <= 2e-3


@slow
@pytest.mark.parametrize("name", ROWS)
def test_equal_logits_give_exactly_zero(isa: str, name: str) -> None:
    x = torch.randn(2, COLUMNS) * 20
    x[:, 3] = -torch.inf
    out, found = torch.full_like(x, 7.0), torch.full((2,), 7.0)
    apply(Side(x), Side(x.clone()), ROWS[name], torch.ones(2, 2), out, found, False)
    assert (found == 0).all()
    assert (out == 0).all()


def test_columns_without_mass_on_one_side(isa: str) -> None:
    """p = 0 costs forward KL nothing and reverse KL everything, and the other way round; mixtures stay finite."""
    x, y, weights = torch.randn(1, 40), torch.randn(1, 40), torch.ones(2, 1)
    hole = torch.arange(40) == 7
    for name in ("forward", "reverse", "mix", "alpha-beta", "beta-0", "alpha-0", "total-variation"):
        for side, infinite in (("student", ("forward", "beta-0")), ("teacher", ("reverse", "alpha-0"))):
            (student, teacher), (far, near) = (
                [Side(torch.where(hole & (side == who), low, raw)) for who, raw in (("student", x), ("teacher", y))]
                for low in (-torch.inf, -700.0)
            )
            out, found = torch.empty_like(x), torch.empty(1)
            apply(student, teacher, ROWS[name], weights, out, found, False)
            assert bool(found.isinf()) == (name in infinite), (name, side)
            if name not in infinite:  # in float64 a log-prob of −700 has no mass left to speak of
                value, grad = expected(far, near, ROWS[name], weights)
                assert relative(found, value) <= 3e-6, (name, side)
                assert relative(out, grad) <= 3e-6, (name, side)


@slow
def test_rows_without_weight_are_zero_whatever_they_hold(isa: str) -> None:
    x, y = torch.randn(2, 30), torch.randn(2, 30)
    y[1] = torch.nan
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    out, found = torch.full_like(x, 7.0), torch.full((2,), 7.0)
    apply(Side(x), Side(y), ROWS["reverse"], weights, out, found, False)
    assert found[1] == 0
    assert (out[1] == 0).all()
    assert out[0].isfinite().all()


@pytest.mark.cpu
def test_bad_calls_name_the_argument() -> None:
    x, value = torch.randn(2, 9), torch.empty(2)
    with pytest.raises(RuntimeError, match=r"divergence_: family must be sym, mix.*got other"):
        apply(Side(x), Side(x), ("other", (0.0, 0.0, 0.0), 0.0, 0.0), torch.ones(2, 2), None, value, False)
    with pytest.raises(RuntimeError, match=r"divergence_: sums must be a tensor \(4, R\) for taid_norm, got None"):
        apply(Side(x), Side(x), ("taid_norm", (0.4, 0.0, 0.0), 0.0, 0.0), torch.ones(2, 2), None, value, False)
    for wrong, accumulate in ((x.bfloat16(), True), (x.int(), False), (x[:, :5].bfloat16(), False)):
        with pytest.raises(RuntimeError, match="divergence_: out must be"):
            apply(Side(x), Side(x), ROWS["reverse"], torch.ones(2, 2), wrong, value, accumulate)
    with pytest.raises(RuntimeError, match=r"divergence_: teacher must be float32 \(2, 9\)"):
        apply(Side(x), Side(x[:, :5]), ROWS["reverse"], torch.ones(2, 2), None, value, False)
