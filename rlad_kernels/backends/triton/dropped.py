"""dropped_mass: the probability that each token has outside the columns that its block keeps."""

from collections.abc import Iterator
from math import inf

import torch
import triton
import triton.language as tl

from ._columns import Row, load_z
from ._kernel import WIDE_LOAD, C, Case, R, add_kernel, flag_sets, meta, tempering, tiles
from ._launch import config, launch, pick, require_dtype
from ._math import Tempering

# By the columns. Five bytes and an exponential a column, all of it read once: memory bounds it.
TABLE = (
    config(1024, 4, BLOCK=1024),
    config(inf, 8, BLOCK=4096),
)


@triton.jit
def dropped_mass_kernel(
    out,
    keep,
    stride_k,
    logits,
    stride_x,
    C,
    bias,
    inv_temp,
    logit_scale,
    softcap,
    lse,
    ROWS,
    BLOCK: tl.constexpr,
):
    """out = Σ e^{z − lse} over the columns that the row's block of ROWS rows does not keep."""
    i_r = tl.program_id(0).to(tl.int64)
    row = Row(logits + i_r * stride_x, bias, C, Tempering(logit_scale, softcap, tl.load(inv_temp + i_r)))
    p_keep = keep + i_r // ROWS * stride_k
    b_lse = tl.load(lse + i_r)
    b_sum = tl.zeros([BLOCK], tl.float32)
    full = C // BLOCK * BLOCK
    for c0 in range(0, full, BLOCK):
        o_c = c0 + tl.arange(0, BLOCK)
        b_z = load_z(row, o_c, o_c < C, False)[0]
        b_sum += tl.where(tl.load(p_keep + o_c), 0.0, tl.exp(b_z - b_lse))
    if full < C:
        o_c = full + tl.arange(0, BLOCK)
        b_z = load_z(row, o_c, o_c < C, True)[0]
        b_sum += tl.where(tl.load(p_keep + o_c, mask=o_c < C, other=True), 0.0, tl.exp(b_z - b_lse))
    tl.store(out + i_r, tl.sum(b_sum, 0))


def dropped_mass(
    keep: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    inv_temp: torch.Tensor,
    logit_scale: float,
    softcap: float,
    lse: torch.Tensor,
    block: int,
) -> torch.Tensor:
    """`(R,)` from raw `logits (R, C)` and `keep (B, C)` bool, a row of it for each `block` of rows."""
    require_dtype("dropped_mass", logits=logits, bias=bias, inv_temp=inv_temp, lse=lse)
    n, cols = logits.shape
    out, keep = lse.new_empty(n), keep.contiguous()
    launch(
        dropped_mass_kernel,
        (n,),
        pick(TABLE, cols),
        out,
        keep,
        keep.stride(0),
        logits,
        logits.stride(0),
        cols,
        bias,
        inv_temp.contiguous(),
        logit_scale,
        softcap or None,
        lse.contiguous(),
        block,
    )
    return out


def cases() -> Iterator[Case]:
    for tile in tiles(TABLE):
        cols = tile.shape[1]
        for f in flag_sets("bias", "softcap"):
            args = (meta(R // 128, cols, dtype=torch.bool), tile, *tempering(f, cols), meta(R), 128)
            yield Case(f"C={cols} {'+'.join(sorted(f))}", dropped_mass, args, cols == C)


add_kernel(dropped_mass_kernel, dropped_mass, TABLE, cases, max_registers=80, wide=(WIDE_LOAD,), tempers=True)
