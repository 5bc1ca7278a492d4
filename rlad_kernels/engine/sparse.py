"""Sparse backward: softmax mass sits in few columns, so a block of tokens sends its gradient through those alone.

Kept are the columns to which some token of the block gives p > eps, and the block's targets and supports. The rest of each
row's gradient, Σ_dropped dL/dz_v, is known without them, since a row's total is; it goes through the mean of the dropped
rows of W, weighted by the block's own probabilities. Their d_weight is zero. A block that would keep most columns keeps all:
whole tiles then cost less than gathered ones, and nothing is dropped.

The choice is made on the device. The host reads how many columns each block keeps, and which: twice for all blocks at hand.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlad_kernels.backends.contract import on_cpu
from rlad_kernels.engine.chunks import Chunks
from rlad_kernels.engine.gradients import Cotangents, Gradients, backward_tile
from rlad_kernels.engine.shards import Shard
from rlad_kernels.engine.tiles import Tiles, new_scratch, scratch_size

# Tokens that share their columns: more would widen the union, fewer make the products small.
BLOCK = {"cpu": 128, "cuda": 512}
# The part of the vocabulary from which a block's columns are no longer gathered, by device and bytes of an operand's element: where
# `python -m bench.tune` sees the two meet. CUDA's are not measured yet.
EXACT_ABOVE = {("cpu", 8): 0.35, ("cpu", 4): 0.35, ("cpu", 2): 0.12, ("cuda", 4): 0.5, ("cuda", 2): 0.5}


class Columns(NamedTuple):
    """The choice for some blocks of tokens."""

    keep: Tensor  # (B, V) bool, of the columns here
    dropped: Tensor  # (R,) dropped probability of each token, wherever the columns are


class Counts(NamedTuple):
    """How many columns each block keeps, on the host."""

    here: list[int]
    all: list[int]  # those of the other ranks too, where a head is in parts


def block_of(x: Tensor) -> int:
    """Tokens in a block, on the device of ``x``."""
    return BLOCK[x.device.type]


def blocks_of(x: Tensor, rows: int) -> int:
    """Blocks of so many tokens, on the device of ``x``."""
    return -(-rows // block_of(x))


def counts(keep: Tensor, shard: Shard) -> Counts:
    """Of ``keep (B, V)``."""
    here = keep.sum(1)
    if shard.group is None:
        return Counts(*[here.tolist()] * 2)
    return Counts(*torch.stack([here, shard.summed(here.clone())]).tolist())


class Means:
    """``rows (B, D)`` = Σ p·slope·W_v / Σ p over each block's dropped columns and tokens, eight blocks a pass over W.

    Of a head in parts the sum above is over the columns here: the ranks' rows add up to the mean.
    """

    def __init__(self, tiles: Tiles, blocks: int) -> None:
        self.tiles, self.rows = tiles, tiles.inv_temp.new_zeros(blocks, tiles.hidden.shape[1])
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._done = 0

    def add(self, mass: Tensor, sloped: Tensor) -> None:
        """Σ p and Σ p·slope ``(B, V)`` of the next blocks, 0 in their kept columns."""
        tiny = torch.finfo(mass.dtype).tiny
        top = pad(sloped, (0, 1)).amax(1, keepdim=True).clamp_min(tiny)  # the largest share is 1: float16 holds no small ones
        whole = self.tiles.shard.summed(mass.sum(1, keepdim=True))
        self._pending.append(((sloped / top).to(self.tiles.grad_dtype), top / whole.clamp_min(tiny)))
        if sum(len(share) for share, _ in self._pending) >= 8:
            self.finish()

    def finish(self) -> Tensor:
        """``rows``, complete."""
        if self._pending:
            share, factor = (torch.cat(x) for x in zip(*self._pending, strict=True))
            here = slice(self._done, self._done + len(share))
            if share.is_cuda or bool(share.any()):  # blocks that keep all need no mean; on CUDA to look would cost more
                # on CPU, four rows take longer than eight; cuBLAS wants rows that start aligned
                share = pad(share, (0, scratch_size(1, share.shape[1]) - share.shape[1], 0, -len(share) % 8))
                mean = self.rows.new_zeros(len(share), self.rows.shape[1])
                for c0, c1, w in self.tiles.columns():
                    self.tiles.add_product(mean, share[:, c0:c1], w)
                self.rows[here] = mean[: len(factor)] * factor
            self._pending, self._done = [], here.stop
        return self.rows


def choose(chunks: Chunks, means: Means, x: Tensor, at: slice, lse: Tensor, eps: float) -> Columns:
    """The columns of the blocks of the rows ``at``; ``x (R, V)`` are their raw logits, which the chunks have folded."""
    tiles, own = chunks.tiles, chunks.own[at]
    n, size = x.shape[0], block_of(x)
    out = x.new_empty(3 if tiles.softcap > 0 else 2, blocks_of(x, n), tiles.vocab)
    tempering = (tiles.bias, tiles.inv_temp[at], tiles.logit_scale, tiles.softcap)
    if tiles.vocab:
        torch.ops.rlad.column_stats_(out, x, *tempering, lse, size)
    keep = pad(out[0] > eps, (0, 1))  # a last column for slots that are empty, or another rank's
    keep[(torch.arange(n, device=x.device) // size).unsqueeze(1), torch.where(own < 0, tiles.vocab, own).long()] = True
    keep = keep[:, :-1].contiguous()
    most = EXACT_ABOVE[x.device.type, tiles.grad_dtype.itemsize] * tiles.total
    keep |= tiles.shard.summed(keep.sum(1, keepdim=True)) > most
    out[1:].masked_fill_(keep, 0)
    means.add(out[1], out[-1])
    if tiles.shard.group is None:
        return Columns(keep, torch.ops.rlad.dropped_mass(keep, x, *tempering, lse, size))
    here = chunks.outputs(at, here=True).lse
    share = (here - lse).exp()  # of a token's probability, on this rank
    dropped = torch.ops.rlad.dropped_mass(keep, x, *tempering, here, size) if tiles.vocab else share
    return Columns(keep, tiles.shard.summed(torch.where(share > 0, share * dropped, 0)))


def dropped_mass_cpu(
    keep: Tensor, logits: Tensor, bias: Tensor | None, inv_temp: Tensor, logit_scale: float, softcap: float, lse: Tensor, block: int
) -> Tensor:
    """Implements ``rlad::dropped_mass`` on CPU: 1 less what is kept, which is little."""
    dropped = torch.zeros_like(lse)
    for b, kept in enumerate(keep):
        if bool(kept.all()):
            continue
        rows, columns = slice(b * block, (b + 1) * block), kept.nonzero().squeeze(1)
        own = None if bias is None else bias.index_select(0, columns)
        z, _ = _tempered(logits[rows].index_select(1, columns), own, inv_temp[rows], logit_scale, softcap)
        dropped[rows] = (1 - (z - lse[rows].unsqueeze(1)).exp().sum(1)).clamp_min(0)
    return dropped


on_cpu("dropped_mass", dropped_mass_cpu)


def backward(
    tiles: Tiles,
    grads: Gradients,
    cot: Cotangents,
    live: Tensor | None,
    keep: Tensor,
    found: Counts,
    r0: int = 0,
    x: Tensor | None = None,
) -> None:
    """Send the gradient of rows through the columns that their blocks ``keep (B, V)``, so many; the rows start at r0.

    ``cot`` are the cotangents of the rows r0 + ``live``, of all without it. ``x (R, V)`` are the blocks' raw logits; without them
    the kept columns' are computed again.
    """
    size, rows = block_of(keep), len(cot.slots)
    if live is None:
        ends = [min(b * size, rows) for b in range(len(keep) + 1)]
        live = torch.arange(rows, device=keep.device)
    else:
        ends = [0, *accumulate((live // size).bincount(minlength=len(keep)).tolist())]
    whole = [c == tiles.total for c in found.all]
    parts = [slice(a, b) for a, b in pairwise(ends)]
    if any(whole):
        _through_all(tiles, grads, cot, live, [part for part, w in zip(parts, whole, strict=True) if w], r0, x)
    if all(whole):
        return
    some = [b for b, w in enumerate(whole) if not w]
    keep = keep if len(some) == len(keep) else keep.index_select(0, torch.tensor(some, device=keep.device))
    columns = keep.nonzero()[:, 1].split([found.here[b] for b in some])
    for b, mine, place in zip(some, columns, keep.cumsum(1, dtype=torch.int32) - 1, strict=True):
        part = parts[b]
        if part.stop > part.start:
            here, start = live[part], b * size
            held = None if x is None else (x[start : start + size], here - start)
            _through_some(tiles, grads, cot.take(part), here + r0, mine, place, held)


def _through_all(
    tiles: Tiles, grads: Gradients, cot: Cotangents, live: Tensor, parts: list[slice], r0: int, x: Tensor | None
) -> None:
    """The exact backward of some blocks' rows, tile by tile; rows that follow each other are not copied."""
    runs = [[parts[0].start, parts[0].stop]]
    for part in parts[1:]:
        if part.start == runs[-1][1]:
            runs[-1][1] = part.stop
        else:
            runs.append([part.start, part.stop])
    dense = len(live) == grads.tiles.n if x is None else len(live) == len(x)
    for c0, c1, w in tiles.columns():
        for start, stop in runs:
            for a in range(start, stop, tiles.rows):
                part = slice(a, min(a + tiles.rows, stop))
                rows = slice(r0 + part.start, r0 + part.stop) if dense else live[part] + r0
                if x is None:
                    raw = tiles.logits(rows.start, rows.stop, w) if isinstance(rows, slice) else tiles.gathered(rows, w)
                else:
                    raw = x[part, c0:c1]
                    if not dense:
                        raw = tiles.buffer(part.stop - part.start, c1 - c0, x.dtype).copy_(x[:, c0:c1].index_select(0, live[part]))
                mine = cot.take(part)
                grads.add(backward_tile(tiles, mine, raw, c0, tiles.inv_temp[rows]), w, c0, rows, first=False, unscale=cot.unscale)


def _through_some(
    tiles: Tiles,
    grads: Gradients,
    cot: Cotangents,
    rows: Tensor,
    columns: Tensor,
    place: Tensor,
    held: tuple[Tensor, Tensor] | None,
) -> None:
    """The backward of one block's rows through its ``columns``; ``place (V,)`` says where each is among them.

    ``held`` are the block's raw logits, if there are any, and where in it the rows are.
    """
    inv_temp = tiles.inv_temp.index_select(0, rows)
    factor = inv_temp * tiles.logit_scale
    total = cot.total if cot.total is not None and tiles.shard.leads else torch.zeros_like(inv_temp)  # the ranks' are added
    if not len(columns):
        grads.leave(rows, total * factor, cot.unscale)
        return
    w = tiles.operand(tiles.weight.index_select(0, columns))
    bias = None if tiles.bias is None else tiles.bias.index_select(0, columns)
    if held is None:
        raw = tiles.gathered(rows, w)
    else:
        x, here = held
        raw = new_scratch(x, (len(here), len(columns)))
        raw.copy_(x.index_select(1, columns) if len(here) == len(x) else x.index_select(1, columns).index_select(0, here))
    own = torch.where(cot.slots < 0, -1, place[cot.slots.clamp(0, tiles.vocab - 1)])
    target = torch.where(cot.target < 0, -1, place[cot.target.clamp(0, tiles.vocab - 1)])
    dz = (own, cot.slot_dz, cot.rows, target)
    if tiles.softcap:  # the rest is in dL/dz, of which the slope makes dL/draw
        z, slope = _tempered(raw, bias, inv_temp, tiles.logit_scale, tiles.softcap)
        torch.ops.rlad.dlogits_(z, z, 0, None, torch.ones_like(inv_temp), 1.0, 0.0, *dz, None, cot.entropy, cot.tail)
        rest = (total - z.sum(1)) * factor
        exact = torch.mul(z, slope, out=raw)
        g = exact if exact.dtype == tiles.grad_dtype else new_scratch(z, z.shape, tiles.grad_dtype).copy_(exact)
        if cot.lost is not None:
            at = target.clamp_min(0).long()
            cot.lost += torch.where(target < 0, 0, exact.gather(1, at) - g.gather(1, at))
    else:
        g = raw if raw.dtype == tiles.grad_dtype else new_scratch(raw, raw.shape, tiles.grad_dtype)
        head = (bias, inv_temp, tiles.logit_scale, 0.0)
        torch.ops.rlad.dlogits_(g, raw, 0, *head, *dz, cot.lost, cot.entropy, cot.tail)
        sent = g.sum(1, dtype=raw.dtype)
        rest = total * factor - (sent if cot.lost is None else sent + cot.lost.squeeze(1))
    grads.add_columns(g, w, columns, rows, rest, cot.unscale)


def add_means(grads: Gradients, means: Tensor) -> None:
    """d_hidden_t += (the dropped columns' gradient of t)·(the mean row of t's block)."""
    if grads.hidden is not None:
        size = block_of(means)
        whole = grads.tiles.shard.summed(grads.rest)
        for part, rest, mean in zip(grads.hidden.split(size), whole.split(size), means, strict=False):
            part.addr_(rest, mean)


def _tempered(raw: Tensor, bias: Tensor | None, inv_temp: Tensor, logit_scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """(z, dz/draw) of raw logits."""
    inv_temp = inv_temp.unsqueeze(1)
    z = (raw if bias is None else raw + bias) * logit_scale
    if not softcap:
        return z * inv_temp, logit_scale * inv_temp
    bend = torch.tanh(z / softcap)
    return bend * softcap * inv_temp, (1 - bend * bend) * (logit_scale * inv_temp)
