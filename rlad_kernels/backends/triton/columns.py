"""column_stats_: what a block of tokens thinks of each column of the vocabulary."""

from collections.abc import Iterator
from math import inf

import torch
import triton
import triton.language as tl

from ._columns import load_columns
from ._kernel import C, Case, R, add_kernel, flag_sets, meta, tempering
from ._launch import config, launch, pick, require_dtype
from ._math import Tempering, tempered

# A logit costs 4 bytes read, an exponential and about 10 operations: memory bounds it, a H200 did 2.8 TB/s. By the columns. A
# program walks down a block of rows; the sums of 2 columns a thread are all it keeps, and each row's loads are independent of
# the last's, so short blocks of columns give the chip enough programs.
TABLE = (config(inf, 4, BLOCK=512),)


@triton.jit
def column_stats_kernel(
    out,
    stride_part,
    stride_b,
    logits,
    stride_x,
    R,
    C,
    bias,
    inv_temp,
    logit_scale,
    softcap,
    lse,
    ROWS,
    BLOCK: tl.constexpr,
):
    """out[0] = max p, out[1] = Σ p, out[2] = Σ p·slope over the ROWS rows of block i_b, p = e^{z − lse}."""
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < C
    b_bias = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        b_bias = load_columns(bias, o_c, m_c, True)
    b_top = tl.zeros([BLOCK], tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_sloped = tl.zeros([BLOCK], tl.float32)
    for i_r in range(i_b * ROWS, tl.minimum((i_b + 1) * ROWS, R)):
        it = tl.load(inv_temp + i_r)
        b_lse = tl.load(lse + i_r)
        b_x = load_columns(logits + tl.cast(i_r, tl.int64) * stride_x, o_c, m_c, True) + b_bias
        b_z, b_slope = tempered(b_x, Tempering(logit_scale, softcap, it))
        b_p = tl.where(b_z == -float("inf"), 0.0, tl.exp(b_z - b_lse))
        b_top = tl.maximum(b_top, b_p)
        b_sum += b_p
        if softcap is not None:
            b_sloped += b_p * (b_slope / tl.where(logit_scale == 0, 1.0, logit_scale * it))
    p_out = out + i_b * stride_b + o_c
    stride_part = tl.cast(stride_part, tl.int64)  # two of them may be beyond int32
    tl.store(p_out, b_top, mask=m_c)
    tl.store(p_out + stride_part, b_sum, mask=m_c)
    if softcap is not None:
        tl.store(p_out + 2 * stride_part, b_sloped, mask=m_c)


def column_stats_(
    out: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    inv_temp: torch.Tensor,
    logit_scale: float,
    softcap: float,
    lse: torch.Tensor,
    block: int,
) -> None:
    """Fill `out (2, B, C)`, or `(3, B, C)` with a softcap, from raw `logits (R, C)` in B blocks of `block` rows."""
    require_dtype("column_stats_", out=out, logits=logits, bias=bias, inv_temp=inv_temp, lse=lse)
    n_rows, cols = logits.shape
    row = pick(TABLE, cols)
    grid = (triton.cdiv(cols, dict(row.blocks)["BLOCK"]), triton.cdiv(n_rows, block))
    launch(
        column_stats_kernel,
        grid if n_rows else (0,),
        row,
        out,
        out.stride(0),
        out.stride(1),
        logits,
        logits.stride(0),
        n_rows,
        cols,
        bias,
        inv_temp.contiguous(),
        logit_scale,
        softcap or None,
        lse.contiguous(),
        block,
    )


def cases() -> Iterator[Case]:
    for tile in (meta(R, C), meta(R, C)[:, :-1]):
        cols = tile.shape[1]
        for f in flag_sets("bias", "softcap"):
            out = meta(3 if "softcap" in f else 2, R // 128, cols)
            args = (out, tile, *tempering(f, cols), meta(R), 128)
            yield Case(f"C={cols} {'+'.join(sorted(f))}", column_stats_, args)


add_kernel(column_stats_kernel, column_stats_, TABLE, cases, max_registers=64, tempers=True)
