"""fold_topk_: one tile folded into a running top-K of each row, and the softmax sums of everything outside it."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._columns import Row, Slots, load_z, slot_columns
from ._kernel import WIDE_LOAD, C, Case, J, R, add_kernel, flag_sets, ids, meta, sizes, tempering
from ._launch import config, launch, pick, require_dtype
from ._math import NO_KEY, Tempering, bounded, ordered

# By K. A block is BLOCK_K lanes of state and BLOCK − BLOCK_K columns, 8 lanes a thread: they stay in registers during the
# search for the threshold. Each step of the search is a barrier, cheap among 4 warps; four programs an SM overlap theirs.
TABLE = (
    config(32, 4, BLOCK=1024, BLOCK_K=32),  # answers of servers: K ≤ 20
    config(128, 4, BLOCK=1024, BLOCK_K=128),  # distillation supports
    config(1024, 16, BLOCK=4096, BLOCK_K=1024),
)

TOP_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def _threshold(b_key, low, high, want):
    """A key T with exactly `want` keys ≥ T, or else the largest T with more. Bisection in int64: keys span all of int32."""
    exact = tl.sum((b_key >= low.to(tl.int32)).to(tl.int32), 0) == want
    while (high - low > 1) & (exact == 0):
        mid = low + ((high - low) >> 1)
        n_ge = tl.sum((b_key >= mid.to(tl.int32)).to(tl.int32), 0)
        exact = n_ge == want
        low = tl.where(n_ge >= want, mid, low)
        high = tl.where(n_ge >= want, high, mid)
    return low.to(tl.int32)


@triton.jit(do_not_specialize=["col0", "J", "K"])
def fold_topk_kernel(
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
    slot_logits,
    stats,
    stride_s,
    top_logits,
    top_ids,
    K,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """top ← the K largest of top ∪ z, ties to the lower id; m, rest ← e^{m₀−m}·rest + Σ e^{z−m} over what is now outside."""
    i_r = tl.program_id(0).to(tl.int64)
    row = Row(logits + i_r * stride_x, bias, C, Tempering(logit_scale, softcap, tl.load(inv_temp + i_r)))
    own = Slots(slots + i_r * J, J, col0)

    o_j = tl.arange(0, BLOCK_K)
    for j0 in range(0, J, BLOCK_K):
        b_c, m_c = slot_columns(own, j0 + o_j, C)
        b_z = load_z(row, b_c, m_c, True)[0]
        tl.store(slot_logits + i_r * J + j0 + o_j, b_z, mask=m_c)

    m = tl.load(stats + i_r)
    rest = tl.load(stats + stride_s + i_r)
    restz = 0.0
    if ENTROPY:
        restz = tl.load(stats + 2 * stride_s + i_r)

    # Lanes: the state first, then a block of columns. The state is kept in ascending id order and its ids precede the
    # tile's, so lanes are in ascending id order and ties are settled by position alone.
    o_b = tl.arange(0, BLOCK)
    p_top = top_logits + i_r * K
    p_ids = top_ids + i_r * K
    b_id = tl.load(p_ids + o_b, mask=(o_b < BLOCK_K) & (o_b < K), other=-1)
    b_top = tl.load(p_top + o_b, mask=b_id >= 0, other=0.0)
    held = tl.sum((b_id >= 0).to(tl.int32), 0)
    least = tl.min(tl.where(b_id >= 0, ordered(b_top), TOP_KEY), 0)  # no key of the state is below it

    for c0 in range(0, C, BLOCK - BLOCK_K):
        o_c = c0 + o_b - BLOCK_K
        m_c = (o_b >= BLOCK_K) & (o_c < C)
        b_z = tl.where(m_c, load_z(row, o_c, m_c, True)[0], -float("inf"))
        b_key = tl.where(m_c, ordered(b_z), NO_KEY)
        m_in = o_b < 0  # none
        if (held < K) | (tl.max(b_key, 0) > least):
            b_id = tl.load(p_ids + o_b, mask=(o_b < BLOCK_K) & (o_b < K), other=-1)
            b_top = tl.load(p_top + o_b, mask=b_id >= 0, other=0.0)
            b_z = tl.where(b_id >= 0, b_top, b_z)
            b_key = tl.where(b_id >= 0, ordered(b_top), b_key)
            if held < K:
                least = tl.min(tl.where(b_key == NO_KEY, TOP_KEY, b_key), 0)
            held = tl.minimum(K, held + tl.minimum(C - c0, BLOCK - BLOCK_K))
            least = _threshold(b_key, least.to(tl.int64), tl.max(b_key, 0).to(tl.int64) + 1, held)
            m_tie = b_key == least
            spare = held - tl.sum((b_key > least).to(tl.int32), 0)
            m_in = (b_key > least) | (m_tie & (tl.cumsum(m_tie.to(tl.int32), 0) <= spare))
            b_place = tl.cumsum(m_in.to(tl.int32), 0) - 1
            tl.debug_barrier()  # the state is in registers everywhere before its places are rewritten
            tl.store(p_top + b_place, b_z, mask=m_in)
            tl.store(p_ids + b_place, tl.where(m_c, col0 + o_c, b_id), mask=m_in)
            tl.debug_barrier()  # the next block reads what other threads stored

        b_z = tl.where(m_in, -float("inf"), b_z)
        m_new = tl.maximum(m, tl.max(b_z, 0))
        ref = tl.where(m_new == -float("inf"), 0.0, m_new)
        gap = bounded(m - ref)
        b_gap = bounded(b_z - ref)
        b_e = tl.exp(b_gap)
        if ENTROPY:
            restz = tl.exp(gap) * (restz + gap * rest) + tl.sum(b_e * b_gap, 0)
        rest = tl.exp(gap) * rest + tl.sum(b_e, 0)
        m = m_new

    tl.store(stats + i_r, m)
    tl.store(stats + stride_s + i_r, rest)
    if ENTROPY:
        tl.store(stats + 2 * stride_s + i_r, restz)


def fold_topk_(
    logits: torch.Tensor,
    col0: int,
    bias: torch.Tensor | None,
    inv_temp: torch.Tensor,
    logit_scale: float,
    softcap: float,
    slots: torch.Tensor,
    stats: torch.Tensor,
    slot_logits: torch.Tensor,
    top_logits: torch.Tensor,
    top_ids: torch.Tensor,
    entropy: bool,
) -> None:
    """Fold the tile `logits (R, C)` into `stats (6, R)`, `top_logits (R, K)` and `top_ids (R, K)`, in place; tiles come in
    ascending `col0`. The top-K is kept in ascending id order."""
    require_dtype(
        "fold_topk_", logits=logits, bias=bias, inv_temp=inv_temp, stats=stats, slot_logits=slot_logits, top_logits=top_logits
    )
    rows, cols = logits.shape
    k = top_ids.shape[1]
    launch(
        fold_topk_kernel,
        (rows,),
        pick(TABLE, k),
        logits,
        logits.stride(0),
        cols,
        col0,
        bias,
        inv_temp.contiguous(),
        logit_scale,
        softcap or None,
        slots.contiguous(),
        slots.shape[1],
        slot_logits,
        stats,
        stats.stride(0),
        top_logits,
        top_ids,
        k,
        ENTROPY=entropy,
    )


def cases() -> Iterator[Case]:
    for k in sizes(TABLE, 1024):
        for f in flag_sets("bias", "softcap", "entropy", single=k == 128):
            state = (ids(R, J), meta(6, R), meta(R, J), meta(R, k), ids(R, k))
            yield Case(f"K={k} {'+'.join(sorted(f))}", fold_topk_, (meta(R, C), 0, *tempering(f, C), *state, "entropy" in f))


add_kernel(fold_topk_kernel, fold_topk_, TABLE, cases, max_registers=128, wide=(WIDE_LOAD,), tempers=True)
