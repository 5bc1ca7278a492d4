"""Which tokens a method teaches: flags of correct responses, and groups of responses to one prompt that are all wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from rlad_kernels.core.check import integers
from rlad_kernels.core.reduction import keep_mask
from rlad_kernels.losses.ratio.surrogate import per_token


def correct_tokens(name: str, correct: Tensor | None, logp: Tensor, mask: Tensor | None) -> Tensor:
    """``correct`` as bool in ``logp``'s shape, False at masked tokens.

    Raises:
        ValueError: where it is missing, of another shape, or not bools or 0/1 at kept tokens.
    """
    if correct is None:
        raise ValueError(f"{name}: correct is None, wanted bools, (B,) or logp's shape: whether a response is right")
    keep = keep_mask(name, mask, logp)
    flags = torch.where(keep, per_token(name, "correct", correct, logp), 0)
    return torch.ops.rlad.checked(flags, "binary", f"{name}: correct") != 0


def wrong_groups(name: str, correct: Tensor, group_ids: Tensor | None) -> Tensor:
    """Whether no token of a token's group is ``correct``, bool in its shape; ``group_ids`` ``(B,)`` or in its shape."""
    if group_ids is None:
        raise ValueError(f"{name}: group_ids is None, wanted integers, (B,) or logp's shape: the prompt a response answers")
    groups = per_token(name, "group_ids", integers(name, "group_ids", group_ids), correct).flatten()
    ids, order = groups.sort(stable=True)
    place = torch.zeros_like(order)
    place[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    right = torch.zeros_like(place).scatter_add_(0, place, correct.flatten()[order].long())  # integers: any order is the same
    return torch.zeros_like(correct).flatten().scatter(0, order, right[place] == 0).view_as(correct)
