"""row_cotangents: what a row's upstream gradients make of its dlogits, in one launch."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._kernel import Case, J, R, add_kernel, flag_sets, ids, meta, sizes
from ._launch import launch, require_dtype
from ._math import exp, expm1
from .outputs import TABLE, row_of

NEAR = tl.constexpr(-0.5)  # a log-prob from which 1 − p is formed as −expm1(log p)


@triton.jit
def _load(x, o, mask):
    """`x[o]`, zeros where there is no x."""
    return tl.zeros(o.shape, tl.float32) if x is None else tl.load(x + o, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["N", "K"])
def row_cotangents_kernel(
    slots,
    logp,
    topk_logp,
    lse,
    lse_error,
    g_logp,
    g_lse,
    g_entropy,
    g_topk,
    g_tail,
    entropy,
    tail_logp,
    N,
    K,
    own,
    slot_dz,
    rows,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """dL/dz = g + w·p − b·p(log p + H) + t·p/τ of each distinct slot, p/τ only outside the support; and the others' w, b, H, t."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r = o_r < N
    o_j = tl.arange(0, BLOCK_J)
    o_s = o_r[:, None] * (K + 1) + o_j[None, :]
    m_s = m_r[:, None] & (o_j < K + 1)[None, :]
    b_id = tl.load(slots + o_s, mask=m_s, other=-1)
    b_g = _load(g_logp, o_r, m_r)[:, None] + tl.zeros(o_s.shape, tl.float32)
    b_inside = tl.zeros([BLOCK_N], tl.int32)  # whether the target is of the support
    if BLOCK_J > 1:  # an id's first slot takes the sum of all, in their order; the others lose their id
        m_same = b_id == tl.load(slots + o_r * (K + 1), mask=m_r, other=-1)[:, None]
        b_g = tl.where(m_same, b_g, 0.0)
        m_later = m_same & (o_j > 0)[None, :]
        b_id = tl.where(m_later, -1, b_id)
        b_inside = tl.max(m_later.to(tl.int32), 1)
        for i in range(1, K + 1):
            b_i = tl.load(slots + o_r * (K + 1) + i, mask=m_r, other=-1)[:, None]
            m_same = (b_id == b_i) & (b_i >= 0)
            b_g += tl.where(m_same, _load(g_topk, o_r * K + i - 1, m_r)[:, None], 0.0)
            b_id = tl.where(m_same & (o_j > i)[None, :], -1, b_id)
    m_own = b_id >= 0
    b_lp = tl.load(logp + o_r, mask=m_r, other=0.0)[:, None] + tl.zeros(o_s.shape, tl.float32)
    if BLOCK_J > 1:
        m_k = m_s & (o_j > 0)[None, :]
        o_k = o_r[:, None] * K + (o_j - 1)[None, :]
        b_lp = tl.where(m_k, tl.load(topk_logp + o_k, mask=m_k, other=0.0), b_lp)
    tl.store(own + o_s, b_id, mask=m_s)
    b_g = tl.where(m_own, b_g, 0.0)

    b_lse = tl.load(lse + o_r, mask=m_r, other=0.0)
    b_error = tl.load(lse_error + o_r, mask=m_r, other=0.0)
    b_l = _load(g_lse, o_r, m_r)
    b_b = _load(g_entropy, o_r, m_r)
    b_h = _load(entropy, o_r, m_r)
    b_t = _load(g_tail, o_r, m_r)
    b_tau = _load(tail_logp, o_r, m_r)
    m_empty = b_tau == -float("inf")  # no mass outside the support: no gradient
    b_t = tl.where(m_empty, 0.0, b_t)
    b_tau = tl.where(m_empty, 0.0, b_tau)

    b_w = b_l - tl.sum(b_g, 1)
    m_some = m_own & (b_lp > -float("inf"))
    m_top = m_own & (b_lp > NEAR)
    b_all = (b_w - b_t)[:, None]
    b_others = b_l - tl.sum(tl.where(m_top, 0.0, b_g), 1)
    b_dz = tl.where(
        m_top,
        b_others[:, None] + b_all * expm1(b_lp),
        b_g + tl.where(m_some, b_all * exp(b_lp), 0.0),
    )
    if g_tail is not None:
        m_outside = (o_j == 0)[None, :] & (b_inside == 0)[:, None]  # all other slots that are kept are of the support
        b_share = tl.where(m_some & m_outside, b_lp - b_tau[:, None], -float("inf"))
        b_dz += b_t[:, None] * tl.where(m_top, expm1(b_share), exp(b_share))
    if g_entropy is not None:
        b_dz -= tl.where(m_some, b_b[:, None] * exp(b_lp) * (b_lp + b_h[:, None]), 0.0)
    tl.store(slot_dz + o_s, b_dz, mask=m_s)

    # what is left lies outside the support: p·(w − t + t/τ), from one exponential where 1/τ − 1 would be a small difference
    m_whole = b_tau > NEAR
    b_w += b_t * tl.where(m_whole, expm1(-b_tau), -1.0)
    b_tail_lse = b_lse + b_tau
    b_t = tl.where(m_whole, 0.0, b_t * (1.0 + (b_tail_lse - b_lse) - b_tau + b_error))
    stride = N.to(tl.int64)
    tl.store(rows + o_r, b_lse, mask=m_r)
    tl.store(rows + stride + o_r, b_w * (1.0 + b_error), mask=m_r)
    tl.store(rows + 2 * stride + o_r, b_b * (1.0 + b_error), mask=m_r)
    tl.store(rows + 3 * stride + o_r, b_h + b_error, mask=m_r)
    tl.store(rows + 4 * stride + o_r, b_t, mask=m_r)
    tl.store(rows + 5 * stride + o_r, tl.where(m_empty, float("inf"), b_tail_lse), mask=m_r)


def row_cotangents(
    slots: torch.Tensor,
    logp: torch.Tensor,
    topk_logp: torch.Tensor | None,
    lse: torch.Tensor,
    lse_error: torch.Tensor,
    g_logp: torch.Tensor | None,
    g_lse: torch.Tensor | None,
    g_entropy: torch.Tensor | None,
    g_topk: torch.Tensor | None,
    g_tail: torch.Tensor | None,
    entropy: torch.Tensor | None,
    tail_logp: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`slots`, `slot_dz` and `rows` of `engine.gradients.Cotangents`. Without `topk_logp` the slots are the targets `(N, 1)`."""
    require_dtype("row_cotangents", logp=logp, topk_logp=topk_logp, lse=lse, lse_error=lse_error, entropy=entropy)
    require_dtype(
        "row_cotangents", tail_logp=tail_logp, g_logp=g_logp, g_lse=g_lse, g_entropy=g_entropy, g_topk=g_topk, g_tail=g_tail
    )
    n, j = slots.shape
    row = row_of(TABLE, j)
    own, slot_dz, rows = torch.empty_like(slots, memory_format=torch.contiguous_format), lse.new_empty(n, j), lse.new_empty(6, n)

    def whole(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.contiguous()

    launch(
        row_cotangents_kernel,
        (triton.cdiv(n, dict(row.blocks)["BLOCK_N"]),),
        row,
        *map(whole, (slots, logp, topk_logp, lse, lse_error, g_logp, g_lse, g_entropy, g_topk, g_tail, entropy, tail_logp)),
        n,
        j - 1,
        own,
        slot_dz,
        rows,
    )
    return own, slot_dz, rows


def cases() -> Iterator[Case]:
    for j in sizes(TABLE, J):
        for f in flag_sets("entropy", "topk", "tail", single=j == 128):
            if (j > 1) != bool(f & {"topk", "tail"}):  # only what a support gets has its slots
                continue
            k = j - 1
            cots = (meta(R), meta(R) if f else None, meta(R) if "entropy" in f else None, meta(R, k) if "topk" in f else None)
            last = (meta(R) if "tail" in f else None, meta(R) if "entropy" in f else None, meta(R) if "tail" in f else None)
            args = (ids(R, j), meta(R), meta(R, k) if k else None, meta(R), meta(R), *cots, *last)
            yield Case(f"J={j} {'+'.join(sorted(f))}", row_cotangents, args)


add_kernel(row_cotangents_kernel, row_cotangents, TABLE, cases, max_registers=128)
