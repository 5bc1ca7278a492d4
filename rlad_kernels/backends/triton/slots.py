"""row_slots: the columns that a row singles out, in one launch."""

from collections.abc import Iterator
from math import inf

import torch
import triton
import triton.language as tl

from ._kernel import Case, J, R, V, add_kernel, ids, meta
from ._launch import config, launch, pick, require_dtype

# By N·J, which is little: 4 bytes out a slot. What it saves is launches.
TABLE = (config(inf, 4, BLOCK=512),)


@triton.jit(do_not_specialize=["N", "K", "V"])
def row_slots_kernel(slots, target, ids, N, K, V, BLOCK: tl.constexpr):
    """slots[i] = target[i] | ids[i] as int32, V for what is out of range; −1 in ids is an empty slot."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = K + (0 if target is None else 1)
    o_n = o // j
    o_k = o % j - (j - K)
    m_o = o < N.to(tl.int64) * j
    b_id = tl.zeros([BLOCK], tl.int64)
    if ids is not None:
        b_id = tl.load(ids + o_n * K + o_k, mask=m_o & (o_k >= 0), other=0).to(tl.int64)
    m_ok = (b_id >= -1) & (b_id < V)
    if target is not None:
        b_y = tl.load(target + o_n, mask=m_o & (o_k < 0), other=0).to(tl.int64)
        m_ok = tl.where(o_k < 0, (b_y >= 0) & (b_y < V), m_ok)
        b_id = tl.where(o_k < 0, b_y, b_id)
    tl.store(slots + o, tl.where(m_ok, b_id, V).to(tl.int32), mask=m_o)


def row_slots(target: torch.Tensor | None, ids: torch.Tensor | None, vocab_size: int) -> torch.Tensor:
    """Slots `(N, J)` int32: `target (N,)`, if there is one, then `ids (N, K)`, with `vocab_size` for an id out of range."""
    given = target if ids is None else ids
    assert given is not None
    require_dtype("row_slots", (torch.int32, torch.int64), target=target, ids=ids)
    n, k = given.shape[0], 0 if ids is None else ids.shape[1]
    slots = given.new_empty((n, k + (target is not None)), dtype=torch.int32)
    row = pick(TABLE, slots.numel())
    launch(
        row_slots_kernel,
        (triton.cdiv(slots.numel(), dict(row.blocks)["BLOCK"]),),
        row,
        slots,
        None if target is None else target.contiguous(),
        None if ids is None else ids.contiguous(),
        n,
        k,
        vocab_size,
    )
    return slots


def cases() -> Iterator[Case]:
    for dtype in (torch.int64, torch.int32):
        yield Case(f"{dtype} target", row_slots, (meta(R, dtype=dtype), None, V))
        yield Case(f"{dtype} support", row_slots, (None, meta(R, J, dtype=dtype), V))
        yield Case(f"{dtype} both", row_slots, (meta(R, dtype=dtype), ids(R, J), V))


add_kernel(row_slots_kernel, row_slots, TABLE, cases, max_registers=40)
