"""From the running statistics of a sweep to log-probs, entropy and masses.

A sweep keeps, per row, the maximum m of and sums over the *rest*: the columns outside the row's slots (target and support).
Slots are added back here one by one, so that neither log p near 0 nor the tail mass suffers from cancellation. As m is the
rest's own maximum, a rest that the slots outweigh by e^100 does not underflow either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Stats(NamedTuple):
    """Rows of the ``(6, N)`` statistics tensor that the fold kernels update, over columns seen so far."""

    max: Tensor  # m = max z outside the slots, −inf without a column there
    rest: Tensor  # Σ e^{z−m} outside the slots
    restz: Tensor  # Σ e^{z−m}(z−m) outside the slots
    restsq: Tensor  # Σ e^{2(z−m)} outside the slots
    sumz: Tensor  # Σ z, slot columns included
    first: Tensor  # the lowest column outside the slots whose z is m (exact up to 2^24 columns)


class Slots(NamedTuple):
    """What the slots of each row add to the sums."""

    logp: Tensor  # (N, J) log-prob of every slot
    lse: Tensor  # (N,)
    entropy: Tensor  # (N,)
    max: Tensor  # (N,) max z over slots and rest
    log_total: Tensor  # (N,) lse − max
    log_rest: Tensor  # (N,) log of the rest's Σ e^{z−max}
    sumsq: Tensor  # (N,) Σ e^{2(z−max)} over slots and rest


def merge_tiles(tiles: Tensor) -> Tensor:
    """Statistics ``(6, N)`` of whole rows from those of T tiles of the vocabulary ``(6, T, N)``, added in a fixed order."""
    m, rest, restz, restsq, sumz, first = tiles
    top = m.amax(0)
    # e^{-1e4} is 0: an empty tile must give 0·0, not 0·inf
    gap = (m - torch.where(top == -torch.inf, 0, top)).clamp_min(-1e4)
    e = gap.exp()
    first = torch.where(m == top, first, torch.inf).amin(0)
    return torch.stack([top, (rest * e).sum(0), (e * (restz + gap * rest)).sum(0), (restsq * e * e).sum(0), sumz.sum(0), first])


def is_top1(stats: Stats, z: Tensor, slots: Tensor) -> Tensor:
    """Whether the first slot is the largest of all columns, and among equal ones the lowest, as argmax chooses."""
    y, at = z[:, 0], slots[:, 0]
    rest = (stats.max > y) | ((stats.max == y) & (stats.first < at))
    others = (slots >= 0) & ((z > y[:, None]) | ((z == y[:, None]) & (slots < at[:, None])))
    return ~(y.isnan() | rest | others.any(1))


def add_slots(stats: Stats, z: Tensor, first: Tensor) -> Slots:
    """Close the sums with the slot logits ``z (N, J)``; ``first`` marks the slots that count.

    log p of the largest slot is −log1p(others/e) where p > ½: relative accuracy as p → 1.
    """
    peak = torch.maximum(stats.max, z.amax(1)) if z.shape[1] else stats.max
    gap = stats.max - peak
    log_rest, gap = stats.rest.log() + gap, gap.clamp_min(-1e4)  # an empty rest must give 0·0, not 0·inf
    down = gap.exp()
    rest, restz = stats.rest * down, down * (stats.restz + gap * stats.rest)
    shifted = z - peak.unsqueeze(1)
    e = torch.where(first, shifted.exp(), 0)
    total = rest + e.sum(1)
    log_total = total.log()
    logp = shifted - log_total.unsqueeze(1)
    if e.shape[1]:
        top = e.argmax(1, keepdim=True)
        others = rest.unsqueeze(1) + e.scatter(1, top, 0).sum(1, keepdim=True)
        largest = e.gather(1, top)
        exact, sure = -(others / largest).log1p(), largest > others
        logp = torch.where((z == z.gather(1, top)) & sure, exact, logp)
        log_total = torch.where(sure.squeeze(1), -exact.squeeze(1), log_total)  # its slot is the row's maximum: e^{z−max} = 1
    weighted = torch.where(e > 0, e * shifted, 0).sum(1)
    entropy = (log_total - (restz + weighted) / total).clamp_min(0)
    sumsq = stats.restsq * down * down + e.square().sum(1)
    return Slots(logp, peak + log_total, entropy, peak, log_total, log_rest, sumsq)


def merge_slots(ids: Tensor, grad: Tensor, logp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give each id of a row one slot: its gradients summed, −1 elsewhere; without atomics, in a fixed order.

    Args:
        ids: ``(N, J)`` int32, −1 empty: the target, then the support.
        grad, logp: ``(N, J)``.

    Returns:
        ids in ascending order, their gradient sums and log-probs (0 and −∞ where empty), and which are in the support.
    """
    ids, order = ids.sort(dim=1, stable=True)
    grad, inside = grad.gather(1, order), order > 0
    step = 1
    while step < ids.shape[1]:  # segmented prefix sum: log2(J) rounds
        same = ids[:, step:] == ids[:, :-step]
        grad = torch.cat([grad[:, :step], grad[:, step:] + torch.where(same, grad[:, :-step], 0)], 1)
        inside = torch.cat([inside[:, :step], inside[:, step:] | (same & inside[:, :-step])], 1)
        step *= 2
    last = ids >= 0
    last[:, :-1] &= ids[:, 1:] != ids[:, :-1]
    ids, grad = torch.where(last, ids, -1).contiguous(), torch.where(last, grad, 0)
    return ids, grad, torch.where(last, logp.gather(1, order), -torch.inf), inside
