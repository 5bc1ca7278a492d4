"""A single token without dimensions, hidden (D,) and everything else as (), is what (1, …) is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
        "old_topk_logp": torch.randn(1, K).log_softmax(1) - 0.1, "topk_ids": ids, "topk_weights": torch.randn(1, K),
        "entropy": torch.rand(1),
        "teacher_hidden": torch.randn(1, D), "tokens": ids[:, 0], "x": torch.randn(1),
        "teacher": rk.TopK(
            ids, torch.randn(1, K).log_softmax(1) - 0.2, tail_logp=-torch.ones(1), target_logp=other, entropy=torch.ones(1)
        ),
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Weighted(rk.TokenLoss):
    """A loss of one's own that weighs every slot of its support."""

    factor: float = 3.0

    needs = ("advantages", "topk_weights", "teacher")
    wide = ("topk_weights",)
    reads = ("logp", "topk_logp")

    def tokens(
        self, scores: rk.TokenScores, *, advantages: Tensor, topk_weights: Tensor, teacher: rk.TopK
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -self.factor * advantages * scores.logp + (topk_weights * scores.topk_logp).sum(-1)
        return loss, {"kl_old": advantages}


def given_scores(loss: rk.TokenLoss, seq_ids: Tensor | None = None, **given: Any) -> rk.losses.LossOutput:
    """The loss on log-probs that are at hand."""
    scores = rk.TokenScores(**{k: given.pop(k) for k in rk.TokenScores._fields if k in given})
    return loss(scores, reduction=rk.Reduction(seq_ids=seq_ids), **given)


def swept(loss: rk.TokenLoss, seq_ids: Tensor | None = None, **given: Any) -> rk.losses.LossOutput:
    """The loss from hidden states."""
    return rk.linear_loss(loss=loss, reduction=rk.Reduction(seq_ids=seq_ids), **given)


def divergence_loss(seq_ids: Tensor, **given: Any) -> rk.losses.LossOutput:
    return rk.linear_divergence_loss(reduction=rk.Reduction("seq-mean-token-mean", seq_ids=seq_ids), **given)


SEQ = {"reduction": "seq-mean-token-mean"}
SAMPLED = ("logp", "old_logp", "advantages", "mask")
ANCHORED = ("logp", "old_logp", "teacher_logp", "advantages", "mask")
FLAGGED = (*ANCHORED, "correct")
LINEAR = ("hidden", "head", "target", "mask")
TWO_HEADS = ("hidden", "head", "teacher_hidden", "teacher_head", "mask")
TAIL = rk.losses.TopKKL(normalize="tail")
# name → function, the tensors it gets, options
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...], Arguments]] = {
    "logp": (rk.linear_logp, (*LINEAR, "topk_ids"), {"entropy": True, "tail": True, "extras": ("mean_logits", "is_top1")}),
    "logp and mean": (rk.linear_logp, LINEAR, {"mean_logits": True}),
    "logp sparse": (rk.linear_logp, LINEAR, {"filter_eps": 0.01}),
    "topk": (rk.linear_topk, LINEAR, {"k": 3, "entropy": True}),
    "gather": (rk.linear_gather, ("hidden", "head", "ids", "mask"), {}),
    "support": (rk.linear_support, (*LINEAR, "ids"), {}),
    "divergence": (rk.linear_divergence, TWO_HEADS, {"divergence": rk.losses.JSD()}),
    "divergence loss": (divergence_loss, (*TWO_HEADS, "weights", "seq_ids"), {"divergence": rk.losses.ForwardKL()}),
    "with_sampled": (rk.supports.with_sampled, ("teacher", "target"), {}),
    "intersection": (rk.supports.intersection, ("teacher", "ids"), {}),
    "probability_band": (rk.supports.probability_band, ("teacher", "target"), {"low": 0.1, "high": 0.3}),
    "special_token_mask": (rk.masks.special_token_mask, ("tokens", "mask", "seq_ids"), {"special_ids": [3]}),
    "final_eos_mask": (rk.masks.final_eos_mask, ("tokens", "mask", "seq_ids"), {"eos_ids": list(range(V))}),
    "top_entropy_mask": (rk.masks.top_entropy_mask, ("entropy", "mask"), {"fraction": 1.0}),
    "before_stray_mask": (lambda entropy, **more: rk.masks.before_stray_mask(entropy, **more), ("entropy", "mask", "seq_ids"), {}),
}  # fmt: skip
# name → loss, the tensors that it gets from hidden states
IN_SWEEP: dict[str, tuple[rk.TokenLoss, tuple[str, ...]]] = {
    "fused": (Weighted(), ("advantages", "topk_weights", "teacher")),
    "fused sequences": (Weighted(**SEQ), ("advantages", "topk_weights", "teacher", "seq_ids")),
    "rlad": (rk.losses.RLAD(topk=TAIL, topk_coef=0.5), ("old_logp", "advantages", "teacher", "seq_ids")),
    "cross entropy": (rk.losses.CrossEntropy(z_loss=0.1), ("weights",)),
    "label smoothing": (rk.losses.CrossEntropy(label_smoothing=0.1, normalize_weights=True), ("weights",)),
    "sdpo": (rk.losses.SDPO(), ("old_logp", "teacher")),
    "linear top-K": (rk.losses.TopKKL(), ("teacher",)),
    "linear top-K tail": (TAIL, ("teacher",)),
    "linear gspo": (rk.losses.GSPO(clip=(0.2, 0.2)), ("old_logp", "advantages", "seq_ids")),
}  # fmt: skip
# name → loss, the tensors that it gets, log-probs among them
ON_SCORES: dict[str, tuple[rk.TokenLoss, tuple[str, ...]]] = {
    "grpo": (rk.losses.GRPO(reference=rk.losses.Reference(0.1)), (*SAMPLED, "ref_logp", "rollout_logp")),
    "grpo sequences": (rk.losses.GRPO(**SEQ), (*SAMPLED, "seq_ids")),
    "trrd": (rk.losses.TRRD(), (*ANCHORED, "seq_ids")),
    "cispo": (rk.losses.CISPO(), SAMPLED),
    "sapo": (rk.losses.SAPO(), (*SAMPLED, "seq_ids")),
    "gspo": (rk.losses.GSPO(clip=(0.2, 0.2)), (*SAMPLED, "seq_ids")),
    "opd": (
        rk.losses.OPD(gamma=0.9, extrapolation=2), ("logp", "old_logp", "teacher_logp", "base_logp", "mask", "seq_ids"),
    ),
    "mopd": (rk.losses.MOPD(), ("logp", "rollout_logp", "teacher_logp", "mask", "seq_ids")),
    "kdrl": (rk.losses.KDRL(teach="wrong-groups"), (*FLAGGED, "group_ids")),
    "srpo": (rk.losses.SRPO(), FLAGGED),
    "hdpo": (rk.losses.HDPO(), (*FLAGGED, "group_ids")),
    "rlsd": (rk.losses.RLSD(), ANCHORED),
    "sdar": (rk.losses.SDAR(), ANCHORED),
    "top-K": (rk.losses.TopKKL("jsd"), ("topk_logp", "teacher", "mask")),
    "top-K sequences": (rk.losses.TopKKL(normalize="tail", **SEQ), ("topk_logp", "teacher", "mask", "seq_ids")),
    "top-K policy gradient": (rk.losses.TopKPG(), ("topk_logp", "old_topk_logp", "teacher", "mask")),
    "top-K advantage": (rk.losses.TopKAdvantage(), ("logp", "old_logp", "topk_logp", "teacher", "mask")),
    "sampled tail": (rk.losses.SampledTailKL(), ("topk_logp", "logp", "target", "teacher", "mask")),
    "eopd": (rk.losses.EOPD(), ("logp", "topk_logp", "old_logp", "teacher", "mask")),
}  # fmt: skip
CALLS |= {k: (swept, (*LINEAR, *tensors), {"loss": loss}) for k, (loss, tensors) in IN_SWEEP.items()}
CALLS |= {k: (given_scores, tensors, {"loss": loss}) for k, (loss, tensors) in ON_SCORES.items()}


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
            given[k] = rk.TopK._make(None if t is None else token(t) for t in x) if isinstance(x, rk.TopK) else x
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
    given = {"advantages": torch.tensor(2.0), "topk_weights": at, "teacher": rk.TopK(ids, at)}
    out = rk.linear_loss(hidden, rk.LMHead(weight), torch.tensor(1), Weighted(), **given)
    logp = (weight.double() @ hidden.double()).log_softmax(0)
    want = -6 * logp[1] + (at * logp[:K]).sum()
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-5, atol=1e-5)
