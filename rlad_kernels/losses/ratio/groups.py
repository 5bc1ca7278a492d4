"""Groups of responses to one prompt: which are all wrong, and values standardised among their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rlad_kernels.core.token_loss import Batch
from rlad_kernels.losses.ratio.sequences import totals


def correct_tokens(batch: Batch, correct: Tensor) -> Tensor:
    """``correct`` ``(N,)`` as bool, False at masked tokens.

    Raises:
        ValueError: where it is not bools or 0/1 at kept tokens.
    """
    if correct.dtype == torch.bool:
        return correct
    return torch.ops.rlad.checked(correct, "binary", f"{batch.name}: correct") != 0


def wrong_groups(correct: Tensor, group_ids: Tensor) -> Tensor:
    """Whether no token of a token's group is ``correct``, bool; all ``(N,)``."""
    ids, order = group_ids.sort(stable=True)
    place = torch.zeros_like(order)
    place[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    right = torch.zeros_like(place).scatter_add_(0, place, correct[order].long())  # integers: any order is the same
    return torch.zeros_like(correct).scatter(0, order, right[place] == 0)


def standardized(x: Tensor, keep: Tensor, group_ids: Tensor) -> Tensor:
    """(x − mean)/std over the kept tokens of each group, at each of them; 0 where they do not differ; all ``(N,)``."""
    ids, order = group_ids.sort(stable=True)
    kept = keep[order]
    counts = totals(kept.to(x.dtype), ids)
    centred = torch.where(kept, x[order], 0)
    centred = torch.where(kept, centred - totals(centred, ids) / counts.clamp_min(1), 0)
    std = (totals(centred.square(), ids) / (counts - 1).clamp_min(1)).sqrt()
    return torch.zeros_like(x).scatter(0, order, torch.where(std > 1e-6, centred / std.clamp_min(1e-6), 0))
