"""column_stats_: what a block of tokens thinks of each column of the vocabulary."""

import torch
import triton
import triton.language as tl

from ._columns import load_columns
from ._launch import launch, require_dtype
from ._math import tempered
from .configs import pick


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
    SOFTCAP: tl.constexpr,
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
        b_x = load_columns(logits + i_r * stride_x, o_c, m_c, True) + b_bias
        b_z, b_slope = tempered(b_x, logit_scale, softcap, it, SOFTCAP)
        b_p = tl.where(b_z == -float("inf"), 0.0, tl.exp(b_z - b_lse))
        b_top = tl.maximum(b_top, b_p)
        b_sum += b_p
        if SOFTCAP:
            b_sloped += b_p * (b_slope / tl.where(logit_scale == 0, 1.0, logit_scale * it))
    p_out = out + i_b * stride_b + o_c
    tl.store(p_out, b_top, mask=m_c)
    tl.store(p_out + stride_part, b_sum, mask=m_c)
    if SOFTCAP:
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
    config = pick("column_stats_kernel", cols)
    grid = (triton.cdiv(cols, dict(config.blocks)["BLOCK"]), triton.cdiv(n_rows, block))
    launch(
        column_stats_kernel,
        grid if n_rows else (0,),
        config,
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
        softcap,
        lse.contiguous(),
        block,
        SOFTCAP=softcap > 0,
    )
