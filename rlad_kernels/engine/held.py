"""Logits of a forward that wait for its backward: memory for speed."""

from __future__ import annotations

from torch import Tensor

from rlad_kernels.core.config import settings
from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.engine.rows import Kept
from rlad_kernels.engine.tiles import empty, scratch, scratch_size


def held_rows(n: int, vocab: int, itemsize: int, keep: int) -> int:
    """How many of ``n`` rows of logits fit into ``keep`` bytes; none without compaction: a backward could not tell which."""
    rows = keep // (itemsize * max(scratch_size(1, vocab), 1)) if settings.compaction else 0
    return n if rows >= n else rows // 128 * 128


def held_logits(hidden: Tensor, rows: int, vocab: int, keep: int) -> Tensor:
    """Memory for the raw logits of the first rows, ``(held, V)`` with padded rows: how many is known without the mask's values."""
    acc = acc_dtype(hidden.dtype)
    held = held_rows(rows, vocab, acc.itemsize, keep)
    return (
        scratch(empty(hidden, scratch_size(held, vocab), dtype=acc), held, vocab)
        if held
        else hidden.new_empty((0, vocab), dtype=acc)
    )


def held_places(kept: Kept, keep: Tensor | None, held: int, rows: int) -> tuple[int, Tensor | None]:
    """How many of the backward's first rows have logits that the forward kept, and where: None is in their places.

    The forward dropped the rows without ``keep``, the backward those and more, or neither any.
    """
    if not held or kept.dense is not None:
        return 0, None
    if kept.index is None:
        return min(held, rows), None
    at = kept.index if keep is None else (keep.cumsum(0) - 1)[kept.index]
    return (rows if held >= kept.total else int((at < held).sum())), at
