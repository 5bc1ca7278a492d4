"""The CPU's bfloat16 product against float64, and the sweeps on top of it, on every instruction set this CPU has.

A sum of K products in float32 is off by at most about K·u of the sum of magnitudes, and by √K·u as roundings go; the budget
is 8·√K·u.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.backends.contract import INTERPRET, has_cpp
from tests.sweeps import Own, problem, relative

if INTERPRET or not has_cpp():
    pytest.skip("the C++ backend is not loaded", allow_module_level=True)

pytestmark = pytest.mark.cpu
rlad = torch.ops.rlad
BF16 = torch.bfloat16
NATIVE, WIDENED = ("avx512_bf16", "amx_bf16"), ("generic", "avx2", "avx512")
UNTOUCHED = 77.0
SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (32, 32, 32),
    (33, 65, 31),
    (31, 33, 64),
    (64, 300, 1057),
    (300, 64, 33),
    (257, 1, 2100),
    (1, 290, 1025),
]
LAYOUTS = list(itertools.product(("rows", "columns"), repeat=2))


def force(isa, monkeypatch):
    monkeypatch.setenv("RLAD_CPU_ISA", isa)
    try:
        assert rlad.cpu_isa() == isa
    except RuntimeError:
        pytest.skip(f"this CPU has no {isa}")
    return isa


@pytest.fixture(params=NATIVE)
def isa(request, monkeypatch):
    return force(request.param, monkeypatch)


def matrix(rows, cols, layout="rows", pad=0):
    """Random, as a view with ``pad`` elements of NaN around its rows (or columns, where those lie along memory)."""
    rows, cols = (rows, cols) if layout == "rows" else (cols, rows)
    whole = torch.full((rows, cols + 2 * pad), torch.nan, dtype=BF16)
    view = whole[:, pad : pad + cols]
    view.copy_(torch.randn(rows, cols))
    return view if layout == "rows" else view.t()


def check(out, a, b, before=0):
    """``out`` is ``before`` + a @ b."""
    a, b, before = a.double(), b.double(), torch.as_tensor(before).double()
    budget = 8 * math.sqrt(a.shape[1]) * 2.0**-24 * (a.abs() @ b.abs() + before.abs())
    assert ((out.double() - (before + a @ b)).abs() <= budget).all()


@pytest.mark.parametrize("pad", (0, 3))
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_matches_float64(isa, m, n, k, layouts, pad):
    a, b = matrix(m, k, layouts[0], pad), matrix(k, n, layouts[1], pad)
    around = torch.full((m, n + 5), UNTOUCHED)
    out = around[:, 2 : 2 + n]
    rlad.bf16_mm_(out, a, b, False)
    check(out, a, b)
    before = torch.randn(m, n)
    out.copy_(before)
    rlad.bf16_mm_(out, a, b, True)
    check(out, a, b, before)
    assert (around[:, :2] == UNTOUCHED).all() and (around[:, 2 + n :] == UNTOUCHED).all()


def test_nothing_to_sum_and_nothing_to_write(isa):
    out = torch.full((2, 3), UNTOUCHED)
    rlad.bf16_mm_(out, matrix(2, 0), matrix(0, 3), True)
    assert (out == UNTOUCHED).all()
    rlad.bf16_mm_(out, matrix(2, 0), matrix(0, 3), False)
    assert not out.any()
    rlad.bf16_mm_(torch.empty(0, 3), matrix(0, 4), matrix(4, 3), False)
    rlad.bf16_mm_(torch.empty(2, 0), matrix(2, 4), matrix(4, 0), False)


def test_repeated_rows_and_infinities(isa):
    """An expanded operand has stride 0; an infinity or NaN stays in its row and column."""
    a, b = matrix(1, 40).expand(50, 40), matrix(40, 70)
    b[3, 7], b[4, 9] = torch.inf, torch.nan
    out = torch.empty(50, 70)
    rlad.bf16_mm_(out, a, b, False)
    special = torch.zeros(70, dtype=torch.bool)
    special[[7, 9]] = True
    assert out[:, 7].isinf().all() and out[:, 9].isnan().all()
    assert out[:, ~special].isfinite().all()
    assert (out[:, ~special] == out[:1, ~special]).all()


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
def test_bitwise_equal_for_any_thread_count(isa, layouts):
    a, b = matrix(700, 2500, layouts[0]), matrix(2500, 333, layouts[1])

    def run(threads):
        torch.set_num_threads(threads)
        out = torch.zeros(700, 333)
        for accumulate in (False, True):
            rlad.bf16_mm_(out, a, b, accumulate)
        return out

    before = torch.get_num_threads()
    try:
        results = [run(threads) for threads in (1, 1, 2, 3, 7)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_torch_and_ours_take_turns(isa):
    """torch's own bfloat16 products use the tile registers too."""
    a, b, out = matrix(64, 96), matrix(96, 64), torch.empty(64, 64)
    first = a @ b
    for _ in range(3):
        rlad.bf16_mm_(out, a, b, False)
        assert torch.equal(a @ b, first)
        check(out, a, b)


def test_bad_arguments_name_the_op_and_the_argument(isa):
    a, b, out = matrix(4, 6), matrix(6, 8), torch.empty(4, 8)
    with pytest.raises(RuntimeError, match=r"bf16_mm_: a must be a bfloat16 matrix, got float32 \(4, 6\)"):
        rlad.bf16_mm_(out, a.float(), b, False)
    with pytest.raises(RuntimeError, match=r"bf16_mm_: b must be a bfloat16 matrix, got bfloat16 \(6\)"):
        rlad.bf16_mm_(out, a, b[:, 0], False)
    with pytest.raises(RuntimeError, match=r"bf16_mm_: b must be a matrix with a's 6 columns as its rows, got bfloat16 \(4, 8\)"):
        rlad.bf16_mm_(out, a, b[:4], False)
    with pytest.raises(RuntimeError, match=r"bf16_mm_: b must be a matrix with stride 1 in one dimension, .*strides \(16, 2\)"):
        rlad.bf16_mm_(out, a, matrix(6, 16)[:, ::2], False)
    with pytest.raises(RuntimeError, match=r"bf16_mm_: out must be float32 \(4, 8\) with stride 1.*got bfloat16 \(4, 8\)"):
        rlad.bf16_mm_(out.to(BF16), a, b, False)
    with pytest.raises(RuntimeError, match=r"bf16_mm_: out must be float32 \(4, 8\) with stride 1.*got float32 \(4, 7\)"):
        rlad.bf16_mm_(out[:, :7], a, b, False)


@pytest.mark.parametrize("name", WIDENED)
def test_other_instruction_sets_say_they_have_no_product(name, monkeypatch):
    force(name, monkeypatch)
    assert not rlad.has_bf16_mm()
    with pytest.raises(RuntimeError, match=rf"bf16_mm_: RLAD_CPU_ISA must be avx512_bf16 or amx_bf16.*got {name}"):
        rlad.bf16_mm_(torch.empty(1, 1), matrix(1, 1), matrix(1, 1), False)


@pytest.mark.parametrize("name", (*WIDENED, *NATIVE))
@pytest.mark.parametrize("tile", (None, (64, 64), (4096, 4096)))
def test_sweeps_keep_the_contract(name, tile, monkeypatch):
    """bfloat16 logits of sigma 3: log-probs within 1e-4 of float64, gradients within 3e-3, two runs bitwise equal."""
    force(name, monkeypatch)
    p = problem(n=128, d=96, v=3000, dtype=BF16, bias=False)
    if tile is not None:
        rk.set_tile(*tile)
    p64 = p.twin()
    g = torch.randn(128)

    def separate(q):
        logp = rk.linear_logp(q.hidden, q.head, q.target).logp
        return logp, *torch.autograd.grad((logp * g.to(logp.dtype)).sum(), q.leaves)

    def inside(q):
        loss, reduction = Own(lambda scores: scores.logp), rk.Reduction(denominator=1)
        out = rk.linear_loss(q.hidden, q.head, q.target, loss, w=g, reduction=reduction)
        return out.token_loss, *torch.autograd.grad(out.loss, q.leaves)

    exact = separate(p64)
    for run in (separate, inside):
        got, again = run(p), run(p)
        assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
        assert all(relative(x, y) < 3e-3 for x, y in zip(got[1:], exact[1:], strict=True))
    assert (separate(p)[0] - exact[0]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name, said", [("avx2", "bfloat16 products widened to float32"), ("avx512_bf16", "bfloat16 products native")]
)
def test_the_doctor_says_which_product_is_used(name, said, monkeypatch):
    force(name, monkeypatch)
    run = subprocess.run([sys.executable, "-m", "rlad_kernels"], capture_output=True, text=True, check=False)
    assert f"instruction set {name}, {said}" in run.stdout, run.stdout + run.stderr
