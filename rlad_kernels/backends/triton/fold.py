"""fold_: one tile of raw logits folded into the running softmax statistics of each row."""

import torch
import triton
import triton.language as tl

from ._columns import load_columns, load_raw, slot_columns
from ._launch import launch, require_dtype
from ._math import LOWEST, bounded, tempered
from .configs import pick

# A slot column is marked in place while the row is swept. Not by -inf: under a softcap -inf is an ordinary column
# (tanh(-inf) = -1). The mark is a NaN whose payload no arithmetic produces, and it is compared as bits.
MARK = tl.constexpr(0x7FC0DEAD)


@triton.jit
def _absorb(b_z, b_m, b_rest, b_restz, b_restsq, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr):
    """One lane-wise step of Σ e^{z−m}, Σ e^{z−m}(z−m), Σ e^{2(z−m)} with a single exponential, whichever of z, m is larger."""
    b_gap = bounded(-tl.abs(b_z - b_m))
    b_e = tl.exp(b_gap)
    m_up = b_z > b_m
    if ENTROPY:
        b_restz = tl.where(m_up, b_e * (b_restz + b_gap * b_rest), b_restz + b_e * b_gap)
    if EXTRAS:
        b_restsq = tl.where(m_up, b_restsq * b_e * b_e + 1.0, b_restsq + b_e * b_e)
    b_rest = tl.where(m_up, b_rest * b_e + 1.0, b_rest + b_e)
    return tl.where(m_up, b_z, b_m), b_rest, b_restz, b_restsq


@triton.jit
def _load_z(p_logits, p_bias, o_c, C, logit_scale, softcap, inv_temp, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Raw bits and tempered logits of one block of columns."""
    b_x = load_columns(p_logits, o_c, o_c < C, MASKED)
    b_bits = b_x.to(tl.int32, bitcast=True)
    if p_bias is not None:
        b_x += load_columns(p_bias, o_c, o_c < C, MASKED)
    return b_bits, tempered(b_x, logit_scale, softcap, inv_temp, SOFTCAP)[0]


@triton.jit
def _step(
    p_logits,
    p_bias,
    o_c,
    C,
    logit_scale,
    softcap,
    inv_temp,
    b_m,
    b_rest,
    b_restz,
    b_restsq,
    b_sumz,
    b_first,
    MASKED: tl.constexpr,
    MARKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
):
    """Absorb one block of columns; marked and masked columns count as z = −inf."""
    b_bits, b_z = _load_z(p_logits, p_bias, o_c, C, logit_scale, softcap, inv_temp, MASKED, SOFTCAP)
    if MASKED:
        b_z = tl.where(o_c < C, b_z, -float("inf"))
    if MARKED:
        b_z = tl.where(b_bits == MARK, -float("inf"), b_z)
    elif EXTRAS:
        b_sumz += tl.where(o_c < C, b_z, 0.0) if MASKED else b_z
    if EXTRAS:
        b_first = tl.where(b_z > b_m, o_c, b_first)
    b_m, b_rest, b_restz, b_restsq = _absorb(b_z, b_m, b_rest, b_restz, b_restsq, ENTROPY, EXTRAS)
    return b_m, b_rest, b_restz, b_restsq, b_sumz, b_first


@triton.jit(do_not_specialize=["col0", "J"])
def fold_kernel(
    logits,
    stride_x,
    C,
    col0,
    bias,
    inv_temp,
    logit_scale,
    softcap,
    slots,
    J,
    slot_logits,
    stats,
    stride_s,
    SLOTS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """m ← max(m, z) and rest ← e^{m₀−m}·rest + Σ e^{z−m} off the slots (restz, restsq alike); Σz; slot z's read out."""
    i_r = tl.program_id(0).to(tl.int64)
    p_x = logits + i_r * stride_x
    p_slot = slots + i_r * J
    p_out = slot_logits + i_r * J
    it = tl.load(inv_temp + i_r)
    MARKED: tl.constexpr = SLOTS and EXCLUDE
    o_b = tl.arange(0, BLOCK)
    o_j = tl.arange(0, BLOCK_J)

    b_sumz = tl.zeros([BLOCK], tl.float32)
    sumz = 0.0
    if MARKED and EXTRAS:  # Σz runs over the slot columns too, and duplicates must count once: sum before marking
        for c0 in range(0, C, BLOCK):
            o_c = c0 + o_b
            _, b_z = _load_z(p_x, bias, o_c, C, logit_scale, softcap, it, True, SOFTCAP)
            b_sumz += tl.where(o_c < C, b_z, 0.0)
        sumz = tl.sum(b_sumz, 0)

    if SLOTS:
        for j0 in range(0, J, BLOCK_J):
            b_c, m_c = slot_columns(p_slot, j0 + o_j, J, col0, C)
            if MARKED:  # while the row is marked, slot_logits keeps the raw values: J is unbounded, registers are not
                b_x = load_columns(p_x, b_c, m_c, True)
            else:
                b_x = tempered(load_raw(p_x, bias, b_c, m_c, True), logit_scale, softcap, it, SOFTCAP)[0]
            tl.store(p_out + j0 + o_j, b_x, mask=m_c)
        if MARKED:
            tl.debug_barrier()  # every raw value is read before the first mark: duplicates read the same column
            b_mark = tl.full([BLOCK_J], MARK, tl.int32).to(tl.float32, bitcast=True)
            for j0 in range(0, J, BLOCK_J):
                b_c, m_c = slot_columns(p_slot, j0 + o_j, J, col0, C)
                tl.store(p_x + b_c, b_mark, mask=m_c)
            tl.debug_barrier()

    p_s = stats + i_r
    m_old = tl.load(p_s)
    rest_old = tl.load(p_s + stride_s)
    b_m = tl.full([BLOCK], LOWEST, tl.float32)
    b_rest = tl.zeros([BLOCK], tl.float32)
    b_restz = tl.zeros([BLOCK], tl.float32)
    b_restsq = tl.zeros([BLOCK], tl.float32)
    b_first = o_b  # of each lane, the column of its maximum
    # full blocks without a mask: an odd C would otherwise cost every load its width
    full = C // BLOCK * BLOCK
    for c0 in range(0, full, BLOCK):
        b_m, b_rest, b_restz, b_restsq, b_sumz, b_first = _step(
            p_x,
            bias,
            c0 + o_b,
            C,
            logit_scale,
            softcap,
            it,
            b_m,
            b_rest,
            b_restz,
            b_restsq,
            b_sumz,
            b_first,
            False,
            MARKED,
            SOFTCAP,
            ENTROPY,
            EXTRAS,
        )
    if full < C:
        b_m, b_rest, b_restz, b_restsq, b_sumz, b_first = _step(
            p_x,
            bias,
            full + o_b,
            C,
            logit_scale,
            softcap,
            it,
            b_m,
            b_rest,
            b_restz,
            b_restsq,
            b_sumz,
            b_first,
            True,
            MARKED,
            SOFTCAP,
            ENTROPY,
            EXTRAS,
        )

    if MARKED:
        tl.debug_barrier()
        for j0 in range(0, J, BLOCK_J):
            b_c, m_c = slot_columns(p_slot, j0 + o_j, J, col0, C)
            b_x = tl.load(p_out + j0 + o_j, mask=m_c, other=0.0)
            tl.store(p_x + b_c, b_x, mask=m_c)
            if bias is not None:
                b_x += load_columns(bias, b_c, m_c, True)
            tl.store(p_out + j0 + o_j, tempered(b_x, logit_scale, softcap, it, SOFTCAP)[0], mask=m_c)

    # a lane that saw nothing but −inf still holds LOWEST and must not pass for a maximum
    b_m_seen = tl.where(b_rest > 0, b_m, -float("inf"))
    m_tile = tl.max(b_m_seen, 0)
    m_new = tl.maximum(m_old, m_tile)
    ref = tl.where(m_new == -float("inf"), 0.0, m_new)
    gap_old = bounded(m_old - ref)
    e_old = tl.exp(gap_old)
    b_gap = bounded(b_m - ref)
    b_e = tl.exp(b_gap)
    tl.store(p_s, m_new)
    tl.store(p_s + stride_s, rest_old * e_old + tl.sum(b_rest * b_e, 0))
    if ENTROPY:
        restz_old = tl.load(p_s + 2 * stride_s)
        restz = tl.sum(b_e * (b_restz + b_gap * b_rest), 0)
        tl.store(p_s + 2 * stride_s, e_old * (restz_old + gap_old * rest_old) + restz)
    if EXTRAS:
        restsq_old = tl.load(p_s + 3 * stride_s)
        tl.store(p_s + 3 * stride_s, restsq_old * e_old * e_old + tl.sum(b_restsq * b_e * b_e, 0))
        if not MARKED:
            sumz = tl.sum(b_sumz, 0)
        tl.store(p_s + 4 * stride_s, tl.load(p_s + 4 * stride_s) + sumz)
        first = col0 + tl.min(tl.where(b_m_seen == m_tile, b_first, C), 0)
        tl.store(p_s + 5 * stride_s, first.to(tl.float32), mask=m_tile > m_old)


def fold_(
    logits: torch.Tensor,
    col0: int,
    bias: torch.Tensor | None,
    inv_temp: torch.Tensor,
    logit_scale: float,
    softcap: float,
    slots: torch.Tensor,
    exclude: bool,
    stats: torch.Tensor,
    slot_logits: torch.Tensor,
    entropy: bool,
    extras: bool,
) -> None:
    """Fold the tile `logits (R, C)` into `stats (6, R)` and read the tempered logits of `slots` out of it, in place."""
    require_dtype("fold_", logits=logits, bias=bias, inv_temp=inv_temp, stats=stats, slot_logits=slot_logits)
    rows, cols = logits.shape
    launch(
        fold_kernel,
        (rows,),
        pick("fold_kernel", cols),
        logits,
        logits.stride(0),
        cols,
        col0,
        bias,
        inv_temp.contiguous(),
        logit_scale,
        softcap,
        slots.contiguous(),
        slots.shape[1],
        slot_logits,
        stats,
        stats.stride(0),
        SLOTS=slots.shape[1] > 0,
        EXCLUDE=exclude,
        SOFTCAP=softcap > 0,
        ENTROPY=entropy,
        EXTRAS=extras,
    )
