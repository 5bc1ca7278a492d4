"""Which rows of a call are computed: masks, dropping, id checks. Runs inside the ops, where values may be read."""

from __future__ import annotations

from collections.abc import Callable

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
        return x if self.dense is None else torch.where(self._column(x), x, other).to(x.dtype)

    def put(self, x: Tensor) -> Tensor:
        """``x`` in its rows' places, exact zeros elsewhere."""
        if self.index is not None:
            return x.new_zeros((self.total, *x.shape[1:])).index_copy_(0, self.index, x)
        return x if self.dense is None else torch.where(self._column(x), x, 0).to(x.dtype)  # bools stay bools

    def _column(self, x: Tensor) -> Tensor:
        assert self.dense is not None
        return self.dense.view(-1, *[1] * (x.dim() - 1))


def check_ids(name: str, argument: str, ids: Tensor, low: int, vocab_size: int) -> None:
    """Raise a ValueError that names the first id outside ``[low, vocab_size)`` (on CUDA with ``set_checks(True)``)."""
    if within(ids, lambda least, most: least >= low and most < vocab_size):
        return
    empty = ", or -1 for an empty slot" if low == -1 else ""
    first = ids[(ids < low) | (ids >= vocab_size)][0].item()
    raise ValueError(f"{name}: {argument} must be in [0, vocab_size={vocab_size}){empty}, got {first}")


def within(x: Tensor, holds: Callable[[float, float], bool]) -> bool:
    """Whether it holds for the least and the largest value of ``x``, NaN where there is one; True where they may not be read."""
    return not may_read(x) or not x.numel() or holds(*(end.item() for end in torch.aminmax(x)))


def kept_inv_temp(name: str, kept: Kept, inv_temp: Tensor, rows: int) -> Tensor:
    """1/temperature of the kept rows, checked; 1 in rows that are computed only to be zeroed: 0 times a bias of −∞ would be NaN."""
    given = inv_temp.numel()
    inv_temp = kept.take(inv_temp.expand(rows), 1)
    if given == rows:  # one for all was checked on its way here
        checked_inv_temp(name, inv_temp, None)
    return inv_temp


def checked_inv_temp(name: str, inv_temp: Tensor, keep: Tensor | None) -> None:
    """Raise a ValueError for a kept temperature that is not positive and finite (on CUDA with ``set_checks(True)``)."""
    if keep is not None:
        inv_temp = torch.where(keep, inv_temp, 1)
    if not within(inv_temp, lambda least, most: least > 0 and most < torch.inf):
        wrong = ~((inv_temp > 0) & (inv_temp < torch.inf))
        raise ValueError(f"{name}: temperature must be positive and finite, got {(1 / inv_temp[wrong][0]).item()}")


def checked_finite(name: str, lse: Tensor) -> None:
    """With ``set_checks(True)``: raise if a row's log-normaliser is not finite."""
    if settings.checks and not bool(lse.isfinite().all()):
        raise ValueError(f"{name}: hidden, weight or bias gave a non-finite log-normaliser in {int((~lse.isfinite()).sum())} rows")
