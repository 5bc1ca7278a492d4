"""fold_: one tile of raw logits folded into the running softmax statistics of each row."""

from collections.abc import Iterator
from math import inf

import torch
import triton
import triton.language as tl

from ._columns import Row, Slots, Sums, add_columns, join, lane_sum, load_columns, load_z, no_sums, slot_columns
from ._kernel import WIDE_LOAD, Case, J, R, add_kernel, flag_sets, ids, meta, tempering, tiles
from ._launch import config, launch, pick, require_dtype
from ._math import Tempering, tempered

# A slot column is marked in place while the row is swept. Not by -inf: under a softcap -inf is an ordinary column
# (tanh(-inf) = -1). The mark is a NaN whose payload no arithmetic produces, and it is compared as bits.
MARK = tl.constexpr(0x7FC0DEAD)

# A column costs 4 bytes read, an exponential and 11 other operations, 15 with slots and entropy: memory bounds it. By the columns
# of the tile: one maximum and one of each sum a thread, so that the loop has no word between threads, and 8 columns a thread, so
# that most flag combinations stay within 32 registers: 64 warps an SM with 2 loads each. H200, a tile of 4,096 × 16,384: measured
# at 3.2 to 3.3 of the 3.7 to 4.3 TB/s of a copy; a maximum a column and one load in flight reached 2.0.
TABLE = (
    config(512, 4, BLOCK=512, LANES=128, BLOCK_J=128),  # small vocabularies: half the threads idle in a wider block
    config(inf, 8, BLOCK=2048, LANES=256, BLOCK_J=256),
)


@triton.jit
def _step(row, o_c, s, MASKED: tl.constexpr, MARKED: tl.constexpr, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr):
    """Absorb one block of columns; marked and masked ones are z = −inf."""
    b_x = load_columns(row.logits, o_c, o_c < row.cols, MASKED)
    b_bits = b_x.to(tl.int32, bitcast=True)
    if row.bias is not None:
        b_x += load_columns(row.bias, o_c, o_c < row.cols, MASKED)
    b_z = tempered(b_x, row.tempering)[0]
    b_sumz = s.sumz
    if EXTRAS and not MARKED:
        b_sumz += lane_sum(tl.where(o_c < row.cols, b_z, 0.0) if MASKED else b_z, b_sumz.shape[0])
    if MASKED:
        b_z = tl.where(o_c < row.cols, b_z, -float("inf"))
    if MARKED:
        b_z = tl.where(b_bits == MARK, -float("inf"), b_z)
    s = add_columns(s, b_z, o_c, ENTROPY, EXTRAS)
    return Sums(s.m, s.rest, s.restz, s.restsq, b_sumz, s.first)


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
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """m ← max(m, z) and rest ← e^{m₀−m}·rest + Σ e^{z−m} off the slots (restz, restsq alike); Σz; slot z's read out."""
    i_r = tl.program_id(0).to(tl.int64)
    p_x = logits + i_r * stride_x
    p_out = slot_logits + i_r * J
    row = Row(p_x, bias, C, Tempering(logit_scale, softcap, tl.load(inv_temp + i_r)))
    own = Slots(slots + i_r * J, J, col0)
    o_b = tl.arange(0, BLOCK)
    o_j = tl.arange(0, BLOCK_J)

    sumz = 0.0
    if SLOTS and EXTRAS:  # Σz runs over the slot columns too, and duplicates must count once: sum before marking
        b_sumz = tl.zeros([LANES], tl.float32)
        for c0 in range(0, C, BLOCK):
            o_c = c0 + o_b
            b_sumz += lane_sum(tl.where(o_c < C, load_z(row, o_c, o_c < C, True)[0], 0.0), LANES)
        sumz = tl.sum(b_sumz, 0)

    if SLOTS:
        for j0 in range(0, J, BLOCK_J):
            b_c, m_c = slot_columns(own, j0 + o_j, C)
            # while the row is marked, slot_logits keeps the raw values: J is unbounded, registers are not
            tl.store(p_out + j0 + o_j, load_columns(p_x, b_c, m_c, True), mask=m_c)
        tl.debug_barrier()  # every raw value is read before the first mark: duplicates read the same column
        b_mark = tl.full([BLOCK_J], MARK, tl.int32).to(tl.float32, bitcast=True)
        for j0 in range(0, J, BLOCK_J):
            b_c, m_c = slot_columns(own, j0 + o_j, C)
            tl.store(p_x + b_c, b_mark, mask=m_c)
        tl.debug_barrier()

    s = no_sums(LANES)
    # full blocks without a mask: an odd C would otherwise cost every load its width
    full = C // BLOCK * BLOCK
    for c0 in range(0, full, BLOCK):
        s = _step(row, c0 + o_b, s, False, SLOTS, ENTROPY, EXTRAS)
    if full < C:
        s = _step(row, full + o_b, s, True, SLOTS, ENTROPY, EXTRAS)

    if SLOTS:
        tl.debug_barrier()
        for j0 in range(0, J, BLOCK_J):
            b_c, m_c = slot_columns(own, j0 + o_j, C)
            b_x = tl.load(p_out + j0 + o_j, mask=m_c, other=0.0)
            tl.store(p_x + b_c, b_x, mask=m_c)
            if bias is not None:
                b_x += load_columns(bias, b_c, m_c, True)
            tl.store(p_out + j0 + o_j, tempered(b_x, row.tempering)[0], mask=m_c)

    p_s = stats + i_r
    stride_s = tl.cast(stride_s, tl.int64)  # five of them may be beyond int32
    m_old = tl.load(p_s)
    restz_old = tl.load(p_s + 2 * stride_s) if ENTROPY else 0.0
    m, rest, restz, old, b_e, b_seen = join(s, m_old, tl.load(p_s + stride_s), restz_old, ENTROPY)
    tl.store(p_s, m)
    tl.store(p_s + stride_s, rest)
    if ENTROPY:
        tl.store(p_s + 2 * stride_s, restz)
    if EXTRAS:
        restsq_old = tl.load(p_s + 3 * stride_s)
        tl.store(p_s + 3 * stride_s, restsq_old * old * old + tl.sum(s.restsq * b_e * b_e, 0))
        if not SLOTS:
            sumz = tl.sum(s.sumz, 0)
        tl.store(p_s + 4 * stride_s, tl.load(p_s + 4 * stride_s) + sumz)
        first = col0 + tl.min(tl.where(b_seen == m, s.first, C), 0)
        tl.store(p_s + 5 * stride_s, first.to(tl.float32), mask=m > m_old)


def fold_(
    logits: torch.Tensor,
    col0: int,
    bias: torch.Tensor | None,
    inv_temp: torch.Tensor,
    logit_scale: float,
    softcap: float,
    slots: torch.Tensor,
    stats: torch.Tensor,
    slot_logits: torch.Tensor,
    entropy: bool,
    extras: bool,
) -> None:
    """Fold the tile `logits (R, C)` but its `slots` into `stats (6, R)`, and read their tempered logits out, in place."""
    require_dtype("fold_", logits=logits, bias=bias, inv_temp=inv_temp, stats=stats, slot_logits=slot_logits)
    rows, cols = logits.shape
    launch(
        fold_kernel,
        (rows,),
        pick(TABLE, cols),
        logits,
        logits.stride(0),
        cols,
        col0,
        bias,
        inv_temp.contiguous(),
        logit_scale,
        softcap or None,
        slots.contiguous(),
        slots.shape[1],
        slot_logits,
        stats,
        stats.stride(0),
        SLOTS=slots.shape[1] > 0,
        ENTROPY=entropy,
        EXTRAS=extras,
    )


def cases() -> Iterator[Case]:
    several = tiles(TABLE)
    for tile in several:
        cols = tile.shape[1]
        for f in flag_sets("bias", "softcap", "slots", "entropy", "extras", single=tile is several[1]):
            j = J if "slots" in f else 0
            args = (tile, 0, *tempering(f, cols), ids(R, j), meta(6, R), meta(R, j), "entropy" in f, "extras" in f)
            yield Case(f"C={cols} {'+'.join(sorted(f))}", fold_, args, cols > 1)


add_kernel(fold_kernel, fold_, TABLE, cases, max_registers=48, wide=(WIDE_LOAD,), tempers=True)
