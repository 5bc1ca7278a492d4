"""divergence_: a divergence between two rows of logits, and its gradient with respect to the first's raw logits."""

from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._columns import Row, load_columns, load_z
from ._divergence_terms import FAMILIES, Term, mixed, numbers, part, tilt
from ._kernel import HALVES, WIDE_LOAD, WIDE_STORE, Case, R, add_kernel, flag_sets, meta, tempering, tiles
from ._launch import config, launch, pick, require_dtype
from ._math import Tempering, cast, exp_ulp

# A column costs 8 bytes read for the value; with a gradient 4 more written, the u that takes the teacher's place, then 8 read and
# 4 written: 24, and 22 where out is in 16 bits, which saves a cast of 6. Instructions of sm_90 in both passes: 149 in the family
# "sym", 228 for a mixture, 3 and 5 of them transcendental. A H200 issues 28.7 T/s, which is 4.6 and 3.0 TB/s next to a copy's 3.7
# to 4.3: arithmetic and memory are level. By the columns: 4 a thread, so that the temporaries of mixtures and of the αβ family
# fit into about 64 registers, eight programs an SM.
TABLE = (config(inf, 4, BLOCK=512),)

# dz = u − q·Σu. Of the one column with more than half of q, where there is one, it is minus the sum of the others': 1 − q cancels.
DOMINANT = tl.constexpr(-0.6911491778972723)  # log 0.501


class Side(NamedTuple):
    """A model's row of logits and its log-normaliser, top + log_total."""

    row: Row
    top: tl.tensor
    log_total: tl.tensor


class Sums(NamedTuple):
    """Σ value, Σ u, and Σ u and Σ q of all columns but the dominant one."""

    value: tl.tensor
    u: tl.tensor
    other_u: tl.tensor
    other_q: tl.tensor


@triton.jit
def _log_probs(side, o_c, MASKED: tl.constexpr):
    """(log-probs, dz/draw) of one block of columns; −inf beyond the last."""
    b_z, b_slope = load_z(side.row, o_c, o_c < side.row.cols, MASKED)
    b_lp = (b_z - side.top) - side.log_total
    return (tl.where(o_c < side.row.cols, b_lp, -float("inf")) if MASKED else b_lp), b_slope


@triton.jit
def _add(b_sum, b_x):
    """Running sums of a block, each over some neighbouring columns: fewer registers than one of every column."""
    return b_sum + tl.sum(tl.reshape(b_x, [b_sum.shape[0], b_x.shape[0] // b_sum.shape[0]]), 1)


@triton.jit
def _store_columns(p_row, b_x, o_c, cols, MASKED: tl.constexpr):
    if MASKED:
        tl.store(p_row + o_c, b_x, mask=o_c < cols)
    else:
        tl.store(p_row + o_c, b_x)


@triton.jit
def _sum_step(
    student, teacher, term, o_c, sums, MASKED: tl.constexpr, FAMILY: tl.constexpr, SWAP: tl.constexpr, GRAD: tl.constexpr,
    OTHERS: tl.constexpr,
):  # fmt: skip
    """Add one block of columns to the sums; with GRAD their u takes the place of the teacher's logits."""
    b_lq, _ = _log_probs(student, o_c, MASKED)
    b_lp, _ = _log_probs(teacher, o_c, MASKED)
    b_v, b_u, b_q = part(b_lq, b_lp, term, FAMILY, SWAP)
    b_other_u, b_other_q = sums.other_u, sums.other_q
    if GRAD:
        _store_columns(teacher.row.logits, b_u, o_c, student.row.cols, MASKED)
    if OTHERS:
        b_other_u = _add(b_other_u, tl.where(b_lq > DOMINANT, 0.0, b_u))
        b_other_q = _add(b_other_q, tl.where(b_lq > DOMINANT, 0.0, b_q))
    return Sums(_add(sums.value, b_v), _add(sums.u, b_u), b_other_u, b_other_q)


@triton.jit
def _grad_step(p_out, student, p_u, o_c, total, most, weight, MASKED: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Write or add weight·(u − q·Σu)·dz/draw of one block of columns."""
    b_lq, b_slope = _log_probs(student, o_c, MASKED)
    b_u = load_columns(p_u, o_c, o_c < student.row.cols, MASKED)
    b_dz = tl.where(b_lq > DOMINANT, most, b_u - exp_ulp(b_lq) * total)
    b_g = tl.where(weight == 0, 0.0, b_dz * weight * b_slope)
    if ACCUMULATE:
        b_g += load_columns(p_out, o_c, o_c < student.row.cols, MASKED)
    _store_columns(p_out, cast(b_g, p_out.dtype.element_ty), o_c, student.row.cols, MASKED)


@triton.jit
def _taid_norm(student, teacher, tau, o_b):
    """What Σq^{1−τ}·p^τ is made of: Σ tilt, the largest mixed, and Σ e^{mixed − largest}, 0 where none is above −inf."""
    b_tilt = tl.zeros(o_b.shape, tl.float32)
    b_top = tl.full(o_b.shape, -float("inf"), tl.float32)
    for c0 in range(0, student.row.cols, o_b.shape[0]):
        b_lq, _ = _log_probs(student, c0 + o_b, True)
        b_lp, _ = _log_probs(teacher, c0 + o_b, True)
        b_tilt += tilt(b_lq, b_lp, tau)
        b_top = tl.maximum(b_top, mixed(b_lq, b_lp, tau))
    top = tl.max(b_top, 0)
    b_sum = tl.zeros(o_b.shape, tl.float32)
    for c0 in range(0, student.row.cols, o_b.shape[0]):
        b_lq, _ = _log_probs(student, c0 + o_b, True)
        b_lp, _ = _log_probs(teacher, c0 + o_b, True)
        b_mixed = mixed(b_lq, b_lp, tau)
        b_sum += tl.where(b_mixed == -float("inf"), 0.0, exp_ulp(b_mixed - top))
    return tl.sum(b_tilt, 0), top, tl.sum(b_sum, 0)


@triton.jit
def divergence_kernel(
    value,
    out,
    stride_o,
    logits,
    stride_x,
    C,
    bias,
    inv_temp,
    logit_scale,
    softcap,
    norm,
    stride_n,
    teacher,
    stride_y,
    teacher_bias,
    teacher_inv_temp,
    teacher_scale,
    teacher_softcap,
    teacher_norm,
    stride_t,
    rows,
    stride_r,
    n0,
    n1,
    n2,
    n3,
    n4,
    n5,
    n6,
    n7,
    sums_out,
    stride_s,
    FAMILY: tl.constexpr,
    SWAP: tl.constexpr,
    GRAD: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """value = rows[0]·Σ term, and with GRAD out = rows[1]·(u − q·Σu)·dz/draw, which may take the logits' place.

    Of a part of the columns: without GRAD only `sums_out` is written, with it that holds the sums over all of them. In the family
    "taid_norm" only the three sums of :func:`_taid_norm` are written there.
    """
    OTHERS: tl.constexpr = GRAD or sums_out is not None
    i_r = tl.program_id(0).to(tl.int64)
    own = Tempering(logit_scale, softcap, tl.load(inv_temp + i_r))
    its = Tempering(teacher_scale, teacher_softcap, tl.load(teacher_inv_temp + i_r))
    top_q, log_q = tl.load(norm + i_r), tl.load(norm + stride_n + i_r)
    top_p, log_p = tl.load(teacher_norm + i_r), tl.load(teacher_norm + stride_t + i_r)
    q = Side(Row(logits + i_r * stride_x, bias, C, own), top_q, log_q)
    p = Side(Row(teacher + i_r * stride_y, teacher_bias, C, its), top_p, log_p)
    stride_r = tl.cast(stride_r, tl.int64)  # three of them may be beyond int32
    stride_s = tl.cast(stride_s, tl.int64)
    weight = tl.load(rows + i_r)
    forward, reverse = tl.load(rows + 2 * stride_r + i_r), tl.load(rows + 3 * stride_r + i_r)
    o_b = tl.arange(0, BLOCK)
    if FAMILY == "taid_norm":
        tilted, top, scaled = _taid_norm(q, p, n0, o_b)
        tl.store(sums_out + i_r, tilted)
        tl.store(sums_out + stride_s + i_r, top)
        tl.store(sums_out + 2 * stride_s + i_r, scaled)
        return
    term = Term(forward, reverse, n0, n1, n2, n3, n4, n5, n6, n7)

    b_zero = tl.zeros([BLOCK // 4], tl.float32)
    sums = Sums(b_zero, b_zero, b_zero, b_zero)
    # full blocks without a mask: an odd C would otherwise cost every load its width
    full = C // BLOCK * BLOCK
    for c0 in range(0, full, BLOCK):
        sums = _sum_step(q, p, term, c0 + o_b, sums, False, FAMILY, SWAP, GRAD, OTHERS)
    if full < C:
        sums = _sum_step(q, p, term, full + o_b, sums, True, FAMILY, SWAP, GRAD, OTHERS)
    whole = tl.sum(sums.value, 0)
    total = tl.sum(sums.u, 0)
    other_u = tl.sum(sums.other_u, 0)
    other_q = tl.sum(sums.other_q, 0)
    if FAMILY == "taid":  # no column has mass on both sides: there is no p_τ
        whole = tl.where(reverse == -float("inf"), float("inf"), whole)
    if sums_out is None:
        found = tl.where(weight == 0, 0.0, weight * whole)
        if ACCUMULATE:
            found += tl.load(value + i_r)
        tl.store(value + i_r, found)
    else:
        p_s = sums_out + i_r
        if GRAD:
            whole, total = tl.load(p_s), tl.load(p_s + stride_s)
            other_u, other_q = tl.load(p_s + 2 * stride_s), tl.load(p_s + 3 * stride_s)
        else:
            tl.store(p_s, whole)
            tl.store(p_s + stride_s, total)
            tl.store(p_s + 2 * stride_s, other_u)
            tl.store(p_s + 3 * stride_s, other_q)

    if GRAD:
        p_o = out + i_r * stride_o
        tl.debug_barrier()  # u may be another thread's
        # an infinite divergence without a finite gradient sends none; NaN logits still show
        pull = tl.where((whole == whole) & ~(tl.abs(total) < float("inf")), 0.0, tl.load(rows + stride_r + i_r))
        most = total * other_q - other_u
        for c0 in range(0, full, BLOCK):
            _grad_step(p_o, q, p.row.logits, c0 + o_b, total, most, pull, False, ACCUMULATE)
        if full < C:
            _grad_step(p_o, q, p.row.logits, full + o_b, total, most, pull, True, ACCUMULATE)


def divergence_(
    value: torch.Tensor,
    out: torch.Tensor | None,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    inv_temp: torch.Tensor,
    logit_scale: float,
    softcap: float,
    norm: torch.Tensor,
    teacher: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    teacher_inv_temp: torch.Tensor,
    teacher_scale: float,
    teacher_softcap: float,
    teacher_norm: torch.Tensor,
    rows: torch.Tensor,
    family: str,
    a: float,
    b: float,
    c: float,
    accumulate: bool,
    sums: torch.Tensor | None = None,
) -> None:
    """Write (or add) each row's weighted divergence into `value (R,)` and its gradient into `out (R, V)`, which may be `logits`.

    `out` may also be of the products' operand dtype, to which the gradient is rounded; it is then only written, not added to.

    `norm (2, R)` = (max z, lse − max); `rows (4, R)`: weight of the value, weight of the gradient, and the coefficients of
    forward and reverse KL in the family "sym", in "taid" log_z and top (0 if its normaliser is 1 + Σ tilt) with
    log Σq^{1−τ}·p^τ = log_z + top. `a, b, c` are the family's numbers. With `out`, `teacher` is overwritten.
    `sums (4, R)`: the logits are a part of the columns. Without `out` their Σ value, Σ u and Σ u, Σ q off the dominant column are
    written there, and nothing else; with it, it holds those over all columns, and `value` is left alone. The family "taid_norm"
    writes what TAID's normaliser is made of to the first three rows of `sums`, and nothing else.
    """
    require_dtype("divergence_", (torch.float32,) if accumulate else HALVES, out=out)
    require_dtype("divergence_", value=value, logits=logits, bias=bias, inv_temp=inv_temp, norm=norm)
    require_dtype("divergence_", teacher=teacher, teacher_bias=teacher_bias, teacher_norm=teacher_norm, rows=rows, sums=sums)
    if family not in FAMILIES:
        raise ValueError(f"divergence_: family must be one of {FAMILIES}, got {family!r}")
    if family == "taid_norm" and sums is None:
        raise ValueError("divergence_: sums must be a tensor (4, R) for taid_norm, got None")
    n_rows, cols = logits.shape
    launch(
        divergence_kernel, (n_rows,), pick(TABLE, cols),
        value, out, 0 if out is None else out.stride(0),
        logits, logits.stride(0), cols, bias, inv_temp.contiguous(), logit_scale, softcap or None, norm, norm.stride(0),
        teacher, teacher.stride(0), teacher_bias, teacher_inv_temp.contiguous(), teacher_scale, teacher_softcap or None,
        teacher_norm, teacher_norm.stride(0), rows, rows.stride(0), *numbers(family, a, b, c),
        sums, 0 if sums is None else sums.stride(0),
        FAMILY=family, SWAP=abs(b) < abs(a), GRAD=out is not None, ACCUMULATE=accumulate,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    several = tiles(TABLE)
    flags = flag_sets("bias", "teacher_bias", "softcap", "teacher_softcap", "grad", "accumulate")
    for tile in several:
        cols = tile.shape[1]
        for f in (*flags, frozenset({"grad"})):
            for family in FAMILIES if tile is several[0] else ("sym",):
                student = (tile, *tempering(f, cols), meta(2, R))
                teacher_flags = frozenset(x.removeprefix("teacher_") for x in f if x.startswith("teacher_"))
                teacher = (tile, *tempering(teacher_flags, cols), meta(2, R))
                rest = (meta(4, R), family, 0.8 if "softcap" in f else 0.2, 0.7, 0.3, "accumulate" in f)
                if family == "taid_norm":
                    args = (meta(R), None, *student, *teacher, *rest, meta(4, R))
                    yield Case(f"{family} C={cols} {'+'.join(sorted(f))}", divergence_, args, False)
                    continue
                args = (meta(R), tile if "grad" in f else None, *student, *teacher, *rest)
                yield Case(f"{family} C={cols} {'+'.join(sorted(f))}", divergence_, args, cols > 1 and "grad" in f)
                if f == {"grad"}:
                    for dtype in HALVES[1:]:
                        out = meta(R, tile.stride(0), dtype=dtype)[:, :cols]
                        yield Case(f"{family} C={cols} {dtype} grad", divergence_, (meta(R), out, *args[2:]), cols > 1)
                if tile is several[0] and f == {"grad"}:
                    for out in (None, tile):
                        part = (meta(R), out, *args[2:], meta(4, R))
                        yield Case(f"{family} part{' grad' * (out is not None)}", divergence_, part, out is not None)


add_kernel(divergence_kernel, divergence_, TABLE, cases, max_registers=80, wide=(WIDE_LOAD, WIDE_STORE), tempers=True)
