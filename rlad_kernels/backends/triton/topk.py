"""fold_topk_: one tile folded into a running top-K of each row, and the softmax sums of everything outside it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._columns import Row, Slots, add_columns, join, load_z, no_sums, slot_columns
from ._kernel import WIDE_LOAD, C, Case, J, R, add_kernel, flag_sets, ids, meta, sizes, tempering
from ._launch import config, launch, pick, require_dtype
from ._math import NO_KEY, Tempering, bounded, ordered

# A column costs 4 bytes read, an exponential and some 30 instructions: memory bounds that. What does not scale with the columns is
# a row's selection, a reduction for each step of a bisection, 8 to 20 of them: barriers bound it, cheap among 4 warps, and other
# programs of the SM fill them. A row is read once; twice in its first tile, the second time from L2. By K: the pool is BLOCK_K
# lanes of state and the candidates, of which a random row has about K, and with K near half the lanes twice that.
TABLE = (
    config(32, 4, BLOCK=1024, LANES=128, BLOCK_K=32, POOL=256),  # answers of servers: K ≤ 20
    config(128, 4, BLOCK=1024, LANES=128, BLOCK_K=128, POOL=512),  # distillation supports
    config(1024, 16, BLOCK=4096, LANES=512, BLOCK_K=1024, POOL=4096),
)

TOP_KEY = tl.constexpr(2**31 - 1)
INF_KEY = tl.constexpr(0x7F800000)


class Pool(NamedTuple):
    """A row's candidates: their columns, in ascending order, as far as they fit."""

    columns: tl.tensor
    size: tl.tensor


class Bar(NamedTuple):
    """What a column must be above to be a candidate, as a key and as a float; before `end` it may equal it."""

    key: tl.tensor
    z: tl.tensor
    end: tl.tensor


@triton.jit
def _threshold(b_key, low, high, want, slack):
    """A key T with want to want + slack keys ≥ T, or else the largest T with more. Bisection in int64: keys span all of int32."""
    n = tl.sum((b_key >= low.to(tl.int32)).to(tl.int32), 0)
    while (high - low > 1) & (n > want + slack):
        mid = low + ((high - low) >> 1)
        n_ge = tl.sum((b_key >= mid.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(n_ge >= want, mid, low)
        high = tl.where(n_ge >= want, high, mid)
        n = tl.where(n_ge >= want, n_ge, n)
    return low.to(tl.int32)


@triton.jit
def _bar(key, end):
    """z > bar.z, or NaN, where ordered(z) > key; of NO_KEY it is NaN, and not (z ≤ NaN) for all."""
    z_key = tl.where(key == -1, -2, tl.minimum(key, INF_KEY))  # −0 has the key of 0
    return Bar(key, tl.where(z_key >= 0, z_key, z_key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True), end)


@triton.jit
def _block(row, c0, o_b):
    """z of one block of columns, −inf beyond the last; a full block without a mask, which would narrow the loads of an odd C."""
    o_c = c0 + o_b
    if c0 + o_b.shape[0] <= row.cols:
        b_z = load_z(row, o_c, o_c < row.cols, False)[0]
    else:
        b_z = tl.where(o_c < row.cols, load_z(row, o_c, o_c < row.cols, True)[0], -float("inf"))
    return b_z


@triton.jit
def _bound(row, o_b, want):
    """(A key that at least `want` columns reach and not many more, the largest key): by the largest of each lane, NaN above all."""
    b_top = tl.full(o_b.shape, -float("inf"), tl.float32)
    for c0 in range(0, row.cols, o_b.shape[0]):
        b_top = tl.maximum(b_top, _block(row, c0, o_b), propagate_nan=tl.PropagateNan.ALL)
    b_key = ordered(b_top)
    low = tl.min(b_key, 0)
    top = tl.max(b_key, 0)
    return _threshold(b_key, low.to(tl.int64), top.to(tl.int64) + 1, want, want // 4), top


@triton.jit
def _reaching(row, o_b, key):
    """How many columns' keys are ≥ key."""
    b_n = tl.zeros(o_b.shape, tl.int32)
    for c0 in range(0, row.cols, o_b.shape[0]):
        m_c = c0 + o_b < row.cols
        b_n += (m_c & (ordered(load_z(row, c0 + o_b, m_c, True)[0]) >= key)).to(tl.int32)
    return tl.sum(b_n, 0)


@triton.jit
def _state(p_top, p_ids, o_k, K):
    """Keys of a row's top, NO_KEY in its empty places."""
    m_held = tl.load(p_ids + o_k, mask=o_k < K, other=-1) >= 0
    return tl.where(m_held, ordered(tl.load(p_top + o_k, mask=m_held, other=0.0)), NO_KEY)


@triton.jit
def _exact(row, o_b, b_state, low, top, want):
    """(The want-th largest key T of state and columns, the first column past those of key T that belong to them).

    Reads the row for each bit of T.
    """
    low = low.to(tl.int64)
    high = tl.maximum(top, tl.max(b_state, 0)).to(tl.int64) + 1
    above = 0
    while high - low > 1:
        mid = low + ((high - low) >> 1)
        n_ge = tl.sum((b_state >= mid.to(tl.int32)).to(tl.int32), 0) + _reaching(row, o_b, mid.to(tl.int32))
        low = tl.where(n_ge >= want, mid, low)
        high = tl.where(n_ge >= want, high, mid)
        above = tl.where(n_ge >= want, above, n_ge)
    key = low.to(tl.int32)
    left = want - above - tl.sum((b_state == key).to(tl.int32), 0)
    end = 0
    for c0 in range(0, row.cols, o_b.shape[0]):
        if left > 0:
            m_c = c0 + o_b < row.cols
            b_tie = (m_c & (ordered(load_z(row, c0 + o_b, m_c, True)[0]) == key)).to(tl.int32)
            end = c0 + 1 + tl.max(tl.where((b_tie > 0) & (tl.cumsum(b_tie, 0) <= left), o_b, -1), 0)
            left -= tl.sum(b_tie, 0)
    return key, end


@triton.jit
def _hits(b_z, c0, o_c, bar, cols):
    """Which columns are candidates."""
    m_hit = ((b_z <= bar.z) == 0) & (bar.key < TOP_KEY)
    if c0 < bar.end:
        m_hit |= (ordered(b_z) == bar.key) & (o_c < bar.end)
    return m_hit & (o_c < cols)


@triton.jit
def _collect(row, c0, o_b, bar, s, pool, ENTROPY: tl.constexpr, CAP: tl.constexpr):
    """A block's candidates to the pool, the others to the sums; (sums, pool's size)."""
    b_z = _block(row, c0, o_b)
    m_hit = _hits(b_z, c0, c0 + o_b, bar, row.cols)
    s = add_columns(s, tl.where(m_hit, -float("inf"), b_z), c0 + o_b, ENTROPY, False)
    size = pool.size
    found = tl.sum(m_hit.to(tl.int32), 0)
    if found > 0:
        b_at = size + tl.cumsum(m_hit.to(tl.int32), 0) - 1
        tl.store(pool.columns + b_at, c0 + o_b, mask=m_hit & (b_at < CAP))
        size += found
    return s, size


@triton.jit
def _sweep(row, o_b, bar, p_pool, LANES: tl.constexpr, ENTROPY: tl.constexpr, CAP: tl.constexpr):
    """Every column to the pool or to the sums; (sums, candidates, more than CAP where they did not fit)."""
    s = no_sums(LANES)
    size = 0
    for c0 in range(0, row.cols, o_b.shape[0]):
        s, size = _collect(row, c0, o_b, bar, s, Pool(p_pool, size), ENTROPY, CAP)
    return s, size


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
    candidates,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    POOL: tl.constexpr,
):
    """top ← the K largest of top ∪ z, ties to the lower id; m, rest ← e^{m₀−m}·rest + Σ e^{z−m} over what is now outside."""
    CAP: tl.constexpr = POOL - BLOCK_K
    i_r = tl.program_id(0).to(tl.int64)
    row = Row(logits + i_r * stride_x, bias, C, Tempering(logit_scale, softcap, tl.load(inv_temp + i_r)))
    own = Slots(slots + i_r * J, J, col0)
    p_pool = candidates + i_r * CAP
    p_top = top_logits + i_r * K
    p_ids = top_ids + i_r * K
    o_b = tl.arange(0, BLOCK)
    o_k = tl.arange(0, BLOCK_K)
    o_p = tl.arange(0, POOL)

    for j0 in range(0, J, BLOCK_K):
        b_c, m_c = slot_columns(own, j0 + o_k, C)
        b_z = load_z(row, b_c, m_c, True)[0]
        tl.store(slot_logits + i_r * J + j0 + o_k, b_z, mask=m_c)

    b_state = _state(p_top, p_ids, o_k, K)
    held = tl.sum((b_state != NO_KEY).to(tl.int32), 0)

    # a column above the least of a full state may belong to the top; before that any may, which the row itself then bounds. In a
    # loop of tries every reduction would hold a register through all of it: the later ones are written out
    key = NO_KEY
    if held == K:
        key = tl.min(tl.where(o_k < K, b_state, TOP_KEY), 0)
    elif C > CAP:
        key = _bound(row, o_b, K)[0] - 1
    s, size = _sweep(row, o_b, _bar(key, 0), p_pool, LANES, ENTROPY, CAP)
    if size > CAP:
        bound, top = _bound(row, o_b, K)
        key = tl.maximum(key, bound - 1)
        end = 0
        if _reaching(row, o_b, key + 1) > CAP:  # as of equal ones
            key, end = _exact(row, o_b, _state(p_top, p_ids, o_p, K), key + 1, top, K)
        s, size = _sweep(row, o_b, _bar(key, end), p_pool, LANES, ENTROPY, CAP)

    stride_s = tl.cast(stride_s, tl.int64)  # two of them may be beyond int32
    restz = tl.load(stats + 2 * stride_s + i_r) if ENTROPY else 0.0
    m, rest, restz, _, _, _ = join(s, tl.load(stats + i_r), tl.load(stats + stride_s + i_r), restz, ENTROPY)

    if size > 0:
        # Lanes: the state, then the candidates. The state is kept in ascending id order and its ids precede the tile's, so
        # lanes are in ascending id order and ties are settled by position alone.
        tl.debug_barrier()  # other threads stored the candidates
        b_c = tl.load(p_pool + o_p - BLOCK_K, mask=(o_p >= BLOCK_K) & (o_p < BLOCK_K + size), other=-1)
        b_id = tl.load(p_ids + o_p, mask=(o_p < BLOCK_K) & (o_p < K), other=-1)
        b_z = load_z(row, b_c, b_c >= 0, True)[0]
        b_z = tl.where(b_id >= 0, tl.load(p_top + o_p, mask=b_id >= 0, other=0.0), b_z)
        b_id = tl.where(b_c >= 0, col0 + b_c, b_id)
        b_key = tl.where(b_id >= 0, ordered(b_z), NO_KEY)
        low = tl.maximum(tl.min(tl.where(b_id >= 0, b_key, TOP_KEY), 0), key)
        want = tl.minimum(K, tl.sum((b_id >= 0).to(tl.int32), 0))
        least = _threshold(b_key, low.to(tl.int64), tl.max(b_key, 0).to(tl.int64) + 1, want, 0)
        m_tie = b_key == least
        spare = want - tl.sum((b_key > least).to(tl.int32), 0)
        m_in = (b_key > least) | (m_tie & (tl.cumsum(m_tie.to(tl.int32), 0) <= spare))
        b_place = tl.cumsum(m_in.to(tl.int32), 0) - 1
        tl.debug_barrier()  # the state is in registers everywhere before its places are rewritten
        tl.store(p_top + b_place, b_z, mask=m_in)
        tl.store(p_ids + b_place, b_id, mask=m_in)

        b_z = tl.where(m_in | (b_id < 0), -float("inf"), b_z)
        m_new = tl.maximum(m, tl.max(tl.where(b_z > -float("inf"), b_z, -float("inf")), 0))
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
    row = pick(TABLE, k)
    blocks = dict(row.blocks)
    launch(
        fold_topk_kernel,
        (rows,),
        row,
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
        top_ids.new_empty((rows, blocks["POOL"] - blocks["BLOCK_K"])),
        ENTROPY=entropy,
    )


def cases() -> Iterator[Case]:
    for k in sizes(TABLE, 1024):
        for f in flag_sets("bias", "softcap", "entropy", single=k == 128):
            state = (ids(R, J), meta(6, R), meta(R, J), meta(R, k), ids(R, k))
            yield Case(f"K={k} {'+'.join(sorted(f))}", fold_topk_, (meta(R, C), 0, *tempering(f, C), *state, "entropy" in f))


add_kernel(fold_topk_kernel, fold_topk_, TABLE, cases, max_registers=112, wide=(WIDE_LOAD,), tempers=True)
