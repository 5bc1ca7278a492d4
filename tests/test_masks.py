"""Masks against loops over the tokens, padded and packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels import masks

B, T = 5, 9


def packed(x: Tensor) -> Tensor:
    return x.flatten()


SEQ = torch.arange(B).repeat_interleave(T) * 3  # runs of equal ids, not 0, 1, 2, …


def both(call, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The padded result, which the packed one must equal."""
    out = call(tokens, mask, None)
    flat = call(packed(tokens), None if mask is None else packed(mask), SEQ)
    assert torch.equal(out.flatten(), flat)
    return out


def test_response_mask():
    out = masks.response_mask(torch.tensor([2, 0, 3]), torch.tensor([4, 5, 3]), 5)
    assert out.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("masked", [False, True])
def test_special_tokens_leave_at_their_first_kept_occurrence(masked: bool):
    tokens, mask = torch.randint(4, (B, T)), torch.rand(B, T) > 0.4 if masked else None
    out = both(lambda x, m, s: masks.special_token_mask(x, [1, 3], m, seq_ids=s), tokens, mask)
    keep = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    for b in range(B):
        for i in (1, 3):
            found = [t for t in range(T) if keep[b, t] and tokens[b, t] == i]
            assert [bool(out[b, t]) for t in found] == [t != found[0] for t in found]
        assert out[b][(tokens[b] != 1) & (tokens[b] != 3)].all()
    assert masks.special_token_mask(tokens, []).all()


def test_final_eos_leaves_only_where_the_response_ends_with_one():
    tokens = torch.tensor([[5, 1, 7, 7, 0], [5, 2, 0, 0, 0], [1, 1, 3, 0, 0], [4, 4, 4, 4, 4]])
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    out = masks.final_eos_mask(tokens, [1, 2, 4], mask)
    assert (~out).nonzero().tolist() == [[0, 1], [1, 1]]
    seq = torch.arange(4).repeat_interleave(5)
    assert torch.equal(masks.final_eos_mask(tokens.flatten(), [1, 2, 4], mask.flatten(), seq_ids=seq), out.flatten())


@pytest.mark.parametrize("fraction", [0, 0.2, 0.5, 0.83, 1])
def test_top_entropy_keeps_an_exact_number_and_breaks_ties_by_position(fraction: float):
    entropy, mask = torch.randint(4, (B, T)).float(), torch.rand(B, T) > 0.3
    entropy[~mask] = torch.nan
    out = masks.top_entropy_mask(entropy, fraction, mask)
    n = int(mask.sum())
    count = int(fraction * n + 0.5)
    assert out.sum() == count
    order = sorted((-entropy.flatten()[i].item(), i) for i in range(B * T) if mask.flatten()[i])
    assert sorted(i for _, i in order[:count]) == out.flatten().nonzero().flatten().tolist()


def test_nan_entropy_ranks_last_among_the_kept():
    entropy = torch.tensor([torch.nan, 0.0, 1.0, torch.nan])
    assert masks.top_entropy_mask(entropy, 0.5).tolist() == [False, True, True, False]
    assert masks.top_entropy_mask(entropy, 0.75).tolist() == [True, True, True, False]
    assert masks.top_entropy_mask(entropy, 1.0, torch.tensor([1, 1, 1, 0])).tolist() == [True, True, True, False]


def test_reward_masks():
    correct, groups = torch.tensor([1, 0, 0, 0, 0, 1]), torch.tensor([7, 2, 7, 2, 9, 1])
    assert masks.reward_mask(correct).tolist() == [False, True, True, True, True, False]
    assert masks.reward_mask(correct.bool(), groups, "group").tolist() == [False, True, False, True, True, False]
    keep = masks.reward_mask(correct, groups, "group")
    tokens = torch.zeros(6, 3)
    spread = masks.spread(keep, tokens)
    assert torch.equal(spread, keep[:, None].expand(6, 3))
    assert torch.equal(masks.spread(keep, tokens.flatten(), seq_ids=torch.arange(6).repeat_interleave(3)), spread.flatten())


@pytest.mark.parametrize("call,named", [
    (lambda x: masks.reward_mask(x, level="batch"), "reward_mask: level"),
    (lambda x: masks.reward_mask(x, level="group"), "reward_mask: group_ids is None"),
    (lambda x: masks.reward_mask(x, x[:2], "group"), r"reward_mask: group_ids has shape \(2,\)"),
    (lambda x: masks.reward_mask(x, x.float(), "group"), "reward_mask: group_ids must be integers"),
    (lambda x: masks.reward_mask(x + 2), "reward_mask: correct must hold bools"),
    (lambda x: masks.reward_mask(x[None]), "reward_mask: correct"),
    (lambda x: masks.spread(x, torch.zeros(2, 4)), "spread: responses"),
    (lambda x: masks.top_entropy_mask(x.float(), 1.5), "top_entropy_mask: fraction"),
    (lambda x: masks.special_token_mask(x, [1]), "special_token_mask: a response of packed"),
    (lambda x: masks.final_eos_mask(x, [1], seq_ids=torch.tensor([1, 0, 0])), "final_eos_mask: seq_ids must be non-decreasing"),
])  # fmt: skip
def test_bad_input_is_named(call, named: str):
    with pytest.raises(ValueError, match=named), rk.set_checks(True):
        call(torch.tensor([0, 1, 0]))


def test_masks_combine_into_a_loss():
    lq, mask = torch.randn(B, T, 3).log_softmax(-1), torch.rand(B, T) > 0.2
    teacher = rk.TopK(torch.arange(3).expand(B, T, 3), torch.randn(B, T, 3).log_softmax(-1))
    wrong = masks.spread(masks.reward_mask(torch.arange(B) % 2), mask)
    keep = mask & masks.top_entropy_mask(torch.rand(B, T), 0.5, mask) & wrong
    out = rk.losses.TopKKL()(lq, teacher=teacher, mask=keep)
    assert not out.token_loss[~keep].any()


@pytest.mark.parametrize("differ", [False, True])
@pytest.mark.parametrize("threshold", [None, 2.0, 9.0])
@pytest.mark.parametrize("masked", [False, True])
def test_what_stands_before_the_stray_token(masked: bool, threshold: float | None, differ: bool):
    kl, mask = torch.randint(5, (B, T)).float(), torch.rand(B, T) > 0.4 if masked else None
    differs = torch.rand(B, T) > 0.3 if differ else None
    kl[0, 3], kl[1] = torch.nan, torch.nan

    def call(x: Tensor, m: Tensor | None, s: Tensor | None) -> Tensor:
        flat = differs if differs is None or s is None else differs.flatten()
        return masks.before_stray_mask(x, m, threshold=threshold, differs=flat, seq_ids=s)

    out = both(call, kl, mask)
    for b in range(B):
        may = [t for t in range(T) if (mask is None or mask[b, t]) and (differs is None or differs[b, t]) and kl[b, t] == kl[b, t]]
        most = max([kl[b, t] for t in may], default=torch.inf)
        stray = [t for t in may if (kl[b, t] == most if threshold is None else kl[b, t] > threshold)]
        assert out[b].tolist() == [t < min(stray, default=T) for t in range(T)]


def test_before_stray_mask_refuses():
    kl = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"^before_stray_mask: threshold must be a finite number, got '1'"):
        masks.before_stray_mask(kl, threshold="1")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^before_stray_mask: differs has shape \(2,\), wanted \(2, 3\)"):
        masks.before_stray_mask(kl, differs=torch.ones(2))
