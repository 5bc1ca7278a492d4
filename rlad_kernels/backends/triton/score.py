"""score_partials: the product with the LM head and its softmax statistics in one kernel; no logits in memory."""

from collections.abc import Iterator, Mapping
from math import inf
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._columns import Sums
from ._kernel import HALVES, Case, D, J, R, V, add_kernel, flag_sets, ids, meta, tempering
from ._launch import architecture, config, launch, multiprocessors, pick, require_dtype
from ._math import Tempering, bounded, dot, tempered

# By 10 × compute capability for the 16-bit types, 0 for float32, whose products run on no tensor core. Eight warps an SM: one
# program, or two of four warps, so that one's epilogue runs beside the other's products. FLATTEN makes one loop of tiles and
# products, so that the next tile's loads start before an epilogue. Hopper's and Blackwell's tiles need the fewest bytes of L2 a
# product; in 4 stretches the epilogue of 128 accumulators a thread stays under 255 registers with every flag, in 2 it spills, as it
# does with BLOCK_J ≥ 4. float32: at BLOCK_V = 64 ptxas stops at 128 registers and spills the rest. Ampere: 3 × 32 KiB of its
# 163 KiB in flight. Unmeasured: see FUSED_SCORING.
TABLE = (
    config(0, 8, 2, BLOCK_N=128, BLOCK_V=128, BLOCK_D=16, TMA=0, PARTS=4, BLOCK_J=2, GROUP=16, FLATTEN=0),
    config(89, 8, 4, BLOCK_N=128, BLOCK_V=128, BLOCK_D=64, TMA=0, PARTS=2, BLOCK_J=4, GROUP=16, FLATTEN=0),
    config(inf, 8, 4, BLOCK_N=128, BLOCK_V=256, BLOCK_D=64, TMA=1, PARTS=4, BLOCK_J=2, GROUP=16, FLATTEN=0),
)

# (10 × compute capability, bytes per element) → rows from which linear_logp takes score_kernel instead of cuBLAS's product
# and fold_kernel. An entry needs a measurement on that chip. None has been taken, so no call takes the kernel by itself;
# `settings.fused_scoring = True` does, for benches and tests.
FUSED_SCORING: Mapping[tuple[int, int], int] = MappingProxyType({})

NO_COLUMN = tl.constexpr(2**31 - 1)


class Slots(NamedTuple):
    """The slots of a block of rows, and where their logits go."""

    ids: tl.tensor
    logits: tl.tensor
    J: tl.tensor
    m_r: tl.tensor  # which rows there are


@triton.jit
def _load_slots(slots, o_j):
    return tl.load(slots.ids[:, None] + o_j[None, :], mask=slots.m_r[:, None] & (o_j < slots.J)[None, :], other=-1)


@triton.jit
def _next_column(slots, b_last, end, BLOCK_J: tl.constexpr):
    """The smallest slot of each row in (b_last, end), or NO_COLUMN: in this order duplicates need no care."""
    b_next = tl.full(b_last.shape, NO_COLUMN, tl.int32)
    for j0 in range(0, slots.J, BLOCK_J):
        b_slot = _load_slots(slots, j0 + tl.arange(0, BLOCK_J))
        inside = (b_slot > b_last[:, None]) & (b_slot < end)
        b_next = tl.minimum(b_next, tl.min(tl.where(inside, b_slot, NO_COLUMN), 1))
    return b_next


@triton.jit
def _store_slots(slots, b_col, b_value, BLOCK_J: tl.constexpr):
    """Write each row's value to those of its slots that name the column b_col."""
    for j0 in range(0, slots.J, BLOCK_J):
        o_j = j0 + tl.arange(0, BLOCK_J)
        b_slot = _load_slots(slots, o_j)
        b_out = tl.broadcast_to(b_value[:, None], b_slot.shape)
        tl.store(slots.logits[:, None] + o_j[None, :], b_out, mask=b_slot == b_col[:, None])


@triton.jit
def _absorb(b_x, s, c0, V, bias, t, slots, ENTROPY: tl.constexpr, EXTRAS: tl.constexpr, BLOCK_J: tl.constexpr):
    """Add a stretch of columns, as it leaves the accumulator, to the rows' sums; write its slot logits."""
    o_c = c0 + tl.arange(0, b_x.shape[1])
    m_c = o_c < V
    if bias is not None:
        b_x += tl.load(bias + o_c, mask=m_c, other=0.0)[None, :]
    b_z = tempered(b_x, t)[0]
    b_sumz, b_first, b_restz, b_restsq = s.sumz, s.first, s.restz, s.restsq
    if EXTRAS:
        b_sumz += tl.sum(tl.where(m_c[None, :], b_z, 0.0), 1)
    b_z = tl.where(m_c[None, :], b_z, -float("inf"))

    end = tl.minimum(c0 + b_x.shape[1], V)
    b_col = _next_column(slots, tl.full(s.m.shape, c0 - 1, tl.int32), end, BLOCK_J)
    while tl.min(b_col, 0) < NO_COLUMN:
        hit = o_c[None, :] == b_col[:, None]
        _store_slots(slots, b_col, tl.sum(tl.where(hit, b_z, 0.0), 1), BLOCK_J)
        b_z = tl.where(hit, -float("inf"), b_z)
        b_col = _next_column(slots, b_col, end, BLOCK_J)

    b_m = tl.maximum(s.m, tl.max(b_z, 1))
    if EXTRAS:
        b_here = tl.min(tl.where(b_z == b_m[:, None], o_c[None, :], NO_COLUMN), 1)
        b_first = tl.where(b_m > s.m, b_here, b_first)
    b_ref = tl.where(b_m == -float("inf"), 0.0, b_m)
    b_gap_old = bounded(s.m - b_ref)
    b_old = tl.exp(b_gap_old)
    b_gap = bounded(b_z - b_ref[:, None])
    b_e = tl.exp(b_gap)
    if ENTROPY:
        b_restz = b_old * (b_restz + b_gap_old * s.rest) + tl.sum(b_e * b_gap, 1)
    if EXTRAS:
        b_restsq = b_restsq * b_old * b_old + tl.sum(b_e * b_e, 1)
    return Sums(b_m, s.rest * b_old + tl.sum(b_e, 1), b_restz, b_restsq, b_sumz, b_first)


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
    N,
    V,
    D,
    tiles_n,
    tiles_v,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """z of each tile of rows × vocabulary from the accumulator; per row m = max z, Σ e^{z−m} and the like off the slots."""
    stride_s = tl.cast(stride_s, tl.int64)  # five of them are beyond int32 from 400,000 tokens on at V = 150,000
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=FLATTEN):
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
        t = Tempering(logit_scale, softcap, b_it[:, None])
        o_s = o_r.to(tl.int64) * J
        own = Slots(slots + o_s, slot_logits + o_s, J, m_r)
        b_zero = tl.zeros([BLOCK_N], tl.float32)
        b_none = tl.full([BLOCK_N], -float("inf"), tl.float32)
        s = Sums(b_none, b_zero, b_zero, b_zero, b_zero, tl.zeros([BLOCK_N], tl.int32))
        stretches = _stretches(b_x, PARTS)
        for i in tl.static_range(PARTS):
            s = _absorb(stretches[i], s, v0 + i * (BLOCK_V // PARTS), V, bias, t, own, ENTROPY, EXTRAS, BLOCK_J)
        p_s = stats + i_v.to(tl.int64) * N + o_r
        tl.store(p_s, s.m, mask=m_r)
        tl.store(p_s + stride_s, s.rest, mask=m_r)
        if ENTROPY:
            tl.store(p_s + 2 * stride_s, s.restz, mask=m_r)
        if EXTRAS:
            tl.store(p_s + 3 * stride_s, s.restsq, mask=m_r)
            tl.store(p_s + 4 * stride_s, s.sumz, mask=m_r)
            tl.store(p_s + 5 * stride_s, s.first.to(tl.float32), mask=m_r)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics of each row over each tile of the vocabulary, without logits in memory.

    Args:
        hidden: `(N, D)`, and `weight (V, D)` of its dtype; rows 16-byte aligned.
        slots: `(N, J)` int32 columns, negative or ≥ V for none; they are left out of the sums, duplicates allowed.

    Returns:
        `(6, T, N)`: the rows of `engine.statistics.Stats` over each of T tiles (those not asked for are 0), for `merge_tiles`.
        `(N, J)`: tempered logits of the slots, −inf at those that name no column.
    """
    require_dtype("score_partials", HALVES, hidden=hidden, weight=weight)
    require_dtype("score_partials", bias=bias, inv_temp=inv_temp)
    if not (aligned(hidden) and aligned(weight)):
        raise ValueError("score_partials: the rows of hidden and weight must be contiguous and start at multiples of 16 bytes")
    (n, d), v, j = hidden.shape, weight.shape[0], slots.shape[1]
    row = pick(TABLE, 0 if hidden.dtype == torch.float32 else architecture(hidden.device))
    blocks = dict(row.blocks)
    tiles_n, tiles_v = triton.cdiv(n, blocks["BLOCK_N"]), triton.cdiv(v, blocks["BLOCK_V"])
    stats = inv_temp.new_zeros(6, tiles_v, n)
    slot_logits = inv_temp.new_full((n, j), -torch.inf)
    if n == 0:
        return stats, slot_logits
    h, w = hidden, weight
    if blocks["TMA"]:
        h, w = (
            TensorDescriptor(x, list(x.shape), list(x.stride()), [blocks[block], blocks["BLOCK_D"]])
            for x, block in ((hidden, "BLOCK_N"), (weight, "BLOCK_V"))
        )
    launch(
        score_kernel,
        (min(tiles_n * tiles_v, 8 // row.num_warps * multiprocessors(hidden.device)),),
        row,
        h,
        hidden.stride(0),
        w,
        weight.stride(0),
        bias,
        inv_temp.contiguous(),
        logit_scale,
        softcap or None,
        slots.contiguous(),
        j,
        slot_logits,
        stats,
        stats.stride(0),
        n,
        v,
        d,
        tiles_n,
        tiles_v,
        ENTROPY=entropy,
        EXTRAS=extras,
    )
    return stats, slot_logits


def aligned(x: torch.Tensor) -> bool:
    """Whether TMA, and 16-byte loads, can read the rows of the matrix."""
    rows = x.stride(0) * x.element_size() % 16 == 0
    return x.stride(1) == 1 and rows and x.data_ptr() % 16 == 0


def cases() -> Iterator[Case]:
    for dtype in HALVES:
        for f in flag_sets("bias", "softcap", "entropy", "extras", single=dtype == torch.bfloat16):
            args = (meta(R, D, dtype=dtype), meta(V, D, dtype=dtype), *tempering(f, V), ids(R, J), "entropy" in f, "extras" in f)
            yield Case(f"{dtype} {'+'.join(sorted(f))}", score_partials, args)


add_kernel(score_kernel, score_partials, TABLE, cases, max_registers=255, dots=True, tempers=True)
