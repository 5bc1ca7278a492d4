"""Sums over the tokens of a sequence, packed: runs of equal ids. The same bits every time: no atomics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.modes import transformed


def suffix_sums(x: Tensor, sequence: Tensor, gamma: float = 1.0) -> Tensor:
    """Σ_{t' ≥ t} γ^{t'−t}·x_{t'} over the tokens of t's sequence; all ``(N,)``, in log₂ N steps."""
    shift = 1
    while shift < x.shape[0]:
        ahead = torch.where(sequence[shift:] == sequence[:-shift], x[shift:], 0)
        x = torch.cat([x[:-shift] + gamma**shift * ahead, x[-shift:]])
        shift *= 2
    return x


def totals(x: Tensor, sequence: Tensor) -> Tensor:
    """Each sequence's sum, at each of its tokens; all ``(N,)``."""
    place = torch.arange(x.shape[0], device=x.device)
    starts = torch.ones_like(place, dtype=torch.bool)
    starts[1:] = sequence[1:] != sequence[:-1]
    first = torch.where(starts, place, 0).cummax(0).values if x.shape[0] else place
    return suffix_sums(x, sequence)[first]


def sequence_mean(x: Tensor, keep: Tensor, sequence: Tensor) -> Tensor:
    """Mean over the kept tokens of each sequence, at each of its tokens; 0 without one; all ``(N,)``."""
    counts = totals(keep.to(x.dtype), sequence).clamp_min(1)
    if transformed(x):
        return totals(torch.where(keep, x, 0), sequence) / counts
    return _SequenceMean.apply(x, keep, sequence, counts)  # type: ignore[return-value]


class _SequenceMean(torch.autograd.Function):
    """Its gradient is such a mean too, where autograd's own would need atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, sequence: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(keep, sequence, counts)
        return totals(torch.where(keep, x, 0), sequence) / counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        keep, sequence, counts = ctx.saved_tensors
        return torch.where(keep, totals(grad, sequence) / counts, 0), None, None, None
