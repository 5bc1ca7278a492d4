"""A single token without dimensions, hidden (D,) and everything else as (), is what (1, …) is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from tests.sweeps import tensors_of

D, V, K = 8, 17, 5
Arguments = dict[str, Any]


def pool() -> Arguments:
    """The arguments of every call, as one token of a packed batch ``(1, …)``."""
    logp, old, other, base = -torch.rand(4, 1)
    ids = torch.randperm(V)[:K].unsqueeze(0)
    return {
        "hidden": torch.randn(1, D), "target": ids[:, 2], "ids": ids, "mask": torch.ones(1, dtype=torch.bool), "logp": logp,
        "old_logp": old, "teacher_logp": other, "base_logp": base, "rollout_logp": base, "ref_logp": base,
        "advantages": torch.randn(1), "correct": torch.zeros(1), "group_ids": torch.zeros(1, dtype=torch.long),
        "weights": torch.rand(1), "seq_ids": torch.full((1,), 3), "topk_logp": torch.randn(1, K).log_softmax(1) - 0.1,
        "old_topk_logp": torch.randn(1, K).log_softmax(1) - 0.1, "topk_ids": ids, "entropy": torch.rand(1),
        "teacher_hidden": torch.randn(1, D), "tokens": ids[:, 0], "x": torch.randn(1),
        "teacher": rk.TopK(ids, torch.randn(1, K).log_softmax(1) - 0.2, None, -torch.ones(1), other, torch.ones(1)),
    }  # fmt: skip


def weighted(
    scores: rk.TokenScores, *, advantages: Tensor, topk_weights: Tensor, factor: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    assert scores.topk_logp is not None
    return -factor * advantages * scores.logp + (topk_weights * scores.topk_logp).sum(-1), {"kl_old": advantages}


def fused(hidden: Tensor, advantages: Tensor, topk_logp: Tensor, **more: Any) -> rk.LossOutput:
    inputs = {"advantages": advantages, "topk_weights": topk_logp, "factor": torch.tensor(3.0)}
    return rk.fused_linear_loss(hidden, more.pop("head"), more.pop("target"), weighted, inputs=inputs, **more)


SEQ = {"reduction": "seq-mean-token-mean"}
SAMPLED = ("logp", "old_logp", "advantages", "mask")
ANCHORED = ("logp", "old_logp", "teacher_logp", "advantages", "mask")
FLAGGED = (*ANCHORED, "correct")
LINEAR = ("hidden", "head", "target", "mask")
# name → function, the tensors it gets, options
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...], Arguments]] = {
    "logp": (rk.linear_logp, (*LINEAR, "topk_ids"), {"entropy": True, "tail": True, "extras": ("mean_logits", "is_top1")}),
    "logp sparse": (rk.linear_logp, LINEAR, {"filter_eps": 0.01}),
    "topk": (rk.linear_topk, LINEAR, {"k": 3, "entropy": True}),
    "gather": (rk.linear_gather, ("hidden", "head", "ids", "mask"), {}),
    "support": (rk.linear_support, (*LINEAR, "ids"), {}),
    "fused": (fused, (*LINEAR, "topk_ids", "advantages", "topk_logp"), {}),
    "fused sequences": (fused, (*LINEAR, "topk_ids", "advantages", "topk_logp", "seq_ids"), SEQ),
    "rlad": (rk.rlad_loss, (*LINEAR, "old_logp", "advantages", "teacher", "seq_ids"), {"topk_kl_coef": 0.5, "normalize": "tail"}),
    "cross entropy": (rk.linear_cross_entropy_loss, (*LINEAR, "weights"), {"z_loss": 0.1}),
    "linear top-K": (rk.linear_topk_kl_loss, ("hidden", "head", "teacher", "mask"), {}),
    "linear top-K tail": (rk.linear_topk_kl_loss, ("hidden", "head", "teacher", "mask"), {"normalize": "tail"}),
    "divergence": (rk.linear_divergence, ("hidden", "head", "teacher_hidden", "teacher_head", "mask"), {"divergence": "jsd"}),
    "divergence loss": (
        rk.linear_divergence_loss, ("hidden", "head", "teacher_hidden", "teacher_head", "mask", "weights", "seq_ids"), SEQ,
    ),
    "grpo": (rk.grpo_loss, (*SAMPLED, "ref_logp", "rollout_logp"), {"kl_coef": 0.1}),
    "grpo sequences": (rk.grpo_loss, (*SAMPLED, "seq_ids"), SEQ),
    "trrd": (rk.trrd_loss, (*ANCHORED, "seq_ids"), {}),
    "cispo": (rk.cispo_loss, SAMPLED, {}),
    "sapo": (rk.sapo_loss, (*SAMPLED, "seq_ids"), {}),
    "gspo": (rk.gspo_loss, (*SAMPLED, "seq_ids"), {"clip": (0.2, 0.2)}),
    "opd": (rk.opd_loss, ("logp", "old_logp", "teacher_logp", "base_logp", "mask", "seq_ids"), {"gamma": 0.9, "extrapolation": 2}),
    "mopd": (rk.mopd_loss, ("logp", "rollout_logp", "teacher_logp", "mask", "seq_ids"), {}),
    "kdrl": (rk.kdrl_loss, (*FLAGGED, "group_ids"), {"teach": "wrong-groups"}),
    "srpo": (rk.srpo_loss, FLAGGED, {}),
    "hdpo": (rk.hdpo_loss, (*FLAGGED, "group_ids"), {}),
    "rlsd": (rk.rlsd_loss, ANCHORED, {}),
    "sdar": (rk.sdar_loss, ANCHORED, {}),
    "top-K": (rk.topk_kl_loss, ("topk_logp", "teacher", "mask"), {"direction": "jsd"}),
    "top-K sequences": (rk.topk_kl_loss, ("topk_logp", "teacher", "mask", "seq_ids"), {"normalize": "tail", **SEQ}),
    "top-K policy gradient": (rk.topk_pg_loss, ("topk_logp", "old_topk_logp", "teacher", "mask"), {}),
    "top-K advantage": (rk.topk_advantage_loss, ("logp", "old_logp", "topk_logp", "teacher", "mask"), {}),
    "sampled tail": (rk.topk_sampled_tail_loss, ("topk_logp", "logp", "target", "teacher", "mask"), {}),
    "eopd": (rk.eopd_loss, ("logp", "topk_logp", "old_logp", "teacher", "mask"), {}),
    "with_sampled": (rk.with_sampled, ("teacher", "target"), {}),
    "intersection": (rk.intersection, ("teacher", "ids"), {}),
    "probability_band": (rk.probability_band, ("teacher", "target"), {"low": 0.1, "high": 0.3}),
    "special_token_mask": (rk.special_token_mask, ("tokens", "mask", "seq_ids"), {"special_ids": [3]}),
    "final_eos_mask": (rk.final_eos_mask, ("tokens", "mask", "seq_ids"), {"eos_ids": list(range(V))}),
    "top_entropy_mask": (rk.top_entropy_mask, ("entropy", "mask"), {"fraction": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_is_what_a_batch_of_one_is(name: str) -> None:
    function, wanted, options = CALLS[name]
    tensors = pool()
    weight, teacher_weight, temperature = torch.randn(V, D), torch.randn(V, D), torch.tensor([0.7])

    def run(token: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        leaf = weight.clone().requires_grad_()
        given: Arguments = {}
        for k in wanted:
            x = tensors.get(k)
            given[k] = type(x)(*(None if t is None else token(t) for t in x)) if isinstance(x, tuple) else x
            if isinstance(x, Tensor):
                given[k] = token(x).clone().requires_grad_(k in ("hidden", "logp", "topk_logp"))
        if "head" in wanted:
            given["head"] = rk.LMHead(leaf, temperature=token(temperature))
        if "teacher_head" in wanted:
            given["teacher_head"] = rk.LMHead(teacher_weight, temperature=token(temperature))
        out = function(**given, **options)
        total = sum((x.sum() for x in tensors_of(out) if x.requires_grad), torch.zeros(()))
        leaves = [x for x in (leaf, *given.values()) if isinstance(x, Tensor) and x.requires_grad]
        grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else ()
        return tensors_of(out), [g for g in grads if g is not None]

    one, single = run(lambda x: x), run(lambda x: x.squeeze(0))
    for ones, singles in zip(one, single, strict=True):
        assert len(ones) == len(singles)
        for x, y in zip(ones, singles, strict=True):
            assert y.shape in (x.shape, x.shape[1:])
            torch.testing.assert_close(y, x.view(y.shape), rtol=0, atol=0)


def test_the_fused_loss_of_one_token() -> None:
    """The issue's input: K weights of a token were taken for those of K tokens."""
    hidden, weight, ids, at = torch.randn(D), torch.randn(V, D), torch.arange(K), torch.randn(K)
    inputs = {"advantages": torch.tensor(2.0), "topk_weights": at, "factor": torch.tensor(3.0)}
    out = rk.fused_linear_loss(hidden, rk.LMHead(weight), torch.tensor(1), weighted, inputs=inputs, topk_ids=ids)
    logp = (weight.double() @ hidden.double()).log_softmax(0)
    want = -6 * logp[1] + (at * logp[:K]).sum()
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-5, atol=1e-5)
