"""``rlad::linear_topk``: the K largest logits of every row while the vocabulary goes by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlad_kernels.backends.contract import HEAD
from rlad_kernels.engine.op import CALL, define, result
from rlad_kernels.engine.outputs import outputs, row_slots
from rlad_kernels.engine.rows import Kept, checked_finite, kept_inv_temp, row_mask
from rlad_kernels.engine.shards import Shard
from rlad_kernels.engine.tiles import Tiles


class Top(NamedTuple):
    """Results of ``rlad::linear_topk``; empty where not asked for."""

    ids: Tensor  # (N, K)
    logp: Tensor  # (N, K)
    lse: Tensor
    tail_logp: Tensor
    target_logp: Tensor
    entropy: Tensor


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    inv_temp: Tensor,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    first: int,
    group: str,
    k: int,
    entropy: bool,
) -> Top:
    """Implements ``rlad::linear_topk``."""
    kept = Kept(row_mask("linear_topk", target, mask))
    x = kept.take(hidden)
    if target is None:
        slots = torch.empty(x.shape[0], 0, dtype=torch.int32, device=x.device)
    else:
        slots = row_slots("linear_topk", kept, target, None, vocab_size)
    inv_temp = kept_inv_temp("linear_topk", kept, inv_temp, hidden.shape[0])
    tiles = Tiles(x, weight, bias, inv_temp, logit_scale, softcap, vocab_size, first, group)
    own = tiles.shard.own(slots)
    stats, z = tiles.new_stats(slots.shape[1])
    top = tiles.inv_temp.new_full((tiles.n, k), -torch.inf)
    ids = torch.full((tiles.n, k), -1, dtype=torch.int32, device=x.device)
    for c0, c1, w in tiles.columns():
        for r0, r1 in tiles.row_ranges():
            torch.ops.rlad.fold_topk_(
                tiles.logits(r0, r1, w),
                c0,
                tiles.bias_tile(c0, c1),
                tiles.inv_temp[r0:r1],
                logit_scale,
                softcap,
                own[r0:r1],
                stats[:, r0:r1],
                z[r0:r1],
                top[r0:r1],
                ids[r0:r1],
                entropy,
            )
    if group:
        stats, z, top, ids = _candidates(tiles.shard, stats, z, top, ids)
    ids, by_id = ids.sort(dim=1)
    top, by_value = top.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, by_value)
    if group:
        stats, top, ids = _rest(stats, top[:, k:]), top[:, :k], ids[:, :k]
    done = outputs(stats, top, ids, vocab_size, target=False, entropy=entropy, tail=True)
    checked_finite("linear_topk", done.lse)
    target_logp = done.lse.new_empty(0)
    if target is not None:
        inside = ids == slots
        outside = (z[:, 0] - done.lse) + done.lse_error
        target_logp = torch.where(inside.any(1), torch.where(inside, done.topk_logp, 0).sum(1), outside)
        target_logp = torch.where(slots[:, 0] >= vocab_size, torch.nan, target_logp)
    found = Top(ids, done.topk_logp, done.lse, done.tail_logp, target_logp, done.entropy)
    asked = (True, True, True, True, target is not None, entropy)
    return Top(*(kept.put(x) if a else x.new_empty(0) for x, a in zip(found, asked, strict=True)))


def _candidates(shard: Shard, stats: Tensor, z: Tensor, top: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics, slot logits and the K·ranks candidates of all ranks, ids of the whole vocabulary."""
    stats, z = shard.merged(stats, z)
    ids = torch.where(ids < 0, ids, ids + shard.first)
    top, ids = (shard.gathered(x).transpose(0, 1).flatten(1) for x in (top, ids))
    return stats, z, top, ids


def _rest(stats: Tensor, out: Tensor) -> Tensor:
    """Statistics with the candidates ``out (n, …)``, tempered logits, put back among the columns that are not in the top K."""
    m, rest, restz, *others = stats
    top = torch.maximum(m, out.amax(1)) if out.shape[1] else m
    ref = torch.where(top == -torch.inf, 0, top)
    gap, down = (out - ref.unsqueeze(1)).clamp_min(-1e4), (m - ref).clamp_min(-1e4)
    e = gap.exp()
    return torch.stack([top, rest * down.exp() + e.sum(1), down.exp() * (restz + down * rest) + (e * gap).sum(1), *others])


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    inv_temp: Tensor,
    scale: float,
    softcap: float,
    vocab_size: int,
    first: int,
    group: str,
    k: int,
    entropy: bool,
) -> Top:
    n = hidden.shape[0]
    return Top(
        ids=result(hidden, (n, k), dtype=torch.int32),
        logp=result(hidden, (n, k)),
        lse=result(hidden, (n,)),
        tail_logp=result(hidden, (n,)),
        target_logp=result(hidden, (n,), target is not None),
        entropy=result(hidden, (n,), entropy),
    )


topk_op = define(
    "linear_topk",
    f"({HEAD}, Tensor? target, Tensor? mask, {CALL}, int k, bool entropy) -> ({', '.join(['Tensor'] * 6)})",
    linear_topk,
)
torch.library.register_fake("rlad::linear_topk", _fake)
