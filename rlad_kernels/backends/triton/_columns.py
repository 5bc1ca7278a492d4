"""The columns of a row: reading a block of neighbours, or those of its slots; and what is summed over them."""

from typing import NamedTuple

import triton
import triton.language as tl

from ._math import LOWEST, Tempering, bounded, tempered

NO_COLUMN = tl.constexpr(2**31 - 1)


class Row(NamedTuple):
    """One row of a tile of raw logits, and what makes z of them."""

    logits: tl.tensor  # its first column's place
    bias: tl.tensor | None  # the tile's
    cols: tl.tensor
    tempering: Tempering


class Slots(NamedTuple):
    """The slots of one row: global columns, negative for none."""

    ids: tl.tensor
    J: tl.tensor
    col0: tl.tensor  # the tile's first column


class Sums(NamedTuple):
    """Running values of each lane, or row: max z, Σ e^{z−m}, Σ e^{z−m}(z−m), Σ e^{2(z−m)}, Σ z, the column of the maximum."""

    m: tl.tensor
    rest: tl.tensor
    restz: tl.tensor
    restsq: tl.tensor
    sumz: tl.tensor
    first: tl.tensor


@triton.jit
def load_columns(p_row, o_c, m_c, MASKED: tl.constexpr):
    """The values at the given columns. MASKED is False where all exist: a mask would narrow the loads."""
    return tl.load(p_row + o_c, mask=m_c, other=0.0) if MASKED else tl.load(p_row + o_c)


@triton.jit
def load_raw(row, o_c, m_c, MASKED: tl.constexpr):
    """Raw logits plus bias at the given columns."""
    b_x = load_columns(row.logits, o_c, m_c, MASKED)
    return b_x if row.bias is None else b_x + load_columns(row.bias, o_c, m_c, MASKED)


@triton.jit
def load_z(row, o_c, m_c, MASKED: tl.constexpr):
    """(z, dz/draw) at the given columns."""
    return tempered(load_raw(row, o_c, m_c, MASKED), row.tempering)


@triton.jit
def slot_columns(slots, o_j, cols):
    """(column in this tile of `cols`, whether it is one) of the slots o_j."""
    b_c = tl.load(slots.ids + o_j, mask=o_j < slots.J, other=-1) - slots.col0
    return b_c, (o_j < slots.J) & (b_c >= 0) & (b_c < cols)


@triton.jit
def no_sums(LANES: tl.constexpr):
    """Sums of nothing. Not −inf: its difference with a column of −inf would be NaN."""
    b_zero = tl.zeros([LANES], tl.float32)
    return Sums(tl.full([LANES], LOWEST, tl.float32), b_zero, b_zero, b_zero, b_zero, tl.full([LANES], NO_COLUMN, tl.int32))


@triton.jit
def _shares(b_x, LANES: tl.constexpr):
    """A block as (…, LANES, 4): with as many lanes as threads, what a thread loads, 4 neighbours at a time, is its own lane's."""
    return tl.reshape(b_x, [b_x.shape[0] // (4 * LANES), LANES, 4])


@triton.jit
def lane_sum(b_x, LANES: tl.constexpr):
    """Σ of each lane's share of a block, without a word between threads."""
    return tl.sum(tl.sum(_shares(b_x, LANES), 2), 0)


@triton.jit
def add_columns(s, b_z, o_c, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr):
    """Absorb a block of columns, −inf where one is not to count, into all sums but Σz; each lane has its own maximum."""
    LANES: tl.constexpr = s.m.shape[0]
    b_share = _shares(b_z, LANES)
    b_top = tl.max(tl.max(b_share, 2), 0)
    m_up = b_top > s.m  # never of NaN
    b_m = tl.where(m_up, b_top, s.m)
    b_down = bounded(s.m - b_m)
    b_old = tl.exp(b_down)
    b_gap = b_share - b_m[None, :, None]
    if ENTROPY:
        b_gap = bounded(b_gap)
    b_e = tl.exp(b_gap)
    b_rest = s.rest * b_old + tl.sum(tl.sum(b_e, 2), 0)
    b_restz, b_restsq, b_first = s.restz, s.restsq, s.first
    if ENTROPY:
        b_restz = b_old * (b_restz + b_down * s.rest) + tl.sum(tl.sum(b_e * b_gap, 2), 0)
    if EXTRAS:
        b_restsq = b_restsq * b_old * b_old + tl.sum(tl.sum(b_e * b_e, 2), 0)
        b_at = tl.where(b_share == b_m[None, :, None], _shares(o_c, LANES), NO_COLUMN)
        b_first = tl.where(m_up, tl.min(tl.min(b_at, 2), 0), b_first)
    return Sums(b_m, b_rest, b_restz, b_restsq, s.sumz, b_first)


@triton.jit
def join(s, m, rest, restz, ENTROPY: tl.constexpr):
    """(m, rest, restz) of lanes and a row's own, and what brings the lanes' and the row's sums there: their exponentials."""
    # a lane that saw nothing but −inf still holds LOWEST and must not pass for a maximum
    b_seen = tl.where(s.rest > 0, s.m, -float("inf"))
    top = tl.max(b_seen, 0)
    m_new = tl.maximum(m, top)
    ref = tl.where(m_new == -float("inf"), 0.0, m_new)
    down = bounded(m - ref)
    old = tl.exp(down)
    b_gap = bounded(s.m - ref)
    b_e = tl.exp(b_gap)
    if ENTROPY:
        restz = old * (restz + down * rest) + tl.sum(b_e * (s.restz + b_gap * s.rest), 0)
    return m_new, old * rest + tl.sum(s.rest * b_e, 0), restz, old, b_e, b_seen
