"""Spans and sequences: ids that reduce a loss per span, and one number a sequence for rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from rlad_kernels.core.check import check_tensor, integers
from rlad_kernels.core.reduction import keep_mask, sequence_index, starts

HOW = ("mean", "min", "max", "sum")


def span_ids(spans: Tensor, mask: Tensor | None = None, *, seq_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(seq_ids, mask)`` with which any loss reduces per span: each run of equal ``spans`` ≥ 0 counts as a sequence.

    ``Reduction("seq-mean-token-mean", seq_ids=seq_ids)`` is then the mean over spans of each span's mean, ``"seq-mean-token-sum"``
    of its sum.

    Args:
        spans: ints ``(B, T)`` or packed ``(N,)``, in any order; −1 is a token of no span, which leaves the loss.
        mask: bool or 0/1 in the same shape; None is all. A masked token does not cut its span in two, a −1 does.
        seq_ids: ``(N,)`` non-decreasing; no span of a packed call goes beyond its sequence.

    Returns:
        Numbers 0, 1, … of the spans, int64 and non-decreasing, and the bool mask, both in the shape of ``spans``.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> ids, mask = rk.spans.span_ids(torch.tensor([0, 0, -1, 3]))
        >>> rk.losses.CrossEntropy()(-torch.ones(4), mask=mask, reduction=rk.Reduction("seq-mean-token-sum", seq_ids=ids)).loss
        tensor(1.5000)
    """
    name = "span_ids"
    spans = integers(name, "spans", spans)
    if spans.dim() < 1:
        raise ValueError(f"{name}: spans must be integers (B, T) or (N,), got {spans.dtype} {tuple(spans.shape)}")
    keep = keep_mask(name, mask, spans) & (spans >= 0)
    first = starts(spans)
    if seq_ids is not None:
        first |= starts(sequence_index(name, spans, "spans", seq_ids).view(spans.shape))
    number = (first & (spans >= 0)).flatten().cumsum(0) - 1
    return number.clamp_min(0).view(spans.shape), keep


def sequence_stat(x: Tensor, mask: Tensor | None = None, *, how: str = "mean", seq_ids: Tensor | None = None) -> Tensor:
    """Mean, minimum, maximum or sum of ``x`` over the kept tokens of each sequence; 0 for a sequence without one.

    The terms of rewards made of log-probs or per-token KLs (reinforcement-learned teachers, arXiv 2506.08388). Differentiable:
    the gradient of a minimum or maximum is shared equally by the tokens that attain it.

    Args:
        x: ``(B, T)``, or packed ``(N,)``.
        mask: bool or 0/1 in ``x``'s shape, for instance one span of each sequence; None is all.
        how: ``mean``, ``min``, ``max`` or ``sum``.
        seq_ids: ``(N,)`` non-decreasing ints, needed by packed tokens (:func:`span_ids` makes them of spans).

    Returns:
        ``(B,)``, or ``(S,)`` for the S different ``seq_ids`` in their order; finding S synchronises with a GPU once.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.spans.sequence_stat(torch.tensor([[1.0, 3.0], [2.0, 9.0]]), torch.tensor([[1, 1], [1, 0]]))
        tensor([2., 2.])
    """
    name = "sequence_stat"
    if how not in HOW:
        raise ValueError(f"{name}: how must be one of {HOW}, got {how!r}")
    check_tensor(name, "x", x)
    if seq_ids is not None:
        check_tensor(name, "seq_ids", seq_ids)
    if x.dim() not in (1, 2) or not x.is_floating_point():
        raise ValueError(f"{name}: x must be floats (B, T) or (N,), got {x.dtype} {tuple(x.shape)}")
    if (x.dim() == 1) == (seq_ids is None):
        got = "None" if seq_ids is None else f"shape {tuple(seq_ids.shape)}"
        raise ValueError(f"{name}: seq_ids (N,) goes with packed x (N,), x has shape {tuple(x.shape)}, seq_ids is {got}")
    keep = keep_mask(name, mask, x)
    if seq_ids is not None:
        x, keep = _padded(x, keep, sequence_index(name, x, "x", seq_ids))
    if how in ("min", "max"):
        none = torch.inf if how == "min" else -torch.inf
        x = torch.where(keep, x, none)
        x = torch.cat((x, x.new_full((*x.shape[:-1], 1), none)), -1)  # a sequence may have no token at all
        return torch.where(keep.any(-1), x.amin(-1) if how == "min" else x.amax(-1), 0)
    total = torch.where(keep, x, 0).sum(-1)
    return total / keep.sum(-1).clamp_min(1) if how == "mean" else total


def _padded(x: Tensor, keep: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Packed tokens as ``(S, T)``: places are unique, so neither the values nor their gradient need atomics."""
    if not x.numel():
        return x.view(0, 0), keep.view(0, 0)
    counts = torch.zeros_like(place).scatter_add_(0, place, torch.ones_like(place))
    rows, columns = torch.stack((place[-1] + 1, counts.max())).tolist()
    at = place, torch.arange(x.numel(), device=x.device) - (counts.cumsum(0) - counts)[place]
    return x.new_zeros(rows, columns).index_put(at, x), keep.new_zeros(rows, columns).index_put(at, keep)
