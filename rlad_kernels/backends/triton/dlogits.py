"""dlogits_: the gradient with respect to one tile of raw logits."""

import torch
import triton
import triton.language as tl

from ._columns import load_raw, slot_columns
from ._launch import launch, require_dtype
from ._math import bounded, cast, tempered
from .configs import pick


@triton.jit
def _column_step(
    p_out,
    p_logits,
    p_bias,
    o_c,
    C,
    logit_scale,
    softcap,
    it,
    lse,
    w,
    b,
    h,
    t,
    tail_lse,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Gradient of one block of columns as if none were a slot."""
    b_x = load_raw(p_logits, p_bias, o_c, o_c < C, MASKED)
    b_z, b_slope = tempered(b_x, logit_scale, softcap, it, SOFTCAP)
    b_lp = bounded(b_z - lse)
    b_g = tl.exp(b_lp) * (w - b * (b_lp + h) if ENTROPY else w)
    if TAIL:
        b_g += t * tl.exp(b_z - tail_lse)
    b_out = cast(b_g * b_slope, p_out.dtype.element_ty)
    if MASKED:
        tl.store(p_out + o_c, b_out, mask=o_c < C)
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
    SLOTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """out = dz/draw · (p·w − p·b·(lp + H) + t·e^{z − tail_lse}), at the slots dz/draw · slot_dz."""
    i_r = tl.program_id(0).to(tl.int64)
    p_x = logits + i_r * stride_x
    p_o = out + i_r * stride_o
    it = tl.load(inv_temp + i_r)
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
    o_b = tl.arange(0, BLOCK)
    o_j = tl.arange(0, BLOCK_J)

    if SLOTS:  # finished before the sweep, which may overwrite the raw logits; written after it
        for j0 in range(0, J, BLOCK_J):
            o_s = i_r * J + j0 + o_j
            b_c, m_c = slot_columns(slots + i_r * J, j0 + o_j, J, col0, C)
            b_slope = tempered(load_raw(p_x, bias, b_c, m_c, True), logit_scale, softcap, it, SOFTCAP)[1]
            b_g = tl.load(slot_dz + o_s, mask=m_c, other=0.0)
            tl.store(slot_out + o_s, b_g * b_slope, mask=m_c)
        tl.debug_barrier()

    # full blocks without a mask: an odd C would otherwise cost every access its width
    full = C // BLOCK * BLOCK
    for c0 in range(0, full, BLOCK):
        _column_step(
            p_o, p_x, bias, c0 + o_b, C, logit_scale, softcap, it, lse, w, b, h, t, tail_lse, False, SOFTCAP, ENTROPY, TAIL
        )
    if full < C:
        _column_step(
            p_o, p_x, bias, full + o_b, C, logit_scale, softcap, it, lse, w, b, h, t, tail_lse, True, SOFTCAP, ENTROPY, TAIL
        )

    if SLOTS:
        tl.debug_barrier()  # slot values land after the sweep's, which other threads wrote to the same columns
        for j0 in range(0, J, BLOCK_J):
            o_s = i_r * J + j0 + o_j
            b_c, m_c = slot_columns(slots + i_r * J, j0 + o_j, J, col0, C)
            b_g = tl.load(slot_out + o_s, mask=m_c, other=0.0)
            tl.store(p_o + b_c, cast(b_g, out.dtype.element_ty), mask=m_c)


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
    entropy: bool,
    tail: bool,
) -> None:
    """Write the gradient with respect to the raw tile `logits (R, C)` into `out (R, C)`, which may be `logits` itself."""
    require_dtype("dlogits_", (torch.float32, torch.bfloat16, torch.float16), out=out)
    require_dtype("dlogits_", logits=logits, bias=bias, inv_temp=inv_temp, slot_dz=slot_dz, rows=rows)
    n_rows, cols = logits.shape
    j = slots.shape[1]
    slot_out = slot_dz.new_empty((n_rows, j)) if j else None
    launch(
        dlogits_kernel,
        (n_rows,),
        pick("dlogits_kernel", cols),
        out,
        out.stride(0),
        logits,
        logits.stride(0),
        cols,
        col0,
        bias,
        inv_temp.contiguous(),
        logit_scale,
        softcap,
        slots.contiguous(),
        j,
        slot_dz.contiguous(),
        slot_out,
        rows,
        rows.stride(0),
        SLOTS=j > 0,
        SOFTCAP=softcap > 0,
        ENTROPY=entropy,
        TAIL=tail,
    )
