"""The sweep ops, run as loops over tiles: forward statistics, exact backward with recompute, top-K, gather."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlad_kernels import sparse
from rlad_kernels.backward import Cotangents, Gradients, backward_tile
from rlad_kernels.moments import Stats, add_slots, first_occurrence, is_top1
from rlad_kernels.ops import acc_dtype
from rlad_kernels.rows import Kept, checked_finite, checked_ids, checked_inv_temp, kept_inv_temp, row_mask
from rlad_kernels.scoring import fused, statistics
from rlad_kernels.tiles import Tiles, empty


def row_slots(name: str, kept: Kept, target: Tensor, topk_ids: Tensor | None, vocab_size: int) -> Tensor:
    """Slots ``(n, 1+K)`` int32 of the kept rows: the target, then the support."""
    slots = checked_ids(name, "target", kept.take(target), 0, vocab_size).unsqueeze(1)
    if topk_ids is None:
        return slots
    return torch.cat([slots, checked_ids(name, "topk_ids", kept.take(topk_ids), -1, vocab_size)], 1)


def outputs(stats: Stats, z: Tensor, slots: Tensor, vocab_size: int, entropy: bool, tail: bool, extras: bool) -> tuple[Tensor, ...]:
    """logp, lse, entropy, topk_logp, tail_logp, mean_logits, is_top1, log_sum_sq_probs, lse_error of finished statistics."""
    first = first_occurrence(slots)
    done = add_slots(stats, z, first)
    nothing = done.lse.new_empty(0)
    target_inside = (slots[:, 1:] == slots[:, :1]).any(1)
    target_outside = torch.where(target_inside, -torch.inf, z[:, 0] - done.max)
    within = first & torch.cat([target_inside.unsqueeze(1), torch.ones_like(first[:, 1:])], 1)
    support = torch.where(within, done.logp.exp(), 0).sum(1)
    tail_logp = torch.logaddexp(done.log_rest, target_outside) - done.log_total
    bad = (slots >= vocab_size).any(1)  # only on CUDA: on CPU such an id has raised
    results = [
        done.logp[:, 0],
        done.lse,
        done.entropy if entropy else nothing,
        torch.where(slots[:, 1:] < 0, -torch.inf, done.logp[:, 1:]) if slots.shape[1] > 1 else nothing,
        torch.where(support < 0.5, (-support).log1p(), tail_logp) if tail else nothing,
        stats.sumz / vocab_size if extras else nothing,
        done.sumsq.log() - 2 * done.log_total if extras else nothing,
        (done.lse - done.max) - done.log_total,
    ]
    results = [torch.where(bad if x.dim() == 1 else bad[:, None], torch.nan, x) if x.numel() else x for x in results]
    results.insert(6, is_top1(stats, z, slots) if extras else torch.empty(0, dtype=torch.bool, device=z.device))
    return tuple(results)


def linear_logp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, topk_ids: Tensor | None, mask: Tensor | None,
    inv_temp: Tensor, logit_scale: float, softcap: float, vocab_size: int, entropy: bool, tail: bool, extras: bool,
    filter_eps: float, ahead: bool, caller: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Implements ``rlad::linear_logp``; ``caller`` is the public function that errors name.

    What the backward can use is made here, while whole rows of logits are at hand: with ``ahead`` ∂logp/∂hidden, with
    ``filter_eps`` the choice of columns.
    """
    kept = Kept(row_mask(caller, target, mask))
    slots = row_slots(caller, kept, target, topk_ids, vocab_size)
    inv_temp = kept_inv_temp(caller, kept, inv_temp, target.shape[0])
    hidden = kept.take(hidden)
    head = (weight, bias, inv_temp, logit_scale, softcap, vocab_size)
    made = _Made(*[inv_temp.new_empty(0)] * 4)
    if ahead or filter_eps > 0:
        stats, z, made = _whole_rows(hidden, head, slots, target.shape[0], entropy, extras, filter_eps)
    elif fused(hidden, weight):
        cut = (weight[:vocab_size], None if bias is None else bias[:vocab_size])
        stats, z = statistics(hidden, *cut, inv_temp, logit_scale, softcap, slots, entropy, extras)
    else:
        tiles = Tiles(hidden, *head)
        stats, z = tiles.new_stats(slots.shape[1])
        for c0, _, w in tiles.columns():
            for r0, r1 in tiles.row_ranges():
                tiles.fold(tiles.logits(r0, r1, w), c0, r0, r1, slots, stats, z, entropy=entropy, extras=extras)
    results = (*outputs(Stats(*stats), z, slots, vocab_size, entropy, tail, extras), made.slope, made.dropped)
    checked_finite(caller, results[1])
    wanted = (True, True, entropy, topk_ids is not None, tail, extras, extras, extras, True, ahead, filter_eps > 0)
    rows = tuple(kept.put(x) if w else x.new_empty(0) for x, w in zip(results, wanted, strict=True))
    return *rows, made.keep.bool(), made.mean


class _Made(NamedTuple):
    """What a forward leaves for its backward besides statistics; empty where not asked for."""

    slope: Tensor  # (n, D) ∂logp/∂hidden
    dropped: Tensor  # (n,)
    keep: Tensor  # (blocks, V)
    mean: Tensor  # (blocks, D)


def _whole_rows(
    hidden: Tensor, head: tuple[Any, ...], slots: Tensor, rows: int, entropy: bool, extras: bool, filter_eps: float
) -> tuple[Tensor, Tensor, _Made]:
    """Chunks of rows with all their logits: statistics, and with ``filter_eps`` the choice of columns, without ∂logp/∂hidden.

    ``rows`` counts masked ones too: the number of blocks must not depend on the mask's values.
    """
    filtered = filter_eps > 0
    tiles = Tiles(hidden, *head, keep_logits=1, multiple=sparse.BLOCK if filtered else 1)
    stats, z = tiles.new_stats(slots.shape[1])
    blocks, new = sparse.blocks_of(rows), stats.new_zeros
    if filtered:
        keep = torch.zeros(blocks, tiles.vocab, dtype=torch.bool, device=hidden.device)
        means = sparse.Means(tiles, blocks)
        made = _Made(new(0), new(tiles.n), keep, means.rows)
    else:
        means = None
        made = _Made(new(tiles.n, hidden.shape[1]), new(0), new(0), new(0))
    logits = empty(stats, tiles.rows * tiles.vocab)
    for r0, r1 in tiles.row_ranges():
        at = slice(r0, r1)
        x = logits[: (r1 - r0) * tiles.vocab].view(r1 - r0, tiles.vocab)
        tiles.fold_rows(x, r0, r1, slots, stats, z, entropy=entropy, extras=extras)
        done = outputs(Stats(*stats[:, at]), z[at], slots[at], tiles.vocab, False, False, False)
        if means is not None:
            b = slice(r0 // sparse.BLOCK, sparse.blocks_of(r1))
            made.keep[b], made.dropped[at], _ = sparse.choose(tiles, means, x, r0, done[1], slots[at], filter_eps)
            continue
        one = torch.ones_like(done[1])
        cot = Cotangents.of(slots[at], done[0], None, done[1], done[-1], one, 0 * one, None, None, None, None, None)
        cot.fit(tiles, at)
        for c0, c1, w in tiles.columns():
            tiles.add_product(made.slope[at], backward_tile(tiles, cot, x[:, c0:c1], c0, tiles.inv_temp[at]), w, cot.unscale)
        if cot.lost is not None:
            made.slope[at] += torch.ops.rlad.gather_dhidden(cot.lost, tiles.weight, cot.target)
    if means is not None:
        means.finish()
    return stats, z, made


def linear_logp_bwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, topk_ids: Tensor | None, mask: Tensor | None,
    inv_temp: Tensor, logit_scale: float, softcap: float, vocab_size: int, logp: Tensor, topk_logp: Tensor, lse: Tensor,
    lse_error: Tensor, entropy: Tensor, tail_logp: Tensor, slope: Tensor, keep_columns: Tensor, mean: Tensor,
    g_logp: Tensor, g_lse: Tensor, g_entropy: Tensor | None, g_topk: Tensor | None, g_tail: Tensor | None,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements ``rlad::linear_logp_bwd``: recompute each tile, turn it into dlogits, two products; vocabulary outermost.

    With ``slope`` = ∂logp/∂hidden there is nothing to recompute; with ``keep_columns`` each block of rows computes only those.
    """
    if slope.numel():
        head = (weight, bias, inv_temp, logit_scale, softcap, vocab_size)
        return _from_slope(hidden, *head, target, mask, lse, slope, g_logp, g_lse), weight.new_empty(0), weight.new_empty(0)
    live = (g_logp != 0) | (g_lse != 0)
    for g in (g_entropy, g_tail):
        live = live if g is None else live | (g != 0)
    if g_topk is not None and topk_ids is not None:
        live |= ((g_topk != 0) & (topk_ids >= 0)).any(1)
    keep = row_mask("linear_logp", target, mask)
    filtered = keep_columns.numel() > 0
    kept = Kept(keep if filtered else live if keep is None else live & keep)  # the choice of columns counts the forward's rows

    slots = row_slots("linear_logp", kept, target, topk_ids, vocab_size)
    inv_temp = kept.take(inv_temp.expand(target.shape[0]), 1)
    tiles = Tiles(kept.take(hidden), weight, bias, inv_temp, logit_scale, softcap, vocab_size)
    b, c, t = (None if g is None else kept.take(g) for g in (g_entropy, g_topk, g_tail))
    made = (topk_ids, topk_logp), (g_entropy, entropy), (g_tail, tail_logp)
    support, h, tau = (None if given is None else kept.take(x) for given, x in made)
    cot = Cotangents.of(
        slots, kept.take(logp), support, kept.take(lse), kept.take(lse_error), kept.take(g_logp), kept.take(g_lse), b, c, t, h, tau
    )
    cot.fit(tiles, slice(None))
    out = Gradients(tiles, weight, need_hidden, need_weight, need_bias, scattered=filtered)
    if filtered:
        alive = kept.take(live).nonzero().squeeze(1)
        cot = cot.take(alive)
        sparse.backward(tiles, out, cot, alive, keep_columns)
        sparse.add_means(out, mean)
        out.close(cot, alive, 0, tiles.vocab, last=False)
        out.close_rows(cot, alive)
    for c0, c1, w in () if filtered else tiles.columns():
        for r0, r1 in tiles.row_ranges():
            g = backward_tile(tiles, cot.take(slice(r0, r1)), tiles.logits(r0, r1, w), c0, tiles.inv_temp[r0:r1])
            out.add(g, w, c0, slice(r0, r1), first=r0 == 0, unscale=cot.unscale)
        out.close(cot, slice(None), c0, c1, last=True)
    if not filtered:
        out.close_rows(cot, slice(None))
    d_hidden, d_weight, d_bias = out.finish()
    return kept.put(d_hidden) if need_hidden else d_hidden, d_weight, d_bias


def _from_slope(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, inv_temp: Tensor, logit_scale: float, softcap: float, vocab_size: int,
    target: Tensor, mask: Tensor | None, lse: Tensor, slope: Tensor, g_logp: Tensor, g_lse: Tensor,
) -> Tensor:  # fmt: skip
    """d_hidden = a·∂logp/∂h + l·∂lse/∂h, where ∂lse/∂h = ∂z_y/∂h − ∂logp/∂h."""
    keep = row_mask("linear_logp", target, mask)
    ids = target if keep is None else torch.where(keep, target, -1)
    ids = torch.where((ids < 0) | (ids >= vocab_size), -1, ids).to(torch.int32).unsqueeze(1)
    factor = inv_temp.expand_as(lse) * logit_scale
    if softcap:
        raw = torch.ops.rlad.gather_dot(hidden, weight[:vocab_size], ids).squeeze(1)
        raw = raw if bias is None else raw + bias.to(raw.dtype)[ids.squeeze(1).clamp_min(0).long()]
        factor = factor * (1 - torch.tanh(raw * logit_scale / softcap).square())
    at_target = torch.ops.rlad.gather_dhidden((g_lse * factor).unsqueeze(1).contiguous(), weight[:vocab_size], ids)
    d_hidden = at_target + (g_logp - g_lse).unsqueeze(1) * slope
    return (d_hidden if keep is None else torch.where(keep.unsqueeze(1), d_hidden, 0)).to(hidden.dtype)


def linear_topk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None, mask: Tensor | None, inv_temp: Tensor,
    logit_scale: float, softcap: float, vocab_size: int, k: int, entropy: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Implements ``rlad::linear_topk``."""
    kept = Kept(row_mask("linear_topk", target, mask))
    x = kept.take(hidden)
    if target is None:
        slots = torch.empty(x.shape[0], 0, dtype=torch.int32, device=x.device)
    else:
        slots = row_slots("linear_topk", kept, target, None, vocab_size)
    inv_temp = kept_inv_temp("linear_topk", kept, inv_temp, hidden.shape[0])
    tiles = Tiles(x, weight, bias, inv_temp, logit_scale, softcap, vocab_size)
    stats, z = tiles.new_stats(slots.shape[1])
    top = tiles.inv_temp.new_full((tiles.n, k), -torch.inf)
    ids = torch.full((tiles.n, k), -1, dtype=torch.int32, device=x.device)
    for c0, c1, w in tiles.columns():
        for r0, r1 in tiles.row_ranges():
            torch.ops.rlad.fold_topk_(
                tiles.logits(r0, r1, w), c0, tiles.bias_tile(c0, c1), tiles.inv_temp[r0:r1], logit_scale, softcap, slots[r0:r1],
                stats[:, r0:r1], z[r0:r1], top[r0:r1], ids[r0:r1], entropy,
            )  # fmt: skip
    ids, by_id = ids.sort(dim=1)
    top, by_value = top.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, by_value)
    done = add_slots(Stats(*stats), top, ids >= 0)
    checked_finite("linear_topk", done.lse)
    target_logp = done.lse.new_empty(0)
    if target is not None:
        inside = ids == slots
        outside = z[:, 0] - done.max - done.log_total
        target_logp = torch.where(inside.any(1), torch.where(inside, done.logp, 0).sum(1), outside)
        target_logp = torch.where(slots[:, 0] >= vocab_size, torch.nan, target_logp)
    results = (ids, done.logp, done.lse, done.log_rest - done.log_total, target_logp, done.entropy)
    wanted = (True, True, True, True, target is not None, entropy)
    return tuple(kept.put(x) if w else x.new_empty(0) for x, w in zip(results, wanted, strict=True))


def _gather_ids(caller: str, ids: Tensor, mask: Tensor | None, vocab_size: int) -> Tensor:
    keep = row_mask(caller, None, mask)
    ids = ids if keep is None else torch.where(keep.unsqueeze(1), ids, -1)
    return checked_ids(caller, "ids", ids, -1, vocab_size)


def linear_gather(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, mask: Tensor | None, inv_temp: Tensor, vocab_size: int,
    caller: str,
) -> Tensor:  # fmt: skip
    """Implements ``rlad::linear_gather``: raw logits h·W_v + b_v at ``ids (N, K)``; empty slots and masked rows give 0.

    What comes after, the temperature above all, is left to autograd; here its values can be checked under ``torch.compile`` too.
    """
    ids = _gather_ids(caller, ids, mask, vocab_size)
    checked_inv_temp(caller, inv_temp.expand(hidden.shape[0]), row_mask(caller, None, mask))
    raw = torch.ops.rlad.gather_dot(hidden, weight[:vocab_size], ids)
    inside = (ids >= 0) & (ids < vocab_size)
    if bias is not None:
        raw = torch.where(inside, raw + bias.to(raw.dtype)[torch.where(inside, ids, 0)], raw)
    return torch.where(ids >= vocab_size, torch.nan, raw)


def linear_gather_bwd(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, mask: Tensor | None, vocab_size: int,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements ``rlad::linear_gather_bwd``; d_weight touches only the rows in ``ids``."""
    ids = _gather_ids("linear_gather", ids, mask, vocab_size)
    grad = grad.to(acc_dtype(hidden.dtype)).contiguous()
    d_hidden, d_weight, d_bias = hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_hidden:
        d_hidden = torch.ops.rlad.gather_dhidden(grad, weight[:vocab_size], ids)
    if need_weight or need_bias:
        sorted_ids, order = ids.flatten().sort(stable=True)
    if need_weight:
        d_weight = torch.zeros_like(weight)
        torch.ops.rlad.gather_dweight_(d_weight[:vocab_size], grad, hidden, order, sorted_ids, False)
    if need_bias and bias is not None:
        d_bias = torch.zeros_like(bias)
        ones = hidden.new_ones(hidden.shape[0], 1)
        torch.ops.rlad.gather_dweight_(d_bias[:vocab_size].unsqueeze(1), grad, ones, order, sorted_ids, False)
    return d_hidden, d_weight, d_bias
