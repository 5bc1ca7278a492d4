"""Reading the columns of a tile: a block of neighbours, or the columns of a row's slots."""

import triton
import triton.language as tl


@triton.jit
def load_columns(p_row, o_c, m_c, MASKED: tl.constexpr):
    """The values of one row at the given columns. MASKED is False where all exist: a mask would narrow the loads."""
    return tl.load(p_row + o_c, mask=m_c, other=0.0) if MASKED else tl.load(p_row + o_c)


@triton.jit
def load_raw(p_logits, p_bias, o_c, m_c, MASKED: tl.constexpr):
    """Raw logits plus bias of one row at the given columns."""
    b_x = load_columns(p_logits, o_c, m_c, MASKED)
    return b_x if p_bias is None else b_x + load_columns(p_bias, o_c, m_c, MASKED)


@triton.jit
def slot_columns(p_slots, o_j, J, col0, C):
    """(column in this tile, whether it is one) of the slots o_j of one row."""
    b_c = tl.load(p_slots + o_j, mask=o_j < J, other=-1) - col0
    return b_c, (o_j < J) & (b_c >= 0) & (b_c < C)
