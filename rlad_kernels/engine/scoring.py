"""The forward statistics of a call from the fully fused kernel: no tile of logits, partial sums merged in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from rlad_kernels.backends.contract import INTERPRET
from rlad_kernels.core.config import settings
from rlad_kernels.engine.statistics import Stats, merge_tiles

# All tiles' statistics wait for the merge, which needs as much again for a moment. A bound from the narrowest tiles: with
# those of Hopper half of it is used.
_PARTIAL_BYTES = 256 << 20
_ROW_BLOCK = 128


def fused(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the fused kernel serves a call: where the frozen table says so, and the rows are ones that it can read.

    The answer depends on the device, dtype, row count and memory layout alone.
    """
    if settings.fused_scoring is not None:
        return settings.fused_scoring
    if not (hidden.is_cuda or INTERPRET):
        return False
    from rlad_kernels.backends.triton import score
    from rlad_kernels.backends.triton._launch import architecture

    least = score.FUSED_SCORING.get((architecture(hidden.device), hidden.dtype.itemsize))
    return least is not None and hidden.shape[0] >= least and score.aligned(hidden) and score.aligned(weight)


def statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inv_temp: Tensor,
    logit_scale: float,
    softcap: float,
    slots: Tensor,
    entropy: bool,
    extras: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics ``(6, N)`` and slot logits ``(N, J)`` of all rows."""
    bias = None if bias is None else bias.float()
    inv_temp = inv_temp.float().expand(hidden.shape[0]).contiguous()
    stats, z = inv_temp.new_empty(len(Stats._fields), hidden.shape[0]), inv_temp.new_empty(slots.shape)
    tiles = -(-weight.shape[0] // 128)
    blocks = _PARTIAL_BYTES // (_ROW_BLOCK * stats.shape[0] * stats.element_size() * tiles)
    rows = settings.tile_rows or _ROW_BLOCK * max(blocks, 1)
    for r0 in range(0, hidden.shape[0], rows):
        r = slice(r0, r0 + rows)
        parts, z[r] = torch.ops.rlad.score_partials(
            hidden[r], weight, bias, inv_temp[r], logit_scale, softcap, slots[r], entropy, extras
        )
        stats[:, r] = merge_tiles(parts)
    return stats, z
