"""dlogits_: the gradient with respect to one tile of raw logits."""

from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._columns import Row, Slots, load_z, slot_columns
from ._kernel import HALVES, WIDE_LOAD, WIDE_STORE, Case, J, R, add_kernel, flag_sets, ids, meta, tempering, tiles
from ._launch import config, launch, pick, require_dtype
from ._math import Tempering, bounded, cast

# A column costs 4 bytes read and 2 or 4 written, an exponential (two with a tail) and about 10 operations: memory bounds it.
# By the columns: a program a block, no loop, 8 columns a thread, so that all loads of a row are in flight at once. H200, a tile
# of 4,096 × 16,384 to bf16: 3.4 of the 3.7 to 4.3 TB/s of a copy; a program a row that loops reached 2.66.
TABLE = (
    config(1024, 4, BLOCK=1024, BLOCK_J=64),
    config(inf, 8, BLOCK=2048, BLOCK_J=64),
)


class Pull(NamedTuple):
    """What a row's gradient is made of: dL/dz = p·w − p·b·(log p + h) + t·e^{z − tail_lse}."""

    lse: tl.tensor
    w: tl.tensor
    b: tl.tensor
    h: tl.tensor
    t: tl.tensor
    tail_lse: tl.tensor


@triton.jit
def _column_step(p_out, row, pull, o_c, MASKED: tl.constexpr, ENTROPY: tl.constexpr, TAIL: tl.constexpr):
    """Gradient of one block of columns as if none were a slot."""
    b_z, b_slope = load_z(row, o_c, o_c < row.cols, MASKED)
    b_lp = bounded(b_z - pull.lse)
    b_g = tl.exp(b_lp) * (pull.w - pull.b * (b_lp + pull.h) if ENTROPY else pull.w)
    if TAIL:
        b_g += pull.t * tl.exp(b_z - pull.tail_lse)
    b_out = cast(b_g * b_slope, p_out.dtype.element_ty)
    if MASKED:
        tl.store(p_out + o_c, b_out, mask=o_c < row.cols)
    else:
        tl.store(p_out + o_c, b_out)


@triton.jit(do_not_specialize=["col0", "J"])
def dlogits_kernel(
    out,
    stride_o,
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
    slot_dz,
    slot_out,
    rows,
    stride_r,
    target,
    lost,
    SLOTS: tl.constexpr,
    ENTROPY: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """out = dz/draw · (p·w − p·b·(lp + H) + t·e^{z − tail_lse}), at the slots dz/draw · slot_dz; lost += rounding at the target."""
    # one axis, columns first: an axis of CUDA's grid beyond the first ends at 65,535
    blocks = tl.cdiv(C, BLOCK)
    i_r = (tl.program_id(0) // blocks).to(tl.int64)
    c0 = tl.program_id(0) % blocks * BLOCK
    end = tl.minimum(c0 + BLOCK, C)
    p_o = out + i_r * stride_o
    row = Row(logits + i_r * stride_x, bias, C, Tempering(logit_scale, softcap, tl.load(inv_temp + i_r)))
    own = Slots(slots + i_r * J, J, col0 + c0)
    stride_r = tl.cast(stride_r, tl.int64)  # five of them may be beyond int32
    lse = tl.load(rows + i_r)
    lse = tl.where(lse == -float("inf"), 0.0, lse)  # without mass every z is −inf, and −inf + inf would be NaN
    w = tl.load(rows + stride_r + i_r)
    b = 0.0
    h = 0.0
    t = 0.0
    tail_lse = 0.0
    if ENTROPY:
        b = tl.load(rows + 2 * stride_r + i_r)
        h = tl.load(rows + 3 * stride_r + i_r)
    if TAIL:
        t = tl.load(rows + 4 * stride_r + i_r)
        tail_lse = tl.load(rows + 5 * stride_r + i_r)
        tail_lse = tl.where(tail_lse == -float("inf"), float("inf"), tail_lse)  # an empty tail takes no gradient
    pull = Pull(lse, w, b, h, t, tail_lse)
    o_b = tl.arange(0, BLOCK)
    o_j = tl.arange(0, BLOCK_J)

    if slot_out is not None:  # the slope needs the raw logits, which the block may overwrite
        for j0 in range(0, J, BLOCK_J):
            o_s = i_r * J + j0 + o_j
            b_c, m_c = slot_columns(own, j0 + o_j, end - c0)
            b_slope = load_z(row, c0 + b_c, m_c, True)[1]
            b_g = tl.load(slot_dz + o_s, mask=m_c, other=0.0)
            tl.store(slot_out + o_s, b_g * b_slope, mask=m_c)
        tl.debug_barrier()

    # a full block without a mask: an odd C would otherwise cost every access its width
    if c0 + BLOCK <= C:
        _column_step(p_o, row, pull, c0 + o_b, False, ENTROPY, TAIL)
    else:
        _column_step(p_o, row, pull, c0 + o_b, True, ENTROPY, TAIL)

    if SLOTS:
        tl.debug_barrier()  # slot values land after the block's, which other threads wrote to the same columns
        for j0 in range(0, J, BLOCK_J):
            o_s = i_r * J + j0 + o_j
            b_c, m_c = slot_columns(own, j0 + o_j, end - c0)
            if slot_out is not None:
                b_g = tl.load(slot_out + o_s, mask=m_c, other=0.0)
            else:
                b_g = tl.load(slot_dz + o_s, mask=m_c, other=0.0) * (logit_scale * row.tempering.inv_temp)
            b_out = cast(b_g, out.dtype.element_ty)
            tl.store(p_o + c0 + b_c, b_out, mask=m_c)
            if lost is not None:
                m_y = m_c & (b_c + (col0 + c0) == tl.load(target + i_r))
                here = tl.max(m_y.to(tl.int32), 0) > 0  # in one program of the row
                taken = tl.sum(tl.where(m_y, b_g - b_out.to(tl.float32), 0.0), 0)
                tl.store(lost + i_r, tl.load(lost + i_r) + taken, mask=here)


def dlogits_(
    out: torch.Tensor,
    logits: torch.Tensor,
    col0: int,
    bias: torch.Tensor | None,
    inv_temp: torch.Tensor,
    logit_scale: float,
    softcap: float,
    slots: torch.Tensor,
    slot_dz: torch.Tensor,
    rows: torch.Tensor,
    target: torch.Tensor,
    lost: torch.Tensor | None,
    entropy: bool,
    tail: bool,
) -> None:
    """Write the gradient with respect to the raw tile `logits (R, C)` into `out (R, C)`, which may be `logits` itself.

    What rounding to `out`'s dtype takes from the slot that is the row's `target (R, 1)` is added to `lost (R, 1)`.
    """
    require_dtype("dlogits_", HALVES, out=out)
    require_dtype("dlogits_", logits=logits, bias=bias, inv_temp=inv_temp, slot_dz=slot_dz, rows=rows, lost=lost)
    n_rows, cols = logits.shape
    j = slots.shape[1]
    row = pick(TABLE, cols)
    launch(
        dlogits_kernel,
        (n_rows * triton.cdiv(cols, dict(row.blocks)["BLOCK"]),),
        row,
        out,
        out.stride(0),
        logits,
        logits.stride(0),
        cols,
        col0,
        bias,
        inv_temp.contiguous(),
        logit_scale,
        softcap or None,
        slots.contiguous(),
        j,
        slot_dz.contiguous(),
        torch.empty_like(slot_dz, memory_format=torch.contiguous_format) if j and softcap else None,
        rows,
        rows.stride(0),
        target.contiguous(),
        lost,
        SLOTS=j > 0,
        ENTROPY=entropy,
        TAIL=tail,
    )


def cases() -> Iterator[Case]:
    several = tiles(TABLE)
    for dtype in HALVES:
        for tile in several:
            cols, single = tile.shape[1], tile is several[1] and dtype == torch.bfloat16
            out = meta(R, tile.stride(0), dtype=dtype)[:, :cols]
            for f in flag_sets("bias", "softcap", "slots", "lost", "entropy", "tail", single=single):
                j = J if f & {"slots", "lost"} else 0
                last = (ids(R, 1), meta(R, 1) if "lost" in f else None, "entropy" in f, "tail" in f)
                rest = (ids(R, j), meta(R, j), meta(6, R), *last)
                args = (out, tile, 0, *tempering(f, cols), *rest)
                yield Case(f"{dtype} C={cols} {'+'.join(sorted(f))}", dlogits_, args, cols > 1)


add_kernel(dlogits_kernel, dlogits_, TABLE, cases, max_registers=48, wide=(WIDE_LOAD, WIDE_STORE), tempers=True)
