"""A row's slots, and its outputs from finished statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlad_kernels.core.types import first_occurrence
from rlad_kernels.engine.rows import Kept, checked_ids
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
    slots = checked_ids(name, "target", kept.take(target), 0, vocab_size).unsqueeze(1)
    if topk_ids is None:
        return slots
    return torch.cat([slots, checked_ids(name, ids_name, kept.take(topk_ids), -1, vocab_size)], 1)


def outputs(stats: Stats, z: Tensor, slots: Tensor, vocab_size: int, entropy: bool, tail: bool, extras: bool) -> Outputs:
    """The outputs of finished statistics."""
    first = first_occurrence(slots)
    done = add_slots(stats, z, first)
    nothing = done.lse.new_empty(0)
    target_inside = (slots[:, 1:] == slots[:, :1]).any(1)
    target_outside = torch.where(target_inside, -torch.inf, z[:, 0] - done.max)
    within = first & torch.cat([target_inside.unsqueeze(1), torch.ones_like(first[:, 1:])], 1)
    support = torch.where(within, done.logp.exp(), 0).sum(1)
    tail_logp = torch.logaddexp(done.log_rest, target_outside) - done.log_total
    bad = (slots >= vocab_size).any(1)  # only on CUDA: on CPU such an id has raised
    topk_logp = torch.where(slots[:, 1:] < 0, -torch.inf, done.logp[:, 1:]) if slots.shape[1] > 1 else nothing
    made = Outputs(
        logp=done.logp[:, 0],
        lse=done.lse,
        entropy=done.entropy if entropy else nothing,
        topk_logp=topk_logp,
        tail_logp=torch.where(support < 0.5, (-support).log1p(), tail_logp) if tail else nothing,
        mean_logits=stats.sumz / vocab_size if extras else nothing,
        is_top1=is_top1(stats, z, slots) if extras else nothing.bool(),
        log_sum_sq_probs=done.sumsq.log() - 2 * done.log_total if extras else nothing,
        lse_error=(done.lse - done.max) - done.log_total,
    )

    def marked(x: Tensor) -> Tensor:
        return torch.where(bad if x.dim() == 1 else bad[:, None], torch.nan, x) if x.numel() and x.is_floating_point() else x

    return Outputs(*map(marked, made))
