"""row_outputs: log-probs, entropy and masses of rows whose statistics are complete, in one launch."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from rlad_kernels.backends.contract import INTERPRET

from ._kernel import Case, J, R, V, add_kernel, flag_sets, ids, meta, sizes
from ._launch import Config, config, launch, pick, require_dtype
from ._math import bounded, exp, log1p

# By J. A row's slots lie in one block, a thread a slot where there are few; some 60 bytes a row and 12 a slot, less than a
# microsecond of memory time: what it saves is 60 launches. From 512 slots on the comparisons of all with all, J²/threads a row,
# cost more than that; sixteen warps hold 4,097 slots without a spill.
TABLE = (
    config(1, 4, BLOCK_N=128, BLOCK_J=1),
    config(8, 2, BLOCK_N=8, BLOCK_J=8),
    config(32, 2, BLOCK_N=2, BLOCK_J=32),
    config(128, 4, BLOCK_N=1, BLOCK_J=128),
    config(512, 4, BLOCK_N=1, BLOCK_J=512),
    config(2048, 16, BLOCK_N=1, BLOCK_J=2048),
    config(8192, 16, BLOCK_N=1, BLOCK_J=8192),
)


def row_of(table: tuple[Config, ...], j: int) -> Config:
    """The table's row for J slots; interpreted, where a program costs what its steps do, whatever its width, it takes many rows."""
    row = pick(table, j)
    return replace(row, blocks=tuple((dict(row.blocks) | {"BLOCK_N": 64 if j <= 2048 else 1}).items())) if INTERPRET else row


@triton.jit
def _later(ids, o_r, m_r, b_id, o_j, J):
    """Which slots `(rows, J)` repeat an earlier one of their row."""
    m_later = (b_id < 0) & (b_id >= 0)
    for i in range(0, J - 1):
        b_i = tl.load(ids + o_r * J + i, mask=m_r, other=-1)
        m_later = m_later | ((b_id == b_i[:, None]) & (o_j > i)[None, :])
    return m_later


@triton.jit
def _log_add(b_a, b_b):
    """log(e^a + e^b)"""
    b_top = tl.where(b_a > b_b, b_a, b_b)
    b_gap = tl.where(b_top == -float("inf"), 0.0, -tl.abs(b_a - b_b))
    return b_top + log1p(tl.exp(b_gap))


@triton.jit(do_not_specialize=["N", "J", "V"])
def row_outputs_kernel(
    stats,
    stride_s,
    slot_logits,
    slots,
    N,
    J,
    V,
    logp,
    topk_logp,
    lse,
    lse_error,
    entropy,
    tail_logp,
    mean_logits,
    is_top1,
    log_sum_sq,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """The sums are closed with e^{z} of each distinct slot; log p of the largest is −log1p(others/e) where p > ½."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r = o_r < N
    o_j = tl.arange(0, BLOCK_J)
    o_s = o_r[:, None] * J + o_j[None, :]
    m_s = m_r[:, None] & (o_j < J)[None, :]
    b_id = tl.load(slots + o_s, mask=m_s, other=-1)
    m_first = b_id >= 0
    if BLOCK_J > 1:
        m_first = m_first & ~_later(slots, o_r, m_r, b_id, o_j, J)
    b_z = tl.load(slot_logits + o_s, mask=m_s, other=-float("inf"))
    p_s = stats + o_r
    stride_s = tl.cast(stride_s, tl.int64)  # five of them may be beyond int32
    b_m = tl.load(p_s, mask=m_r, other=0.0)
    b_rest = tl.load(p_s + stride_s, mask=m_r, other=1.0)
    # what is asked of the slots comes before what is made of them, which takes their registers
    if logp is not None:
        m_y = (o_j == 0)[None, :]
        b_y = tl.sum(tl.where(m_y, b_id, 0), 1)
        b_zy = tl.sum(tl.where(m_y, b_z, 0.0), 1)
        m_inside = tl.max(((b_id == b_y[:, None]) & ~m_y).to(tl.int32), 1) > 0
        if is_top1 is not None:
            b_first = tl.load(p_s + 5 * stride_s, mask=m_r, other=0.0)
            m_beaten = (b_m > b_zy) | ((b_m == b_zy) & (b_first < b_y.to(tl.float32)))
            m_slot = (b_id >= 0) & ((b_z > b_zy[:, None]) | ((b_z == b_zy[:, None]) & (b_id < b_y[:, None])))
            m_beaten = m_beaten | (tl.max(m_slot.to(tl.int32), 1) > 0) | (b_zy != b_zy)
            tl.store(is_top1 + o_r, ~m_beaten, mask=m_r)

    b_high = tl.max(b_z, 1)
    b_peak = tl.where(b_high > b_m, b_high, b_m)
    b_gap = b_m - b_peak
    b_log_rest = tl.log(b_rest) + b_gap
    b_gap = bounded(b_gap)  # an empty rest must give 0·0, not 0·inf
    b_down = exp(b_gap)
    b_other = b_rest * b_down
    b_shift = b_z - b_peak[:, None]
    b_e = tl.where(m_first, exp(b_shift), 0.0)
    b_total = b_other + tl.sum(b_e, 1)
    b_log_total = tl.log(b_total)
    # what else sums over slots comes here: later it would keep their values in registers
    b_weighted = b_total
    if entropy is not None:
        b_weighted = tl.sum(tl.where(b_e > 0, b_e * b_shift, 0.0), 1)
    b_squares = b_total
    if mean_logits is not None:
        b_squares = tl.sum(b_e * b_e, 1)
    b_largest = tl.max(b_e, 1)
    b_top = tl.min(tl.where(m_first & (b_e == b_largest[:, None]), o_j[None, :], BLOCK_J), 1)
    m_top = o_j[None, :] == b_top[:, None]
    b_others = b_other + tl.sum(tl.where(m_top, 0.0, b_e), 1)
    m_sure = b_largest > b_others
    b_exact = -log1p(b_others / tl.where(m_sure, b_largest, 1.0))
    b_z_top = tl.sum(tl.where(m_top, b_z, 0.0), 1)
    b_lp = tl.where((b_z == b_z_top[:, None]) & m_sure[:, None], b_exact[:, None], b_shift - b_log_total[:, None])
    b_log_total = tl.where(m_sure, -b_exact, b_log_total)  # its slot is the row's maximum: e^{z−max} = 1
    b_lse = b_peak + b_log_total

    # on CUDA an id out of range has not raised: its row is NaN
    b_bad = tl.where(tl.max(b_id, 1) >= V, float("nan"), 0.0)
    tl.store(lse + o_r, b_lse + b_bad, mask=m_r)
    tl.store(lse_error + o_r, (b_lse - b_peak) - b_log_total + b_bad, mask=m_r)
    target = 0
    m_support = m_first
    if logp is not None:
        target = 1
        tl.store(logp + o_r, tl.sum(tl.where(m_y, b_lp, 0.0), 1) + b_bad, mask=m_r)
        m_support = m_first & (~m_y | m_inside[:, None])
    if topk_logp is not None:
        b_kept = tl.where(b_id < 0, -float("inf"), b_lp) + b_bad[:, None]
        tl.store(topk_logp + o_r[:, None] * (J - target) + (o_j - target)[None, :], b_kept, mask=m_s & (o_j >= target)[None, :])
    if tail_logp is not None:
        b_support = tl.sum(tl.where(m_support, exp(b_lp), 0.0), 1)
        b_outside = b_log_rest
        if logp is not None:
            b_outside = tl.where(m_inside, b_log_rest, _log_add(b_log_rest, b_zy - b_peak))
        b_tail = tl.where(b_support < 0.5, log1p(-b_support), b_outside - b_log_total)
        tl.store(tail_logp + o_r, b_tail + b_bad, mask=m_r)
    if entropy is not None:
        b_restz = b_down * (tl.load(p_s + 2 * stride_s, mask=m_r, other=0.0) + b_gap * b_rest)
        b_h = b_log_total - (b_restz + b_weighted) / b_total
        tl.store(entropy + o_r, tl.where(b_h < 0, 0.0, b_h) + b_bad, mask=m_r)
    if mean_logits is not None:
        b_sq = tl.load(p_s + 3 * stride_s, mask=m_r, other=0.0) * b_down * b_down + b_squares
        tl.store(log_sum_sq + o_r, tl.log(b_sq) - 2.0 * b_log_total + b_bad, mask=m_r)
        tl.store(mean_logits + o_r, tl.load(p_s + 4 * stride_s, mask=m_r, other=0.0) / V + b_bad, mask=m_r)


def row_outputs(
    stats: torch.Tensor,
    slot_logits: torch.Tensor,
    slots: torch.Tensor,
    vocab_size: int,
    target: bool,
    entropy: bool,
    tail: bool,
    extras: bool,
) -> tuple[torch.Tensor, ...]:
    """`engine.outputs.Outputs` of `stats (6, N)`, `slot_logits (N, J)` and `slots (N, J)`; with `target` the first slot is it."""
    require_dtype("row_outputs", stats=stats, slot_logits=slot_logits)
    n, j = slots.shape
    k = j - target

    def new(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return stats.new_empty(shape if wanted else (0,), dtype=dtype)

    logp, lse, h, topk_logp = new(target, n), new(True, n), new(entropy, n), new(k > 0, n, k)
    tail_logp, mean, top1, sum_sq = new(tail, n), new(extras, n), new(extras, n, dtype=torch.bool), new(extras, n)
    error = new(True, n)
    row = row_of(TABLE, j)
    launch(
        row_outputs_kernel,
        (triton.cdiv(n, dict(row.blocks)["BLOCK_N"]),),
        row,
        stats,
        stats.stride(0),
        slot_logits.contiguous(),
        slots.contiguous(),
        n,
        j,
        vocab_size,
        logp if target else None,
        topk_logp if k else None,
        lse,
        error,
        h if entropy else None,
        tail_logp if tail else None,
        mean if extras else None,
        top1 if extras else None,
        sum_sq if extras else None,
    )
    return logp, lse, h, topk_logp, tail_logp, mean, top1, sum_sq, error


def cases() -> Iterator[Case]:
    for j in sizes(TABLE, J):
        for f in flag_sets("entropy", "tail", "extras", single=j == 128):
            asked = ("entropy" in f, "tail" in f, "extras" in f)
            for target in (True, False):
                state = (meta(6, R), meta(R, j), ids(R, j))
                yield Case(f"J={j} target={target} {'+'.join(sorted(f))}", row_outputs, (*state, V, target, *asked))


add_kernel(row_outputs_kernel, row_outputs, TABLE, cases, max_registers=128)
