"""Which tokens a method teaches: flags of correct responses, and groups of responses to one prompt that are all wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from rlad_kernels.core.token_loss import Batch


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
