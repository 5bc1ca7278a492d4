"""Masks: which tokens a distillation term sees. Bool, True is kept; combine with ``&`` and give the result as ``mask=``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers, check_tensor, integers, is_integer, is_number, may_read, token_rows
from rlad_kernels.core.reduction import keep_mask, sequence_index
from rlad_kernels.losses.ratio.groups import wrong_groups

LEVELS = ("response", "group")


def response_mask(prompt_lengths: Tensor, lengths: Tensor, size: int) -> Tensor:
    """``(B, size)``, True from each row's ``prompt_lengths (B,)`` up to, but not including, its ``lengths (B,)``.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.masks.response_mask(torch.tensor([1]), torch.tensor([3]), 4)
        tensor([[False,  True,  True, False]])
    """
    name = "response_mask"
    prompt_lengths, lengths = integers(name, "prompt_lengths", prompt_lengths), integers(name, "lengths", lengths)
    if lengths.dim() != 1 or prompt_lengths.shape != lengths.shape:
        raise ValueError(
            f"{name}: prompt_lengths has shape {tuple(prompt_lengths.shape)}, lengths {tuple(lengths.shape)}, wanted (B,) both"
        )
    if not is_integer(size):
        raise ValueError(f"{name}: size must be an int, got {size!r}")
    at = torch.arange(size, device=lengths.device)
    return (at >= prompt_lengths.unsqueeze(1)) & (at < lengths.unsqueeze(1))


def special_token_mask(
    tokens: Tensor, special_ids: list[int], mask: Tensor | None = None, *, seq_ids: Tensor | None = None
) -> Tensor:
    """False at the first kept occurrence of each id of ``special_ids`` in each response, True elsewhere (arXiv 2603.25562).

    Args:
        tokens: ids ``(B, T)``, or packed ``(N,)`` with ``seq_ids (N,)``, non-decreasing.
        special_ids: ids counted one by one, the tokens of ``<think>`` for instance.
        mask: the response; occurrences outside it (in the prompt) do not count.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.masks.special_token_mask(torch.tensor([[7, 5, 7]]), [7])
        tensor([[False,  True,  True]])
    """
    name = "special_token_mask"
    tokens = integers(name, "tokens", tokens)
    keep, place = keep_mask(name, mask, tokens), _places(name, tokens, seq_ids)
    out = torch.ones_like(keep)
    for i in _ids(name, "special_ids", special_ids):
        out &= ~_nth(keep & (tokens == i), place, last=False)
    return out


def final_eos_mask(tokens: Tensor, eos_ids: list[int], mask: Tensor | None = None, *, seq_ids: Tensor | None = None) -> Tensor:
    """False at each response's last kept token where that is an EOS id: teacher and student may end differently (arXiv 2609.04108).

    Args:
        tokens, mask, seq_ids: as in :func:`special_token_mask`.
        eos_ids: all ids that end a response, ``<|endoftext|>`` and ``<|im_end|>`` for instance.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.masks.final_eos_mask(torch.tensor([[5, 2, 5, 2]]), [2])
        tensor([[ True,  True,  True, False]])
    """
    name = "final_eos_mask"
    tokens = integers(name, "tokens", tokens)
    keep, place = keep_mask(name, mask, tokens), _places(name, tokens, seq_ids)
    eos = torch.zeros_like(keep)
    for i in _ids(name, "eos_ids", eos_ids):
        eos |= tokens == i
    return ~(_nth(keep, place, last=True) & eos)


def top_entropy_mask(entropy: Tensor, fraction: float, mask: Tensor | None = None) -> Tensor:
    """The round(fraction·n) tokens of highest entropy among the n kept ones of the batch (arXiv 2506.01939).

    Exactly that many, halves rounded up; among equal entropies the earlier token (row by row) stays; NaN ranks last.
    No host synchronisation on CUDA.

    Args:
        entropy: ``(B, T)`` or ``(N,)``.
        fraction: in [0, 1].
        mask: kept tokens; None is all.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.masks.top_entropy_mask(torch.tensor([0.1, 2.0, 0.3, 1.0]), 0.5)
        tensor([False,  True, False,  True])
    """
    name = "top_entropy_mask"
    check_tensor(name, "entropy", entropy)
    if not (is_number(fraction) and 0 <= fraction <= 1):
        raise ValueError(f"{name}: fraction must be in [0, 1], got {fraction!r}")
    keep = keep_mask(name, mask, entropy).flatten()
    value = torch.where(keep & ~entropy.detach().flatten().isnan(), entropy.detach().flatten(), -torch.inf)
    by_value = value.argsort(descending=True, stable=True)
    order = by_value[(~keep[by_value]).to(torch.int8).argsort(stable=True)]  # kept tokens first, whatever their entropy
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    count = torch.floor(keep.sum().double() * fraction + 0.5)
    return (keep & (rank < count)).view(entropy.shape)


def before_stray_mask(
    kl: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float | None = None,
    differs: Tensor | None = None,
    seq_ids: Tensor | None = None,
) -> Tensor:
    """True before the token at which each response strays from the teacher, everywhere where none does (after arXiv 2407.10068).

    The token where the two differ most, which that paper corrects and writes on from; or with a threshold the first beyond it.
    ``mask & ~before`` are the tokens from there on.

    Args:
        kl: a KL per token ``(B, T)``, or packed ``(N,)``; NaN strays from nothing.
        mask: the response; tokens outside it do not stray.
        threshold: in nats; None takes the largest KL of the response, the first of equal ones.
        differs: bool or 0/1, the tokens that may stray: the paper's, where the student's token is not the teacher's. None is all.
        seq_ids: as in :func:`special_token_mask`.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.masks.before_stray_mask(torch.tensor([[0.1, 0.4, 0.9, 0.2]]))
        tensor([[ True,  True, False, False]])
        >>> rk.masks.before_stray_mask(torch.tensor([[0.1, 0.4, 0.9, 0.2]]), threshold=0.3)
        tensor([[ True, False, False, False]])
    """
    name = "before_stray_mask"
    check_tensor(name, "kl", kl)
    if threshold is not None:
        check_numbers(name, threshold=threshold)
    place, kl = _places(name, kl, seq_ids), kl.detach()
    may = keep_mask(name, mask, kl) & keep_mask(name, differs, kl, "differs") & ~kl.isnan()
    if threshold is None:
        value = torch.where(may, kl, -torch.inf).flatten()
        most = value.new_full((kl.numel() + 1,), -torch.inf).scatter_reduce_(0, place.flatten(), value, "amax")
        may &= kl == most[place]
    else:
        may &= kl > threshold
    number = torch.arange(kl.numel(), device=kl.device)
    return (number < _ends(may, place, last=False)[place.flatten()]).view(kl.shape)


def reward_mask(correct: Tensor, group_ids: Tensor | None = None, level: str = "response") -> Tensor:
    """Responses that are distilled by their reward (KDRL, arXiv 2506.02208): the incorrect ones, or those of all-wrong groups.

    Args:
        correct: bool or 0/1 ``(B,)``, one a response.
        group_ids: ints ``(B,)`` in any order, equal for answers to one prompt; for ``level="group"``.
        level: ``response`` keeps incorrect responses, ``group`` those in whose group no response is correct.

    Returns:
        bool ``(B,)``; :func:`spread` makes tokens of it.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.masks.reward_mask(torch.tensor([True, False, False]), torch.tensor([0, 0, 1]), level="group")
        tensor([False, False,  True])
    """
    name = "reward_mask"
    if level not in LEVELS:
        raise ValueError(f"{name}: level must be one of {LEVELS}, got {level!r}")
    check_tensor(name, "correct", correct)
    if correct.dim() != 1:
        raise ValueError(f"{name}: correct must be (B,), one a response, got shape {tuple(correct.shape)}")
    if correct.dtype != torch.bool and may_read(correct) and bool(((correct != 0) & (correct != 1)).any()):
        raise ValueError(f"{name}: correct must hold bools, or numbers equal to 0 or 1, got {correct.tolist()}")
    wrong = correct == 0
    if level == "response":
        return wrong
    if group_ids is None:
        raise ValueError(f"{name}: group_ids is None, wanted integers (B,): the prompt that each response answers")
    return wrong_groups(~wrong, token_rows(name, "group_ids", integers(name, "group_ids", group_ids), wrong))


def spread(responses: Tensor, tokens: Tensor, *, seq_ids: Tensor | None = None) -> Tensor:
    """One value a response ``(B,)`` at each of its tokens, in the shape of ``tokens`` ``(B, T)`` or packed ``(N,)`` + ``seq_ids``.

    Packed: ``responses[i]`` belongs to the i-th run of equal ``seq_ids``. Another number of responses raises a ValueError (on
    CUDA with ``set_checks(True)``).

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.masks.spread(torch.tensor([True, False]), torch.zeros(2, 3))
        tensor([[ True,  True,  True],
                [False, False, False]])
    """
    check_tensor("spread", "responses", responses)
    check_tensor("spread", "tokens", tokens)
    place = _places("spread", tokens, seq_ids)
    if may_read(place):
        count = int(place.max()) + 1 if place.numel() else 0
        if responses.dim() != 1 or responses.shape[0] != count:
            raise ValueError(f"spread: responses has shape {tuple(responses.shape)}, wanted ({count},), one a response of tokens")
    return responses[place]


def _ids(name: str, argument: str, ids: list[int]) -> list[int]:
    if not isinstance(ids, Iterable) or not all(map(is_integer, ids)):
        raise ValueError(f"{name}: {argument} must be a list of ints, got {ids!r}")
    return ids


def _places(name: str, tokens: Tensor, seq_ids: Tensor | None) -> Tensor:
    """Number of each token's response, in the shape of ``tokens``."""
    return sequence_index(name, tokens, "a response", seq_ids).view(tokens.shape)


def _nth(where: Tensor, place: Tensor, *, last: bool) -> Tensor:
    """The first, or last, True of each response."""
    number = torch.arange(where.numel(), device=where.device)
    return where & (_ends(where, place, last=last)[place.flatten()] == number).view(where.shape)


def _ends(where: Tensor, place: Tensor, *, last: bool) -> Tensor:
    """The number of the first, or last, True of each response; beyond all tokens where there is none."""
    number = torch.arange(where.numel(), device=where.device)
    best = number.new_full((where.numel() + 1,), -1 if last else where.numel())
    return best.scatter_reduce_(0, place.flatten(), torch.where(where.flatten(), number, best[0]), "amax" if last else "amin")
