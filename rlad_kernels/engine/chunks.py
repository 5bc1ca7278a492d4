"""The loop of every sweep that holds whole rows: chunks of rows with all their logits, in one buffer that is used again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlad_kernels.engine.outputs import Outputs, outputs
from rlad_kernels.engine.tiles import Tiles, empty, scratch, scratch_size


class Chunks:
    """The rows of one model, chunk by chunk: ``for at in chunks: x = chunks.logits(at, …)``.

    ``slots (n, J)`` may be None; ``space`` is another model's, which is used in turn; ``lent`` is taken before new memory is.
    """

    def __init__(
        self, tiles: Tiles, slots: Tensor | None = None, space: Tensor | None = None, lent: Iterator[Tensor] | None = None
    ) -> None:
        self.tiles, self._lent = tiles, lent or iter(())
        self.slots = tiles.hidden.new_empty(tiles.n, 0, dtype=torch.int32) if slots is None else slots
        self.own = tiles.shard.own(self.slots)
        self.stats, self.slot_logits = tiles.new_stats(self.slots.shape[1])
        self.shared = self.space() if space is None else space

    def __iter__(self) -> Iterator[slice]:
        return (slice(r0, r1) for r0, r1 in self.tiles.row_ranges())

    def space(self) -> Tensor:
        """Memory for the logits of one more chunk."""
        lent = next(self._lent, None)
        return empty(self.tiles.inv_temp, scratch_size(self.tiles.rows, self.tiles.vocab)) if lent is None else lent

    def view(self, space: Tensor, at: slice) -> Tensor:
        """``space`` as ``(R, V)`` for the rows ``at``."""
        return scratch(space, at.stop - at.start, self.tiles.vocab)

    def logits(self, at: slice, *, entropy: bool = False, extras: bool = False) -> Tensor:
        """All logits of the rows ``at``, folded into their statistics; those of the chunk before are overwritten."""
        x = self.view(self.shared, at)
        for c0, c1, w in self.tiles.columns():
            tile = self.tiles.logits(at.start, at.stop, w, x[:, c0:c1])
            self.tiles.fold(tile, c0, at.start, at.stop, self.own, self.stats, self.slot_logits, entropy=entropy, extras=extras)
        return x

    def outputs(self, at: slice, *, entropy: bool = False, tail: bool = False, here: bool = False) -> Outputs:
        """The outputs of rows whose logits were folded; of the columns ``here`` alone, where other ranks have others."""
        stats, z = self.stats[:, at], self.slot_logits[at]
        if here:
            return outputs(stats, z, self.own[at], self.tiles.vocab)
        stats, z = self.tiles.shard.merged(stats, z)
        return outputs(stats, z, self.slots[at], self.tiles.total, entropy=entropy, tail=tail)
