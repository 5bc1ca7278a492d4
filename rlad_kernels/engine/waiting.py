"""d_weight of a sweep with tokens outermost, by one product over all rows: their dlogits wait for it.

Adding up in float32, chunk by chunk, reads and writes all of d_weight for each chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rlad_kernels.engine.tiles import Tiles, empty, scratch, scratch_size, slab_columns


@contextmanager
def summed_in_float32() -> Iterator[None]:
    """cuBLAS may else sum parts of a product that it splits in the result's 16 bits; process-wide."""
    settings = torch.backends.cuda.matmul
    if not settings.allow_bf16_reduced_precision_reduction:
        yield
        return
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = True


class Waiting:
    """The dlogits of the rows that send any, ``(n, V)`` in the products' operand dtype, in the order in which they come."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles, self.count = tiles, 0
        memory = empty(tiles.inv_temp, scratch_size(tiles.n, tiles.vocab), dtype=tiles.grad_dtype)
        self._dlogits = scratch(memory, tiles.n, tiles.vocab)
        self._hidden: list[Tensor] = []
        self._lost: list[Tensor] = []
        self._target: list[Tensor] = []

    def lent(self, weight: Tensor) -> Iterator[Tensor]:
        """The memory of d_weight, which nothing is in before :meth:`finish`, as that of a chunk's logits, as often as they fit."""
        tiles = self.tiles
        free, size = weight[: tiles.vocab].view(-1), scratch_size(tiles.rows, tiles.vocab)
        whole = tiles.acc.itemsize // weight.element_size()
        free = free[: len(free) // whole * whole].view(tiles.acc)
        return (free[end - size : end] for end in range(size, len(free) + 1, size or 1))

    def tile(self, rows: int, c0: int, c1: int) -> Tensor:
        """Where the next rows' dlogits of these columns go."""
        return self._dlogits[self.count : self.count + rows, c0:c1]

    def close(self, rows: slice | Tensor, target: Tensor | None, lost: Tensor | None) -> None:
        """All dlogits of ``rows`` are in, without what rounding took from their targets' entries, ``lost (R, 1)``."""
        hidden = self.tiles.hidden[rows]
        self.count += len(hidden)
        self._hidden.append(hidden)
        if target is not None and lost is not None:
            self._target.append(target)
            self._lost.append(lost)

    def finish(self, weight: Tensor, row: Tensor | None) -> None:
        """Write d_weight; ``row`` is to be added to each of its rows."""
        tiles, hidden = self.tiles, self.tiles.hidden
        if self.count < tiles.n:
            hidden = torch.cat(self._hidden)
        dlogits, lost = self._dlogits[: self.count], torch.cat(self._lost) if self._lost else None
        ids, order = (None, None) if lost is None else torch.cat(self._target).flatten().sort(stable=True)
        if tiles.rounds_once and row is None:
            weight = weight[: tiles.vocab]
            if lost is not None:  # of a rounding's size: rounded itself, it is off by the rounding of a rounding
                torch.ops.rlad.gather_dweight_(weight.zero_(), lost, hidden, order, ids, True)
            with summed_in_float32():
                weight.addmm_(dlogits.t(), hidden, beta=int(lost is not None))
            return
        cols = slab_columns(tiles.hidden.device.type, hidden.shape[1], tiles.acc.itemsize)
        space = empty(tiles.inv_temp, min(cols, tiles.vocab), hidden.shape[1])
        for c0 in range(0, tiles.vocab, cols):
            c1 = min(c0 + cols, tiles.vocab)
            g, slab = dlogits[:, c0:c1], space[: c1 - c0]
            tiles.add_product(slab, g.t(), hidden, first=True)
            if lost is not None:
                torch.ops.rlad.gather_dweight_(slab, lost, hidden, order, ids, True, c0)
            weight[c0:c1] = slab if row is None else slab.add_(row)
