"""This library, a row a mode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk
from bench.inputs import SUPPORT, Inputs
from bench.providers.base import Provider, jsd, logits, policy_gradient, teacher_states

K = 64
FILTER_EPS = 2.0**-14
EXACT, SPARSE = (1e-5, 3e-3), (2e-2, 2e-2)


def _logp(x: Inputs, advantage: Tensor, weight: Tensor, filter_eps: float = 0.0) -> Tensor:
    return -(rk.linear_logp(x.hidden, rk.LMHead(weight), x.target, filter_eps=filter_eps).logp * advantage).mean()


def linear_logp(x: Inputs) -> Tensor:
    return _logp(x, x.advantage, x.weight)


def sparse(x: Inputs) -> Tensor:
    return _logp(x, x.advantage, x.weight, FILTER_EPS)


def kept(x: Inputs) -> Tensor:
    """In TRL's memory on a GPU, 2.8 GB at 8,192 tokens of Qwen3; on a CPU's 1,024 tokens all rows."""
    return -(rk.linear_logp(x.hidden, rk.LMHead(x.weight), x.target, keep="2GiB").logp * x.advantage).mean()


def frozen(x: Inputs) -> Tensor:
    return _logp(x, x.advantage, x.weight.detach())


def frozen_truth(x: Inputs) -> Tensor:
    return policy_gradient(replace(x, weight=x.weight.detach()))


def _half(x: Inputs) -> Tensor:
    """Every second sequence without advantage, as a group whose answers are all right or all wrong."""
    return x.advantage * ((torch.arange(len(x.advantage), device=x.advantage.device) // x.sequence) % 2)


def half(x: Inputs) -> Tensor:
    return _logp(x, _half(x), x.weight)


def half_truth(x: Inputs) -> Tensor:
    return policy_gradient(replace(x, advantage=_half(x)))


def scoring(x: Inputs) -> Tensor:
    with torch.no_grad():
        return linear_logp(x)


def scoring_truth(x: Inputs) -> Tensor:
    with torch.no_grad():
        return policy_gradient(x)


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(rk.TokenLoss):
    """−advantage·logp."""

    needs = ("advantages",)

    def tokens(self, scores: rk.TokenScores, *, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -scores.logp * advantages, {}


def fused(x: Inputs, filter_eps: float = 0.0) -> Tensor:
    head = rk.LMHead(x.weight)
    return rk.linear_loss(x.hidden, head, x.target, PolicyGradient(), advantages=x.advantage, filter_eps=filter_eps).loss


def fused_sparse(x: Inputs) -> Tensor:
    return fused(x, FILTER_EPS)


def topk(x: Inputs) -> Tensor:
    top = rk.linear_topk(x.hidden, rk.LMHead(x.weight), K, target=x.target)
    assert top.target_logp is not None and top.tail_logp is not None
    return top.logp.mean() + top.tail_logp.mean() - (top.target_logp * x.advantage).mean()


def topk_truth(x: Inputs) -> Tensor:
    with torch.no_grad():
        top = logits(x).log_softmax(-1).topk(K).values
        return top.mean() + (1 - top.exp().sum(-1)).log().mean() + policy_gradient(x)


def topk_kl(x: Inputs) -> Tensor:
    loss, teacher = rk.losses.TopKKL(normalize="both"), rk.TopK(x.ids, x.teacher_logp)
    return rk.linear_loss(x.hidden, rk.LMHead(x.weight), x.target, loss, teacher=teacher).loss


def topk_kl_truth(x: Inputs) -> Tensor:
    student = logits(x).gather(1, x.ids).log_softmax(-1)
    return (student.exp() * (student - x.teacher_logp)).sum(-1).mean()


def divergence(x: Inputs) -> Tensor:
    head, teacher = rk.LMHead(x.weight), rk.LMHead(x.weight.detach())
    return rk.linear_divergence_loss(x.hidden, head, teacher_states(x), teacher, rk.losses.JSD()).loss


RLAD = rk.losses.RLAD(alpha=0.5, topk=rk.losses.TopKKL("reverse", normalize="tail"), topk_coef=0.5, reduction="token-mean")


def _given(x: Inputs, device: torch.device) -> dict[str, Any]:
    """A teacher's top 16 and the log-probs that the tokens were sampled with."""
    inside, outside = x.teacher_logp.split((16, SUPPORT - 16), 1)
    teacher = rk.TopK(x.ids[:, :16], inside, tail_logp=outside.logsumexp(1), target_logp=inside[:, 0]).to(device)
    return {"teacher": teacher, "old_logp": x.old_logp.to(device), "advantages": x.advantage.to(device)}


def rlad(x: Inputs) -> Tensor:
    return rk.linear_loss(x.hidden, rk.LMHead(x.weight), x.target, RLAD, **_given(x, x.hidden.device)).loss


def rlad_truth(x: Inputs) -> Tensor:
    """The loss on log-probs, on the CPU: Triton takes no float64."""
    given = _given(x, torch.device("cpu"))
    logp = logits(x).log_softmax(-1).cpu()
    top = logp.gather(1, given["teacher"].ids)
    tail = (1 - top.exp().sum(1)).log()
    return RLAD(rk.TokenScores(logp.gather(1, x.target.cpu()[:, None])[:, 0], topk_logp=top, tail_logp=tail), **given).loss


PROVIDERS = (
    Provider("linear_logp", linear_logp, "ours, log-probs, any loss after them", 4, 7, bound=EXACT),
    Provider("fused", fused, "ours, the loss inside the sweep", 3, 6, bound=EXACT),
    Provider("kept", kept, "ours, linear_logp, keep 2GiB", 3, 6, bound=EXACT),
    Provider("half", half, "ours, linear_logp, half of the sequences without advantage", 2.5, 4.5, half_truth, EXACT),
    Provider("frozen", frozen, "ours, linear_logp, frozen head", 2, 4, frozen_truth, EXACT),
    Provider("sparse", sparse, "ours, linear_logp, filter_eps 2⁻¹⁴, peaked logits", 4, 7, bound=SPARSE, peaked=True),
    Provider("sparse_flat", sparse, "ours, linear_logp, filter_eps 2⁻¹⁴, flat logits", 4, 7, bound=SPARSE),
    Provider("fused_sparse", fused_sparse, "ours, fused, filter_eps 2⁻¹⁴, peaked logits", 3, 6, bound=SPARSE, peaked=True),
    Provider("topk", topk, "ours, linear_topk, K 64, no gradient", 1, 2, topk_truth, EXACT),
    Provider("topk_kl", topk_kl, "ours, renormalised top-K loss, K 32", 0, 0, topk_kl_truth, EXACT),
    Provider("divergence", divergence, "ours, full-vocabulary JSD to a teacher", 4, 11, jsd, EXACT),
    Provider("rlad", rlad, "ours, fused, RLAD with a teacher's top 16", 3, 6, rlad_truth, EXACT),
    Provider("scoring", scoring, "ours, linear_logp under no_grad", 1, 2, scoring_truth, EXACT),
)
