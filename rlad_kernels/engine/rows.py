"""Which rows of a call are computed: masks, dropping, id checks. Runs inside the ops, where values may be read."""

from __future__ import annotations

import torch
from torch import Tensor

from rlad_kernels.core.check import checked, may_read
from rlad_kernels.core.config import settings

IGNORE = -100


def row_mask(name: str, target: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Rows to keep, bool ``(N,)``: the mask's ones whose target is not −100; None keeps all.

    Raises:
        ValueError: for a numeric mask with a value other than 0 and 1 (on CUDA with ``set_checks(True)``).
    """
    keep = None if target is None else target != IGNORE
    if mask is None:
        return keep
    if mask.dtype != torch.bool:
        mask = checked(mask, "binary", f"{name}: mask") != 0
    return mask if keep is None else keep & mask


class Kept:
    """The rows of a call that are computed, gathered and scattered back.

    Dropping rows needs their number on the host: one synchronisation. Where that is not allowed (``set_compaction(False)``
    or CUDA graph capture) the other rows are computed on zeros instead, and zeroed on the way out.
    """

    def __init__(self, keep: Tensor | None) -> None:
        capturing = keep is not None and keep.is_cuda and torch.cuda.is_current_stream_capturing()
        self.dense = keep if not settings.compaction or capturing else None
        self.index: Tensor | None = None
        self.total = 0
        if keep is not None and self.dense is None:
            index = keep.nonzero().squeeze(1)
            if index.numel() < keep.numel():
                self.index, self.total = index, keep.numel()

    def take(self, x: Tensor, other: float = 0) -> Tensor:
        """The kept rows of ``x``; without dropping, ``x`` with ``other`` in the other rows."""
        if self.index is not None:
            return x.index_select(0, self.index)
        return x if self.dense is None else torch.where(self._column(x), x, other)

    def put(self, x: Tensor) -> Tensor:
        """``x`` in its rows' places, exact zeros elsewhere."""
        if self.index is not None:
            return x.new_zeros((self.total, *x.shape[1:])).index_copy_(0, self.index, x)
        return x if self.dense is None else torch.where(self._column(x), x, 0)

    def _column(self, x: Tensor) -> Tensor:
        assert self.dense is not None
        return self.dense.view(-1, *[1] * (x.dim() - 1))


def checked_ids(name: str, argument: str, ids: Tensor, low: int, vocab_size: int) -> Tensor:
    """``ids`` as int32 in ``[low, vocab_size)``; others raise on CPU, and become ``vocab_size`` (a NaN row) on CUDA.

    Raises:
        ValueError: naming the argument and the first bad id (on CUDA with ``set_checks(True)``).
    """
    bad = (ids < low) | (ids >= vocab_size)
    if may_read(ids) and bool(bad.any()):
        empty = ", or -1 for an empty slot" if low == -1 else ""
        raise ValueError(f"{name}: {argument} must be in [0, vocab_size={vocab_size}){empty}, got {ids[bad][0].item()}")
    return torch.where(bad, vocab_size, ids).to(torch.int32)


def kept_inv_temp(name: str, kept: Kept, inv_temp: Tensor, rows: int) -> Tensor:
    """1/temperature of the kept rows, checked; 1 in rows that are computed only to be zeroed: 0 times a bias of −∞ would be NaN."""
    inv_temp = kept.take(inv_temp.expand(rows), 1)
    checked_inv_temp(name, inv_temp, None)
    return inv_temp


def checked_inv_temp(name: str, inv_temp: Tensor, keep: Tensor | None) -> None:
    """Raise a ValueError for a kept temperature that is not positive and finite (on CUDA with ``set_checks(True)``)."""
    wrong = ~((inv_temp > 0) & (inv_temp < torch.inf))
    if keep is not None:
        wrong &= keep
    if may_read(inv_temp) and bool(wrong.any()):
        raise ValueError(f"{name}: temperature must be positive and finite, got {(1 / inv_temp[wrong][0]).item()}")


def checked_finite(name: str, lse: Tensor) -> None:
    """With ``set_checks(True)``: raise if a row's log-normaliser is not finite."""
    if settings.checks and not bool(lse.isfinite().all()):
        raise ValueError(f"{name}: hidden, weight or bias gave a non-finite log-normaliser in {int((~lse.isfinite()).sum())} rows")
