"""A row's slots, and its outputs from finished statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlad_kernels.backends.contract import on_cpu
from rlad_kernels.core.types import first_occurrence
from rlad_kernels.engine.rows import Kept, check_ids
from rlad_kernels.engine.statistics import Stats, add_slots, is_top1


class Outputs(NamedTuple):
    """What a row's finished statistics give, ``(n,)``; empty where not asked for."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    topk_logp: Tensor  # (n, K)
    tail_logp: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor
    lse_error: Tensor  # float32 lse − lse


def row_slots(
    name: str, kept: Kept, target: Tensor, topk_ids: Tensor | None, vocab_size: int, ids_name: str = "topk_ids"
) -> Tensor:
    """Slots ``(n, 1+K)`` int32 of the kept rows: the target, then the support."""
    target = kept.take(target)
    check_ids(name, "target", target, 0, vocab_size)
    if topk_ids is not None:
        topk_ids = kept.take(topk_ids)
        check_ids(name, ids_name, topk_ids, -1, vocab_size)
    return torch.ops.rlad.row_slots(target, topk_ids, vocab_size)


def row_slots_cpu(target: Tensor | None, ids: Tensor | None, vocab_size: int) -> Tensor:
    """Implements ``rlad::row_slots`` on CPU."""
    given = [] if target is None else [torch.where(target < 0, vocab_size, target).unsqueeze(1)]
    slots = torch.cat([*given, *([] if ids is None else [ids])], 1)
    return torch.where((slots < -1) | (slots > vocab_size), vocab_size, slots).to(torch.int32)


def outputs(
    stats: Tensor,
    z: Tensor,
    slots: Tensor,
    vocab_size: int,
    *,
    target: bool = True,
    entropy: bool = False,
    tail: bool = False,
    extras: bool = False,
) -> Outputs:
    """The outputs of finished statistics ``(6, n)``, slot logits and slots ``(n, J)``, of which the first may be the target."""
    return Outputs(*torch.ops.rlad.row_outputs(stats, z, slots, vocab_size, target, entropy, tail, extras))


def row_outputs_cpu(
    stats: Tensor, z: Tensor, slots: Tensor, vocab_size: int, target: bool, entropy: bool, tail: bool, extras: bool
) -> Outputs:
    """Implements ``rlad::row_outputs`` on CPU."""
    first = first_occurrence(slots)
    sums = Stats(*stats)
    done = add_slots(sums, z, first)

    def nothing() -> Tensor:
        return done.lse.new_empty(0)

    within, outside = first, done.log_rest
    if target:
        inside = (slots[:, 1:] == slots[:, :1]).any(1)
        within = first & torch.cat([inside.unsqueeze(1), torch.ones_like(first[:, 1:])], 1)
        outside = torch.logaddexp(outside, torch.where(inside, -torch.inf, z[:, 0] - done.max))
    support = torch.where(within, done.logp.exp(), 0).sum(1)
    bad = (slots >= vocab_size).any(1)  # only on CUDA: on CPU such an id has raised
    topk = done.logp[:, target:]
    made = Outputs(
        logp=done.logp[:, 0] if target else nothing(),
        lse=done.lse,
        entropy=done.entropy if entropy else nothing(),
        topk_logp=torch.where(slots[:, target:] < 0, -torch.inf, topk) if topk.shape[1] else nothing(),
        tail_logp=torch.where(support < 0.5, (-support).log1p(), outside - done.log_total) if tail else nothing(),
        mean_logits=sums.sumz / vocab_size if extras else nothing(),
        is_top1=is_top1(sums, z, slots) if extras else nothing().bool(),
        log_sum_sq_probs=done.sumsq.log() - 2 * done.log_total if extras else nothing(),
        lse_error=(done.lse - done.max) - done.log_total,
    )

    def marked(x: Tensor) -> Tensor:
        return torch.where(bad if x.dim() == 1 else bad[:, None], torch.nan, x) if x.numel() and x.is_floating_point() else x

    return Outputs(*map(marked, made))


on_cpu("row_outputs", row_outputs_cpu)
on_cpu("row_slots", row_slots_cpu)
