"""The columns of a row: reading a block of neighbours, or those of its slots; and what is summed over them."""

from typing import NamedTuple

import triton
import triton.language as tl

from ._math import Tempering, tempered


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
