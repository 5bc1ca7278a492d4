"""Sparse backward: softmax mass sits in few columns, so a block of tokens sends its gradient through those alone.

Kept are the columns to which some token of the block gives p > eps, and the block's targets and supports. The rest of each
row's gradient, Σ_dropped dL/dz_v, is known without them, since a row's total is; it goes through the mean of the dropped
rows of W, weighted by the block's own probabilities. Their d_weight is zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlad_kernels.engine.gradients import Cotangents, Gradients
from rlad_kernels.engine.tiles import Tiles, new_scratch, scratch_size

BLOCK = 128  # tokens that share their columns: more would widen the union, fewer make the products small


class Columns(NamedTuple):
    """The choice for some blocks of tokens."""

    keep: Tensor  # (B, V) bool
    dropped: Tensor  # (R,) dropped probability of each token
    raw: list[Tensor]  # a block's raw logits of its kept columns


def blocks_of(rows: int) -> int:
    return -(-rows // BLOCK)


class Means:
    """``rows (B, D)`` = Σ p·slope·W_v / Σ p over each block's dropped columns and tokens, eight blocks a pass over W."""

    def __init__(self, tiles: Tiles, blocks: int) -> None:
        self.tiles, self.rows = tiles, tiles.inv_temp.new_zeros(blocks, tiles.hidden.shape[1])
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._done = 0

    def add(self, mass: Tensor, sloped: Tensor) -> None:
        """Σ p and Σ p·slope ``(B, V)`` of the next blocks, 0 in their kept columns."""
        tiny = torch.finfo(mass.dtype).tiny
        top = sloped.amax(1, keepdim=True).clamp_min(tiny)  # the largest share is 1: float16 holds no small ones
        self._pending.append(((sloped / top).to(self.tiles.grad_dtype), top / mass.sum(1, keepdim=True).clamp_min(tiny)))
        if sum(len(share) for share, _ in self._pending) >= 8:
            self.finish()

    def finish(self) -> Tensor:
        """``rows``, complete."""
        if self._pending:
            share, factor = (torch.cat(x) for x in zip(*self._pending, strict=True))
            here = slice(self._done, self._done + len(share))
            # on CPU, four rows take longer than eight; cuBLAS wants rows that start aligned
            share = torch.nn.functional.pad(share, (0, scratch_size(1, share.shape[1]) - share.shape[1], 0, -len(share) % 8))
            mean = self.rows.new_zeros(len(share), self.rows.shape[1])
            for c0, c1, w in self.tiles.columns():
                self.tiles.add_product(mean, share[:, c0:c1], w)
            self.rows[here] = mean[: len(factor)] * factor
            self._pending, self._done = [], here.stop
        return self.rows


def choose(tiles: Tiles, means: Means, x: Tensor, r0: int, lse: Tensor, slots: Tensor, eps: float) -> Columns:
    """The columns of the blocks whose rows start at r0; ``x (R, V)`` are their raw logits, ``lse`` and ``slots`` their rows'."""
    n = x.shape[0]
    out = x.new_empty(3 if tiles.softcap > 0 else 2, blocks_of(n), tiles.vocab)
    inv_temp = tiles.inv_temp[r0 : r0 + n]
    torch.ops.rlad.column_stats_(out, x, tiles.bias, inv_temp, tiles.logit_scale, tiles.softcap, lse, BLOCK)
    keep = out[0] > eps
    places = torch.where(slots < 0, slots[:, :1], slots).clamp(0, tiles.vocab - 1).long()
    block = torch.arange(n, device=x.device) // BLOCK
    keep[block.unsqueeze(1), places] = True
    out[1:].masked_fill_(keep, 0)
    means.add(out[1], out[-1])
    dropped, raw = x.new_empty(n), []
    for b in range(len(keep)):
        rows = slice(b * BLOCK, min((b + 1) * BLOCK, n))
        columns = keep[b].nonzero().squeeze(1)
        raw.append(x[rows].index_select(1, columns))
        z, _ = _tempered(tiles, raw[b], columns, inv_temp[rows])
        dropped[rows] = (1 - (z - lse[rows].unsqueeze(1)).exp().sum(1)).clamp_min(0)
    return Columns(keep, dropped, raw)


def backward(
    tiles: Tiles, grads: Gradients, cot: Cotangents, live: Tensor, keep: Tensor, r0: int = 0, raw: list[Tensor] | None = None
) -> None:
    """Send the gradient of the rows r0 + ``live`` through their kept columns, block by block; ``cot`` are their cotangents.

    Where the raw logits of the kept columns are not given, they are computed again.
    """
    done = 0
    for b, count in enumerate((live // BLOCK).bincount(minlength=len(keep)).tolist()):
        here, part = live[done : done + count], cot.take(slice(done, done + count))
        done += count
        if not count:
            continue
        rows, columns = here + r0, keep[b].nonzero().squeeze(1)
        w = tiles.operand(tiles.weight.index_select(0, columns))
        x = tiles.gathered(rows, w) if raw is None else raw[b].index_select(0, here - b * BLOCK)
        inv_temp = tiles.inv_temp.index_select(0, rows)
        z, slope = _tempered(tiles, x, columns, inv_temp)
        index = keep[b].cumsum(0) - 1
        place = torch.where(part.slots < 0, -1, index[part.slots.clamp(0, tiles.vocab - 1)]).to(torch.int32)
        g = _dlogits(part, z, place)
        rest = (part.total - g.sum(1)) * inv_temp * tiles.logit_scale
        exact = torch.mul(g, slope, out=new_scratch(g, g.shape))
        g = exact if exact.dtype == tiles.grad_dtype else new_scratch(g, g.shape, tiles.grad_dtype).copy_(exact)
        if part.lost is not None:
            at = index[part.target.clamp_max(tiles.vocab - 1)]
            part.lost += exact.gather(1, at) - g.gather(1, at)
        grads.add_columns(g, w, columns, rows, rest, part.unscale)


def add_means(grads: Gradients, means: Tensor) -> None:
    """d_hidden_t += (the dropped columns' gradient of t)·(the mean row of t's block)."""
    if grads.hidden is not None:
        for part, rest, mean in zip(grads.hidden.split(BLOCK), grads.rest.split(BLOCK), means, strict=False):
            part.addr_(rest, mean)


def _dlogits(cot: Cotangents, z: Tensor, place: Tensor) -> Tensor:
    """dL/dz of the kept columns, from their tempered logits and over them; ``place`` is where each slot's column is."""
    plain = (0, None, z.new_ones(len(z)), 1.0, 0.0)
    torch.ops.rlad.dlogits_(z, z, *plain, place, cot.slot_dz, cot.rows, cot.target, None, cot.entropy, cot.tail)
    return z


def _tempered(tiles: Tiles, raw: Tensor, columns: Tensor, inv_temp: Tensor) -> tuple[Tensor, Tensor]:
    """(z, dz/draw) of raw logits at scattered columns."""
    raw = raw if tiles.bias is None else raw + tiles.bias.index_select(0, columns)
    inv_temp = inv_temp.unsqueeze(1)
    z = raw * tiles.logit_scale
    if not tiles.softcap:
        return z * inv_temp, tiles.logit_scale * inv_temp
    bend = torch.tanh(z / tiles.softcap)
    return bend * tiles.softcap * inv_temp, (1 - bend * bend) * (tiles.logit_scale * inv_temp)
