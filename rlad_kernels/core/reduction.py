"""Reductions as token weights: loss = Σ weight·token_loss, so that a fused sweep can use them before the losses are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlad_kernels.core.check import check_tensor, integers, is_number
from rlad_kernels.core.metrics import MetricSums
from rlad_kernels.core.modes import ordinary
from rlad_kernels.core.types import LossOutput

REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


def keep_mask(name: str, mask: Tensor | None, like: Tensor, argument: str = "mask") -> Tensor:
    """The mask, public argument ``argument`` of ``name``, as bool in ``like``'s shape; None keeps all.

    Raises:
        ValueError: for another shape, or a numeric value other than 0 and 1 (on CUDA with ``set_checks(True)``).
    """
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    check_tensor(name, argument, mask)
    if mask.shape != like.shape:
        raise ValueError(f"{name}: {argument} has shape {tuple(mask.shape)}, wanted {tuple(like.shape)}")
    if mask.device != like.device:
        raise ValueError(f"{name}: {argument} is on {mask.device}, wanted {like.device}; all tensors must share a device")
    if mask.dtype == torch.bool:
        return ordinary(mask)
    return torch.ops.rlad.checked(mask.detach(), "binary", f"{name}: {argument}") != 0


class Reduction(NamedTuple):
    """How the losses of tokens become one: loss = Σ weight·token_loss.

    Attributes:
        kind: ``token-mean``: weight 1/kept tokens. ``seq-mean-token-mean``: 1/(kept tokens of the sequence)/(sequences with one).
            ``seq-mean-token-sum``: 1/(sequences with a kept token). None: the loss's own.
        seq_ids: non-decreasing ints in the tokens' shape, a run of equal ones a sequence; needed for packed ``(N,)`` tokens by
            the ``seq-`` kinds and by losses that look at sequences. None: the rows of ``(B, T)``.
        denominator: positive float or 0-dim tensor in place of the last divisor (tokens or sequences): of a whole accumulated
            batch, or B·L_max, as in Dr. GRPO.
        group: process group of the ranks over which the gradient will be averaged (DDP, FSDP), each with tokens of its own. The
            last divisor is then the mean of theirs, so that the average is the gradient of all tokens in one process, whatever a
            rank has, nothing too. One all-reduce of a number, on every rank, with every call.
        context: process group of the ranks that have these sequences in slices, the same rows ``(B, T_here)`` on each (context or
            sequence parallelism). A sequence's kept tokens are then counted over them, and it is one sequence. ``group`` holds
            them too; without a ``group`` it is the sum of their losses that one process would have. One all-reduce more, of B
            counts. Without ``seq_ids``; losses that read other tokens of a sequence want it whole.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp, ids = torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([0, 0, 1])
        >>> reduction = rk.Reduction("seq-mean-token-mean", seq_ids=ids)
        >>> rk.losses.CrossEntropy()(logp, reduction=reduction).loss
        tensor(3.5000)
    """

    kind: str | None = None
    seq_ids: Tensor | None = None
    denominator: float | Tensor | None = None
    group: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, name: str, reduction: Any, default: str) -> Reduction:
        """A call's argument ``reduction``, the loss's own where it names none.

        Raises:
            ValueError: for anything but None, a known kind or a Reduction.
        """
        chosen = reduction if isinstance(reduction, Reduction) else Reduction(reduction)
        chosen = chosen._replace(kind=default) if chosen.kind is None else chosen
        if not isinstance(chosen.kind, str) or chosen.kind not in REDUCTIONS:
            raise ValueError(f"{name}: reduction must be a Reduction or one of {REDUCTIONS}, got {chosen.kind!r}")
        return chosen


def token_weights(name: str, keep: Tensor, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """Weights in ``keep``'s shape with loss = Σ weight·token_loss; 0 at masked tokens."""
    kind, seq_ids, denominator, group, context = reduction
    if group is not None and (denominator is not None or not isinstance(group, dist.ProcessGroup)):
        got = f"denominator={denominator!r} besides" if denominator is not None else type(group).__name__
        raise ValueError(f"{name}: group must be a torch.distributed.ProcessGroup, without a denominator, got {got}")
    if context is not None and (seq_ids is not None or keep.dim() < 2 or not isinstance(context, dist.ProcessGroup)):
        got = type(context).__name__ if keep.dim() > 1 and seq_ids is None else "packed tokens, whose sequences no rank can match"
        raise ValueError(f"{name}: context must be a torch.distributed.ProcessGroup, for tokens (B, T), got {got}")
    if isinstance(denominator, Tensor):
        denominator = _scalar_denominator(name, denominator.detach())
    elif denominator is not None and not (is_number(denominator) and denominator > 0):
        raise ValueError(f"{name}: denominator must be positive, got {denominator!r}")
    kept = keep.to(dtype)
    if kind == "token-mean":
        per_sequence, divisor = kept, kept.sum()
    else:
        counts, sequences = _sequence_counts(name, keep, f"reduction {kind!r}", seq_ids, context)
        divisor = sequences.to(dtype)
        per_sequence = kept / counts.clamp_min(1) if kind == "seq-mean-token-mean" else kept
    over = context if group is None else group
    if over is not None and denominator is None:
        divisor = divisor.clone()
        dist.all_reduce(divisor, group=over)
        times = 1 if context is None or kind == "token-mean" else context.size()  # that a sequence was counted
        divisor = divisor / (times if group is None else times * group.size())
    return per_sequence / (torch.where(divisor > 0, divisor, 1) if denominator is None else denominator)


def _scalar_denominator(name: str, denominator: Tensor) -> Tensor:
    if denominator.numel() != 1:
        raise ValueError(f"{name}: denominator must be a positive number or a 0-dim tensor, got shape {tuple(denominator.shape)}")
    return torch.ops.rlad.checked(denominator, "positive", f"{name}: denominator").reshape(())


def _sequence_counts(
    name: str, keep: Tensor, what: str, seq_ids: Tensor | None, context: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Kept tokens of each token's sequence, in a shape that broadcasts with ``keep``, and the number of sequences with one."""
    if keep.dim() > 1 and seq_ids is None:
        counts = keep.sum(-1, keepdim=True)
        if context is not None:
            dist.all_reduce(counts, group=context)
        return counts, (counts > 0).sum()
    place = sequence_index(name, keep, what, seq_ids)
    counts = torch.zeros_like(place).scatter_add(0, place, keep.flatten().long())  # integers: the order of adding does not matter
    return counts[place].view(keep.shape), (counts > 0).sum()


def sequence_index(name: str, keep: Tensor, what: str, seq_ids: Tensor | None) -> Tensor:
    """Each token's sequence, 0, 1, … in order, flattened: rows of ``(B, T)``, or runs of equal ``seq_ids`` in ``keep``'s shape.

    Raises:
        ValueError: for seq_ids that are missing where ``what`` needs them, of another shape or decreasing.
    """
    if seq_ids is None:
        if keep.dim() < 2:
            raise ValueError(f"{name}: {what} of packed (N,) tokens needs Reduction(seq_ids=…) of shape (N,), got None")
        return torch.arange(keep.shape[:-1].numel(), device=keep.device).repeat_interleave(keep.shape[-1])
    seq_ids = integers(name, "seq_ids", seq_ids)
    if seq_ids.shape != keep.shape:
        raise ValueError(f"{name}: seq_ids must be integers of shape {tuple(keep.shape)}, got shape {tuple(seq_ids.shape)}")
    if seq_ids.device != keep.device:
        raise ValueError(f"{name}: seq_ids is on {seq_ids.device}, wanted {keep.device}; all tensors must share a device")
    if not keep.dim():
        return seq_ids.new_zeros(1, dtype=torch.int64)
    ordered: Tensor = torch.ops.rlad.checked(seq_ids, "ordered", f"{name}: seq_ids")
    return starts(ordered).flatten().cumsum(0) - 1


def starts(ids: Tensor) -> Tensor:
    """Where a run of equal ids begins; a row of ``(B, T)`` always begins one."""
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    return first


def reduce(token_loss: Tensor, weights: Tensor, keep: Tensor, metrics: Mapping[str, Tensor]) -> LossOutput:
    """Close a loss: weigh, sum, and average the metrics."""
    token_loss = torch.where(keep, token_loss, 0)
    sums = MetricSums(metrics, weights)
    sums.add(metrics, keep)
    return LossOutput((weights * token_loss).sum(), token_loss.detach(), sums.result(keep.sum()))
