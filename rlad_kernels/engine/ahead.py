"""What a forward of ``rlad::linear_logp`` makes for its backward while it has all logits of a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlad_kernels.engine import sparse
from rlad_kernels.engine.chunks import Chunks
from rlad_kernels.engine.gradients import Cotangents, backward_tile
from rlad_kernels.engine.rows import row_mask
from rlad_kernels.engine.tiles import Tiles


class Made(NamedTuple):
    """What a forward leaves for its backward besides statistics; empty where not asked for."""

    slope: Tensor  # (n, D) ∂logp/∂hidden
    dropped: Tensor  # (n,)
    keep: Tensor  # (blocks, V)
    mean: Tensor  # (blocks, D)


def whole_rows(
    hidden: Tensor, head: tuple[Any, ...], slots: Tensor, rows: int, entropy: bool, extras: bool, filter_eps: float
) -> tuple[Tensor, Tensor, Made]:
    """Chunks of rows with all their logits: statistics, and with ``filter_eps`` the choice of columns, without ∂logp/∂hidden.

    ``rows`` counts masked ones too: the number of blocks must not depend on the mask's values.
    """
    filtered = filter_eps > 0
    tiles = Tiles(hidden, *head, keep_logits=1, multiple=sparse.block_of(hidden) if filtered else 1)
    chunks = Chunks(tiles, slots)
    blocks, new = sparse.blocks_of(hidden, rows), chunks.stats.new_zeros
    if filtered:
        keep = torch.ones(blocks, tiles.vocab, dtype=torch.bool, device=hidden.device)  # masked rows leave some blocks empty
        means = sparse.Means(tiles, blocks)
        made = Made(new(0), new(tiles.n), keep, means.rows)
    else:
        means = None
        made = Made(new(tiles.n, hidden.shape[1]), new(0), new(0), new(0))
    for at in chunks:
        x = chunks.logits(at, entropy=entropy, extras=extras)
        done = chunks.outputs(at)
        if means is not None:
            b = slice(at.start // sparse.block_of(x), sparse.blocks_of(x, at.stop))
            made.keep[b], made.dropped[at] = sparse.choose(chunks, means, x, at, done.lse, filter_eps)
            continue
        one = torch.ones_like(done.lse)
        cot = Cotangents.of(slots[at], done.logp, None, done.lse, done.lse_error, one, None)
        cot.fit(tiles, at)
        for c0, c1, w in tiles.columns():
            tiles.add_product(made.slope[at], backward_tile(tiles, cot, x[:, c0:c1], c0, tiles.inv_temp[at]), w, cot.unscale)
        if cot.lost is not None:
            torch.ops.rlad.gather_dhidden_(made.slope[at], cot.lost, tiles.weight, cot.target, True)
    if means is not None:
        means.finish()
    return *tiles.shard.merged(chunks.stats, chunks.slot_logits), made


def from_slope(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inv_temp: Tensor,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    target: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    slope: Tensor,
    g_logp: Tensor | None,
    g_lse: Tensor | None,
) -> Tensor:
    """d_hidden = a·∂logp/∂h + l·∂lse/∂h, where ∂lse/∂h = ∂z_y/∂h − ∂logp/∂h."""
    keep = row_mask("linear_logp", target, mask)
    a, l = (torch.zeros_like(lse) if g is None else g for g in (g_logp, g_lse))
    d_hidden = (a - l).unsqueeze(1) * slope
    if g_lse is not None:
        ids = target if keep is None else torch.where(keep, target, -1)
        ids = torch.where((ids < 0) | (ids >= vocab_size), -1, ids).to(torch.int32).unsqueeze(1)
        g = l * inv_temp * logit_scale
        if softcap:
            raw = torch.ops.rlad.gather_dot(hidden, weight[:vocab_size], ids).squeeze(1)
            raw = raw if bias is None else raw + bias.to(raw.dtype)[ids.squeeze(1).clamp_min(0).long()]
            g = g * (1 - torch.tanh(raw * logit_scale / softcap).square())
        torch.ops.rlad.gather_dhidden_(d_hidden, g.unsqueeze(1), weight[:vocab_size], ids, True)
    live = (a != 0) | (l != 0)  # a row that nothing is sent back to has no gradient, whatever its slope is
    return torch.where((live if keep is None else live & keep).unsqueeze(1), d_hidden, 0).to(hidden.dtype)
