"""score_partials: the product with the LM head and its softmax statistics in one kernel; no logits in memory."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import architecture, launch, multiprocessors, require_dtype
from ._math import bounded, dot, tempered
from .configs import pick

HALVES = (torch.float32, torch.bfloat16, torch.float16)
NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def _next_column(p_slots, m_r, J, b_last, end, BLOCK_J: tl.constexpr):
    """The smallest slot of each row in (b_last, end), or NO_COLUMN: in this order duplicates need no care."""
    b_next = tl.full(b_last.shape, NO_COLUMN, tl.int32)
    for j0 in range(0, J, BLOCK_J):
        o_j = j0 + tl.arange(0, BLOCK_J)
        b_slot = tl.load(p_slots[:, None] + o_j[None, :], mask=m_r[:, None] & (o_j < J)[None, :], other=-1)
        inside = (b_slot > b_last[:, None]) & (b_slot < end)
        b_next = tl.minimum(b_next, tl.min(tl.where(inside, b_slot, NO_COLUMN), 1))
    return b_next


@triton.jit
def _store_slots(p_out, p_slots, m_r, J, b_col, b_value, BLOCK_J: tl.constexpr):
    """Write each row's value to those of its slots that name the column b_col."""
    for j0 in range(0, J, BLOCK_J):
        o_j = j0 + tl.arange(0, BLOCK_J)
        b_slot = tl.load(p_slots[:, None] + o_j[None, :], mask=m_r[:, None] & (o_j < J)[None, :], other=-1)
        b_out = tl.broadcast_to(b_value[:, None], b_slot.shape)
        tl.store(p_out[:, None] + o_j[None, :], b_out, mask=b_slot == b_col[:, None])


@triton.jit
def _absorb(
    b_x,
    b_m,
    b_rest,
    b_restz,
    b_restsq,
    b_sumz,
    b_first,
    o_r,
    c0,
    i_b,
    bias,
    b_it,
    logit_scale,
    softcap,
    slots,
    J,
    slot_logits,
    column_max,
    N,
    V,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Add a stretch of columns, as it leaves the accumulator, to the rows' statistics; write its slot logits and column maxima."""
    o_c = c0 + tl.arange(0, b_x.shape[1])
    m_r, m_c = o_r < N, o_c < V
    if bias is not None:
        b_x += tl.load(bias + o_c, mask=m_c, other=0.0)[None, :]
    b_z = tempered(b_x, logit_scale, softcap, b_it[:, None], SOFTCAP)[0]
    if EXTRAS:
        b_sumz += tl.sum(tl.where(m_c[None, :], b_z, 0.0), 1)
    b_z = tl.where(m_c[None, :], b_z, -float("inf"))
    if column_max is not None:
        b_top = tl.max(tl.where(m_r[:, None], b_z, -float("inf")), 0)
        tl.store(column_max + i_b.to(tl.int64) * V + o_c, b_top, mask=m_c)

    p_slots = slots + o_r.to(tl.int64) * J
    p_out = slot_logits + o_r.to(tl.int64) * J
    end = tl.minimum(c0 + b_x.shape[1], V)
    b_col = _next_column(p_slots, m_r, J, tl.full(o_r.shape, c0 - 1, tl.int32), end, BLOCK_J)
    while tl.min(b_col, 0) < NO_COLUMN:
        hit = o_c[None, :] == b_col[:, None]
        _store_slots(p_out, p_slots, m_r, J, b_col, tl.sum(tl.where(hit, b_z, 0.0), 1), BLOCK_J)
        b_z = tl.where(hit, -float("inf"), b_z)
        b_col = _next_column(p_slots, m_r, J, b_col, end, BLOCK_J)

    b_new = tl.maximum(b_m, tl.max(b_z, 1))
    if EXTRAS:
        b_here = tl.min(tl.where(b_z == b_new[:, None], o_c[None, :], NO_COLUMN), 1)
        b_first = tl.where(b_new > b_m, b_here, b_first)
    b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_gap_old = bounded(b_m - b_ref)
    b_old = tl.exp(b_gap_old)
    b_gap = bounded(b_z - b_ref[:, None])
    b_e = tl.exp(b_gap)
    if ENTROPY:
        b_restz = b_old * (b_restz + b_gap_old * b_rest) + tl.sum(b_e * b_gap, 1)
    if EXTRAS:
        b_restsq = b_restsq * b_old * b_old + tl.sum(b_e * b_e, 1)
    return b_new, b_rest * b_old + tl.sum(b_e, 1), b_restz, b_restsq, b_sumz, b_first


@triton.jit
def _rows(base, stride, o_r, end, BLOCK_D: tl.constexpr):
    """Pointers to the first columns of some rows; past the end the first row is read, since a mask a row narrows the loads."""
    return base + tl.where(o_r < end, o_r, 0).to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _halves(b_x):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(b_x, [b_x.shape[0], 2, b_x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _stretches(b_x, PARTS: tl.constexpr):
    """The columns of a tile in PARTS stretches. The epilogue takes one at a time: its temporaries shrink with them."""
    if PARTS == 1:
        return (b_x,)
    elif PARTS == 2:
        return _halves(b_x)
    else:
        b_left, b_right = _halves(b_x)
        b_0, b_1 = _halves(b_left)
        b_2, b_3 = _halves(b_right)
        return b_0, b_1, b_2, b_3


@triton.jit(do_not_specialize=["N", "V", "J", "tiles_n", "tiles_v"])
def score_kernel(
    hidden,
    stride_h,
    weight,
    stride_w,
    bias,
    inv_temp,
    logit_scale,
    softcap,
    slots,
    J,
    slot_logits,
    stats,
    stride_s,
    column_max,
    N,
    V,
    D,
    tiles_n,
    tiles_v,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    GROUP: tl.constexpr,
):
    """z of each tile of rows × vocabulary from the accumulator; per row m = max z, Σ e^{z−m} and the like off the slots."""
    for tile in range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0)):
        # GROUP row blocks go through the vocabulary together: what they read of it comes from L2 for all but the first
        first = tile // (GROUP * tiles_v) * GROUP
        size = tl.minimum(tiles_n - first, GROUP)
        i_b = first + tile % (GROUP * tiles_v) % size
        i_v = tile % (GROUP * tiles_v) // size
        v0 = i_v * BLOCK_V
        o_r = i_b * BLOCK_N + tl.arange(0, BLOCK_N)
        m_r = o_r < N

        b_x = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        if TMA:
            for d0 in range(0, D, BLOCK_D):
                b_x = dot(hidden.load([i_b * BLOCK_N, d0]), weight.load([v0, d0]).T, b_x)
        else:
            o_d = tl.arange(0, BLOCK_D)
            o_v = v0 + tl.arange(0, BLOCK_V)
            # past the end the first row is read: a mask a row would narrow the loads
            p_h = hidden + tl.where(m_r, o_r, 0).to(tl.int64)[:, None] * stride_h + o_d[None, :]
            p_w = weight + tl.where(o_v < V, o_v, 0).to(tl.int64)[:, None] * stride_w + o_d[None, :]
            for d0 in range(0, D, BLOCK_D):
                m_d = (d0 + o_d < D)[None, :]
                b_h = tl.load(p_h + d0, mask=m_d, other=0.0)
                b_x = dot(b_h, tl.load(p_w + d0, mask=m_d, other=0.0).T, b_x)

        b_it = tl.load(inv_temp + o_r, mask=m_r, other=1.0)
        b_m = tl.full([BLOCK_N], -float("inf"), tl.float32)
        b_rest = tl.zeros([BLOCK_N], tl.float32)
        b_restz = tl.zeros([BLOCK_N], tl.float32)
        b_restsq = tl.zeros([BLOCK_N], tl.float32)
        b_sumz = tl.zeros([BLOCK_N], tl.float32)
        b_first = tl.zeros([BLOCK_N], tl.int32)
        stretches = _stretches(b_x, PARTS)
        for i in tl.static_range(PARTS):
            b_m, b_rest, b_restz, b_restsq, b_sumz, b_first = _absorb(
                stretches[i],
                b_m,
                b_rest,
                b_restz,
                b_restsq,
                b_sumz,
                b_first,
                o_r,
                v0 + i * (BLOCK_V // PARTS),
                i_b,
                bias,
                b_it,
                logit_scale,
                softcap,
                slots,
                J,
                slot_logits,
                column_max,
                N,
                V,
                SOFTCAP,
                ENTROPY,
                EXTRAS,
                BLOCK_J,
            )
        p_s = stats + i_v.to(tl.int64) * N + o_r
        tl.store(p_s, b_m, mask=m_r)
        tl.store(p_s + stride_s, b_rest, mask=m_r)
        if ENTROPY:
            tl.store(p_s + 2 * stride_s, b_restz, mask=m_r)
        if EXTRAS:
            tl.store(p_s + 3 * stride_s, b_restsq, mask=m_r)
            tl.store(p_s + 4 * stride_s, b_sumz, mask=m_r)
            tl.store(p_s + 5 * stride_s, b_first.to(tl.float32), mask=m_r)


def score_partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    inv_temp: torch.Tensor,
    logit_scale: float,
    softcap: float,
    slots: torch.Tensor,
    entropy: bool,
    extras: bool,
    column_max: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics of each row over each tile of the vocabulary, without logits in memory.

    Args:
        hidden: `(N, D)`, and `weight (V, D)` of its dtype; rows 16-byte aligned.
        slots: `(N, J)` int32 columns, negative or ≥ V for none; they are left out of the sums, duplicates allowed.

    Returns:
        `(6, T, N)`: the rows of `moments.Stats` over each of T tiles (those not asked for are 0), for `moments.merge_tiles`.
        `(N, J)`: tempered logits of the slots, −inf at those that name no column.
        `(⌈N/128⌉, V)` if `column_max`, else empty: z's maximum over each block of 128 rows. A probability there is at most
        exp(column_max − the smallest lse of the block).
    """
    require_dtype("score_partials", HALVES, hidden=hidden, weight=weight)
    require_dtype("score_partials", bias=bias, inv_temp=inv_temp)
    if not (aligned(hidden) and aligned(weight)):
        raise ValueError("score_partials: the rows of hidden and weight must be contiguous and start at multiples of 16 bytes")
    (n, d), v, j = hidden.shape, weight.shape[0], slots.shape[1]
    config = pick("score_kernel", 0 if hidden.dtype == torch.float32 else architecture(hidden.device))
    blocks = dict(config.blocks)
    tiles_n, tiles_v = triton.cdiv(n, blocks["BLOCK_N"]), triton.cdiv(v, blocks["BLOCK_V"])
    stats = inv_temp.new_zeros(6, tiles_v, n)
    slot_logits = inv_temp.new_full((n, j), -torch.inf)
    tops = inv_temp.new_empty((tiles_n, v) if column_max else 0)
    if n == 0:
        return stats, slot_logits, tops
    h, w = hidden, weight
    if blocks["TMA"]:
        h, w = (
            TensorDescriptor(x, list(x.shape), list(x.stride()), [blocks[block], blocks["BLOCK_D"]])
            for x, block in ((hidden, "BLOCK_N"), (weight, "BLOCK_V"))
        )
    launch(
        score_kernel,
        (min(tiles_n * tiles_v, multiprocessors(hidden.device)),),
        config,
        h,
        hidden.stride(0),
        w,
        weight.stride(0),
        bias,
        inv_temp.contiguous(),
        logit_scale,
        softcap,
        slots.contiguous(),
        j,
        slot_logits,
        stats,
        stats.stride(0),
        tops if column_max else None,
        n,
        v,
        d,
        tiles_n,
        tiles_v,
        SOFTCAP=softcap > 0,
        ENTROPY=entropy,
        EXTRAS=extras,
    )
    return stats, slot_logits, tops


def aligned(x: torch.Tensor) -> bool:
    """Whether TMA, and 16-byte loads, can read the rows of the matrix."""
    rows = x.stride(0) * x.element_size() % 16 == 0
    return x.stride(1) == 1 and rows and x.data_ptr() % 16 == 0
