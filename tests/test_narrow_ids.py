"""Ids of any integer type mean the same tokens: no −1, −100 or size of the vocabulary wraps, whatever the type can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.integrations.served import from_logprobs
from tests.sweeps import tensors_of

B, T, D, V, K = 2, 3, 8, 300, 4
NAMES = {str(d).removeprefix("torch."): d for d in (torch.int8, torch.uint8, torch.uint16, torch.uint64)}


def world(signed: bool) -> dict[str, Tensor]:
    """int64 ids that every type can hold; the signed ones with empty slots, masked targets and tokens outside spans."""
    ids = torch.stack([torch.randperm(120)[:K] for _ in range(B * T)]).view(B, T, K)
    target, spans = torch.tensor([[5, 119, 64], [3, 7, 100]]), torch.tensor([[0, 0, 1], [1, 1, 0]])
    if signed:
        ids[0, 1, 2], target[1, 0], spans[0, 1] = -1, -100, -1
    return {
        "target": target, "ids": ids, "spans": spans, "seq_ids": torch.tensor([[0, 0, 1], [2, 2, 120]]),
        "group_ids": torch.tensor([7, 7]), "lengths": torch.tensor([100, 3]), "prompts": torch.tensor([1, 2]),
        "student_ids": ids.roll(1, -1)[..., 1:],
    }  # fmt: skip


def calls() -> dict[str, Callable[[dict[str, Tensor]], Any]]:
    hidden, head = torch.randn(B, T, D), rk.LMHead(torch.randn(V, D))
    s, o, t, a = torch.randn(4, B, T)
    lp, lq = torch.randn(2, B, T, K).log_softmax(-1) - 0.1
    losses, supports, masks, spans = rk.losses, rk.supports, rk.masks, rk.spans
    rlad = losses.RLAD(topk=losses.TopKKL(), topk_coef=0.5)
    sampled = {"old_logp": o, "advantages": a}

    def mean(w: dict[str, Tensor]) -> rk.Reduction:
        return rk.Reduction("seq-mean-token-mean", seq_ids=w["seq_ids"])

    def teacher(w: dict[str, Tensor]) -> rk.TopK:
        return rk.TopK(w["ids"], lp, tail_logp=-torch.ones(B, T), target_logp=t)

    def other(w: dict[str, Tensor]) -> rk.TopK:
        return rk.TopK(w["student_ids"], lp.roll(1, -1)[..., 1:], tail_logp=-torch.ones(B, T))

    return {
        "linear_logp": lambda w: rk.linear_logp(hidden, head, w["target"], topk_ids=w["ids"], entropy=True, tail=True),
        "linear_topk": lambda w: rk.linear_topk(hidden, head, 3, target=w["target"]),
        "linear_gather": lambda w: rk.linear_gather(hidden, head, w["ids"]),
        "linear_support": lambda w: rk.linear_support(hidden, head, w["ids"], target=w["target"]),
        "linear_loss": lambda w: rk.linear_loss(hidden, head, w["target"], losses.CrossEntropy(), reduction=mean(w)),
        "linear_loss rlad": lambda w: rk.linear_loss(
            hidden, head, w["target"], rlad, **sampled, teacher=teacher(w), reduction=mean(w)
        ),
        "linear_loss support": lambda w: rk.linear_loss(hidden, head, w["target"], losses.TopKKL(), teacher=teacher(w)),
        "linear_loss tail": lambda w: rk.linear_loss(
            hidden, head, w["target"], losses.TopKKL(normalize="tail"), teacher=teacher(w)
        ),
        "linear_loss sampled tail": lambda w: rk.linear_loss(
            hidden, head, w["target"], losses.SampledTailKL(), teacher=teacher(w)
        ),
        "linear_loss gspo": lambda w: rk.linear_loss(hidden, head, w["target"], losses.GSPO(), **sampled, reduction=mean(w)),
        "topk_kl": lambda w: losses.TopKKL()(lq, teacher=teacher(w), reduction=mean(w)),
        "sampled_tail": lambda w: losses.SampledTailKL()(
            rk.TokenScores(logp=s, topk_logp=lq), target=w["target"], teacher=teacher(w)
        ),
        "gspo": lambda w: losses.GSPO(clip=(0.2, 0.2))(s, **sampled, reduction=mean(w)),
        "hdpo": lambda w: losses.HDPO()(s, **sampled, teacher_logp=t, correct=torch.zeros(B), group_ids=w["group_ids"]),
        "union": lambda w: supports.union(teacher(w), other(w)),
        "intersection": lambda w: supports.intersection(teacher(w), w["student_ids"]),
        "symmetric_difference": lambda w: supports.symmetric_difference(teacher(w), other(w)),
        "with_sampled": lambda w: supports.with_sampled(teacher(w), w["target"]),
        "probability_band": lambda w: supports.probability_band(teacher(w), 0.2, 0.5, target=w["target"]),
        "from_logprobs": lambda w: from_logprobs((w["ids"], lp), w["target"], vocab_size=V, offset=-130),
        "special_token_mask": lambda w: masks.special_token_mask(w["target"], [5, 5 + 256, 119 - 256], seq_ids=w["seq_ids"]),
        "final_eos_mask": lambda w: masks.final_eos_mask(w["target"], [64 + 256, 119], seq_ids=w["seq_ids"]),
        "response_mask": lambda w: masks.response_mask(w["prompts"], w["lengths"], 300),
        "reward_mask": lambda w: masks.reward_mask(torch.zeros(B), w["group_ids"], "group"),
        "spread": lambda w: masks.spread(torch.arange(4.0), w["target"], seq_ids=w["seq_ids"]),
        "span_ids": lambda w: spans.span_ids(w["spans"], seq_ids=w["seq_ids"]),
        "sequence_stat": lambda w: spans.sequence_stat(s.flatten(), seq_ids=w["seq_ids"].flatten()),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("name", calls())
def test_the_type_of_ids_does_not_matter(name: str, dtype: str) -> None:
    call, wide = calls()[name], world(dtype == "int8")
    want, got = (tensors_of(call(w)) for w in (wide, {k: x.to(NAMES[dtype]) for k, x in wide.items()}))
    assert len(want) == len(got) > 0
    for x, y in zip(want, got, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True, check_dtype=x.is_floating_point())


@pytest.mark.parametrize("fused", [False, True], ids=["logp", "fused"])
@pytest.mark.parametrize(("dtype", "target"), [(torch.uint8, 156), (torch.int8, -1), (torch.uint16, 65436), (torch.uint64, 300)])
def test_an_id_that_would_wrap_is_seen(dtype: torch.dtype, target: int, fused: bool) -> None:
    """156 in uint8, and 65436 in uint16, are −100 if compared there: the tokens were masked without an error."""
    hidden, head = torch.randn(1, D), rk.LMHead(torch.randn(V, D))
    ids = torch.tensor([target], dtype=dtype)

    def loss() -> Tensor:
        nll = rk.losses.CrossEntropy()
        return rk.linear_loss(hidden, head, ids, nll).loss if fused else -rk.linear_logp(hidden, head, ids).logp

    if target == 156:
        torch.testing.assert_close(loss().squeeze(), -(hidden @ head.weight.T).log_softmax(1)[0, 156])
    else:
        with pytest.raises(ValueError, match=rf"target must be in \[0, vocab_size={V}\), got {target}"), rk.set_checks(True):
            loss()


def test_decreasing_sequences_are_seen() -> None:
    """The difference of two uint8 numbers is never negative."""
    ids = torch.tensor([3, 1, 1], dtype=torch.uint8)
    s, o, a = torch.randn(3, 3)
    with pytest.raises(ValueError, match=r"^GRPO: seq_ids must be non-decreasing"), rk.set_checks(True):
        rk.losses.GRPO()(s, old_logp=o, advantages=a, reduction=rk.Reduction("seq-mean-token-sum", seq_ids=ids))


def test_uint64_beyond_int64() -> None:
    """2^64 − 100 is not −100."""
    ids = torch.tensor([-100]).to(torch.uint64)
    hidden, head = torch.randn(1, D), rk.LMHead(torch.randn(V, D))
    with pytest.raises(ValueError, match="target must be in"), rk.set_checks(True):
        rk.linear_logp(hidden, head, ids)
