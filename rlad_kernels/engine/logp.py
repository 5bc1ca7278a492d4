"""``rlad::linear_logp``: forward statistics tile by tile, and the exact backward with recompute."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlad_kernels.backends.contract import HEAD
from rlad_kernels.engine import sparse
from rlad_kernels.engine.ahead import Made, from_slope, whole_rows
from rlad_kernels.engine.gradients import Cotangents, Gradients, backward_tile
from rlad_kernels.engine.held import held_logits, held_places
from rlad_kernels.engine.op import CALL, NEED, define, given, gradients, no_double_backward, result, wanted
from rlad_kernels.engine.outputs import outputs, row_slots
from rlad_kernels.engine.rows import Kept, checked_finite, kept_inv_temp, row_mask
from rlad_kernels.engine.shards import Shard, columns_here
from rlad_kernels.engine.tiles import Tiles


class Logp(NamedTuple):
    """Results of ``rlad::linear_logp``: :class:`Outputs` in the rows' places, then what its backward uses."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    topk_logp: Tensor
    tail_logp: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor
    lse_error: Tensor
    slope: Tensor  # (N, D) ∂logp/∂hidden
    dropped: Tensor  # (N,) dropped mass
    keep_columns: Tensor  # (blocks, V) bool
    mean: Tensor  # (blocks, D)
    logits: Tensor  # (held, V) raw, of the first of the rows that are computed


class Saved(NamedTuple):
    """What the forward saves for ``rlad::linear_logp_bwd``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    topk_ids: Tensor | None
    mask: Tensor | None
    inv_temp: Tensor
    logp: Tensor
    topk_logp: Tensor
    lse: Tensor
    lse_error: Tensor
    entropy: Tensor
    tail_logp: Tensor
    slope: Tensor
    keep_columns: Tensor
    mean: Tensor
    logits: Tensor


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    topk_ids: Tensor | None,
    mask: Tensor | None,
    inv_temp: Tensor,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    first: int,
    group: str,
    entropy: bool,
    tail: bool,
    extras: bool,
    filter_eps: float,
    ahead: bool,
    keep: int,
    caller: str,
) -> Logp:
    """Implements ``rlad::linear_logp``; ``caller`` is the public function that errors name.

    What the backward can use is made here, while logits are at hand: with ``ahead`` ∂logp/∂hidden, with ``filter_eps`` the choice
    of columns, and the logits themselves of as many rows as fit into ``keep`` bytes.
    """
    kept = Kept(row_mask(caller, target, mask))
    slots = row_slots(caller, kept, target, topk_ids, vocab_size)
    inv_temp = kept_inv_temp(caller, kept, inv_temp, target.shape[0])
    hidden = kept.take(hidden)
    head = (weight, bias, inv_temp, logit_scale, softcap, vocab_size, first, group)
    made = Made(*[inv_temp.new_empty(0)] * 4)
    shard = Shard(weight, vocab_size, first, group)
    logits = held_logits(hidden, target.shape[0], shard.columns, keep)
    own = shard.own(slots)
    if ahead or filter_eps > 0:
        stats, z, made = whole_rows(hidden, head, slots, target.shape[0], entropy, extras, filter_eps)
    else:
        tiles, held = Tiles(hidden, *head), min(len(logits), hidden.shape[0])
        stats, z = tiles.new_stats(slots.shape[1])
        for c0, c1, w in tiles.columns():
            for r0, r1 in tiles.row_ranges(held):
                x = tiles.logits(r0, r1, w, logits[r0:r1, c0:c1] if r1 <= held else None)
                tiles.fold(x, c0, r0, r1, own, stats, z, entropy=entropy, extras=extras)
        stats, z = shard.merged(stats, z)
    found = outputs(stats, z, slots, vocab_size, entropy=entropy, tail=tail, extras=extras)
    checked_finite(caller, found.lse)
    asked = (True, True, entropy, topk_ids is not None, tail, extras, extras, extras, True, ahead, filter_eps > 0)
    rows = (kept.put(x) if a else x.new_empty(0) for x, a in zip((*found, made.slope, made.dropped), asked, strict=True))
    return Logp._make([*rows, made.keep.bool(), made.mean, logits])


def linear_logp_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    topk_ids: Tensor | None,
    mask: Tensor | None,
    inv_temp: Tensor,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    first: int,
    group: str,
    logp: Tensor,
    topk_logp: Tensor,
    lse: Tensor,
    lse_error: Tensor,
    entropy: Tensor,
    tail_logp: Tensor,
    slope: Tensor,
    keep_columns: Tensor,
    mean: Tensor,
    logits: Tensor,
    g_logp: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    g_topk: Tensor | None,
    g_tail: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements ``rlad::linear_logp_bwd``: recompute each tile, turn it into dlogits, two products; vocabulary outermost.

    With ``slope`` = ∂logp/∂hidden there is nothing to recompute; with ``keep_columns`` each block of rows computes only those.
    """
    if slope.numel():
        head = (weight, bias, inv_temp, logit_scale, softcap, vocab_size)  # never of a group
        return from_slope(hidden, *head, target, mask, lse, slope, g_logp, g_lse), weight.new_empty(0), weight.new_empty(0)
    sent = [g != 0 for g in (g_logp, g_lse, g_entropy, g_tail) if g is not None]
    if g_topk is not None and topk_ids is not None:
        sent.append(((g_topk != 0) & (topk_ids >= 0)).any(1))
    live = reduce(torch.logical_or, sent) if sent else torch.zeros_like(lse, dtype=torch.bool)
    keep = row_mask("linear_logp", target, mask)
    counts = sparse.counts(keep_columns, Shard(weight, vocab_size, first, group)) if len(keep_columns) else sparse.Counts([], [])
    filtered = any(c < vocab_size for c in counts.all)  # where each block keeps all columns this is the exact backward
    kept = Kept(keep if filtered else live if keep is None else live & keep)  # the choice of columns counts the forward's rows

    def take(x: Tensor | None) -> Tensor | None:
        return None if x is None else kept.take(x)

    slots = torch.ops.rlad.row_slots(kept.take(target), take(topk_ids), vocab_size)
    inv_temp = kept.take(inv_temp.expand(target.shape[0]), 1)
    tiles = Tiles(kept.take(hidden), weight, bias, inv_temp, logit_scale, softcap, vocab_size, first, group, slab=need_weight)
    support = None if topk_ids is None else kept.take(topk_logp)
    found = (kept.take(logp), support, kept.take(lse), kept.take(lse_error))
    asked = (take(g_logp), take(g_lse), take(g_entropy), take(g_topk), take(g_tail))
    made = ((g_entropy, entropy), (g_tail, tail_logp))
    cot = Cotangents.of(slots, *found, *asked, *(None if g is None else kept.take(x) for g, x in made))
    cot.fit(tiles, slice(None))
    out = Gradients(tiles, weight, need_hidden, need_weight, need_bias, scattered=filtered)
    if filtered:
        alive = None if hidden.is_cuda else kept.take(live).nonzero().squeeze(1)  # how many, the host would have to ask
        cot, rows = (cot, slice(None)) if alive is None else (cot.take(alive), alive)
        sparse.backward(tiles, out, cot, alive, keep_columns, counts)
        sparse.add_means(out, mean)
        out.close(cot, rows, 0, tiles.vocab, last=False)
        out.close_rows(cot, rows)
    held, at = held_places(kept, keep, len(logits), tiles.n)
    for c0, c1, w in () if filtered else tiles.columns():
        for r0, r1 in tiles.row_ranges(held):
            if r1 > held:
                x = tiles.logits(r0, r1, w)
            elif at is None:
                x = logits[r0:r1, c0:c1]
            else:
                x = tiles.buffer(r1 - r0, c1 - c0, logits.dtype).copy_(logits[:, c0:c1].index_select(0, at[r0:r1]))
            part = cot.take(slice(r0, r1))
            g = backward_tile(tiles, part, x, c0, tiles.inv_temp[r0:r1], whole=r1 <= held and at is None)
            out.add(g, w, c0, slice(r0, r1), first=r0 == 0, unscale=cot.unscale)
        out.close(cot, slice(None), c0, c1, last=True)
    if not filtered:
        out.close_rows(cot, slice(None))
    d_hidden, d_weight, d_bias = out.finish()
    return kept.put(d_hidden) if need_hidden else d_hidden, d_weight, d_bias


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    topk_ids: Tensor | None,
    mask: Tensor | None,
    inv_temp: Tensor,
    scale: float,
    softcap: float,
    vocab_size: int,
    first: int,
    group: str,
    entropy: bool,
    tail: bool,
    extras: bool,
    filter_eps: float,
    ahead: bool,
    keep: int,
    caller: str,
) -> Logp:
    rows, filtered = target.shape, filter_eps > 0
    blocks = sparse.blocks_of(hidden, rows[0])
    return Logp(
        logp=result(hidden, rows),
        lse=result(hidden, rows),
        entropy=result(hidden, rows, entropy),
        topk_logp=result(hidden, topk_ids.shape if topk_ids is not None else (0,)),
        tail_logp=result(hidden, rows, tail),
        mean_logits=result(hidden, rows, extras),
        is_top1=result(hidden, rows, extras, torch.bool),
        log_sum_sq_probs=result(hidden, rows, extras),
        lse_error=result(hidden, rows),
        slope=result(hidden, hidden.shape, ahead),
        dropped=result(hidden, rows, filtered),
        keep_columns=result(hidden, (blocks, columns_here(weight, vocab_size, first)), filtered, torch.bool),
        mean=result(hidden, (blocks, hidden.shape[1]), filtered),
        logits=held_logits(hidden, rows[0], columns_here(weight, vocab_size, first), keep),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, softcap, vocab_size, first, group, ctx.entropy, ctx.tail, _, _, _, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.head, o = (scale, softcap, vocab_size, first, group), Logp(*output)
    made = (o.logp, o.topk_logp, o.lse, o.lse_error, o.entropy, o.tail_logp, o.slope, o.keep_columns, o.mean, o.logits)
    ctx.save_for_backward(*Saved._make([*tensors, *made]))


def _backward(ctx: Any, g_logp: Tensor, g_lse: Tensor, g_entropy: Tensor, g_topk: Tensor, g_tail: Tensor, *_: Tensor) -> Any:
    saved = Saved(*ctx.saved_tensors)
    need = wanted(ctx, saved.bias)
    asked = (g_entropy if ctx.entropy else None, None if saved.topk_ids is None else g_topk, g_tail if ctx.tail else None)
    grads = logp_bwd_op(*saved[:7], *ctx.head, *saved[7:], g_logp, g_lse, *asked, *need)
    return *given(grads, need), *[None] * 16


_ARGS = f"({HEAD}, Tensor target, Tensor? topk_ids, Tensor? mask, {CALL}, "
logp_op = define(
    "linear_logp",
    f"{_ARGS}bool entropy, bool tail, bool extras, float filter_eps, bool ahead, int keep, str caller) -> "
    f"({', '.join(['Tensor'] * len(Logp._fields))})",
    linear_logp,
)
logp_bwd_op = define(
    "linear_logp_bwd",
    f"{_ARGS}Tensor logp, Tensor topk_logp, Tensor lse, Tensor lse_error, Tensor entropy, Tensor tail_logp, Tensor slope, "
    "Tensor keep_columns, Tensor mean, Tensor logits, Tensor? g_logp, Tensor? g_lse, Tensor? g_entropy, Tensor? g_topk, "
    f"Tensor? g_tail, {NEED}) -> (Tensor, Tensor, Tensor)",
    linear_logp_bwd,
)
torch.library.register_fake("rlad::linear_logp", _fake)
torch.library.register_fake("rlad::linear_logp_bwd", lambda hidden, weight, bias, *args: gradients(hidden, weight, bias, args[-3:]))
torch.library.register_autograd("rlad::linear_logp", _backward, setup_context=_setup)
no_double_backward("linear_logp_bwd")
