"""EOPD, EMA-PG's sampled tail and candidate rewards: options beyond their presets, teachers with holes, masked tokens, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from tests.oracles import gradient, hold, straight_through, surrogate

N, V, K = 24, 11, 4


@pytest.fixture
def w() -> dict[str, Any]:
    z, t = 1.5 * torch.randn(2, N, V)
    lq, lp = z.log_softmax(1), t.log_softmax(1)
    target, ids = torch.randint(V, (N,)), lp.topk(K).indices
    at = lp.gather(1, target[:, None])[:, 0]
    teacher = rk.TopK(ids.int(), lp.gather(1, ids), target_logp=at, entropy=-(lp.exp() * lp).sum(1))
    logp, topk_logp = lq.gather(1, target[:, None])[:, 0], lq.gather(1, ids)
    noise = 0.3 * torch.randn(N)
    return {
        "logp": logp, "topk_logp": topk_logp, "old_logp": logp + noise, "old_topk_logp": topk_logp + noise[:, None],
        "target": target, "teacher": teacher,
    }  # fmt: skip


LOSSES: dict[str, Callable[..., rk.TokenLoss]] = {
    "eopd": rk.losses.EOPD,
    "tail": rk.losses.SampledTailKL,
    "pg": rk.losses.TopKPG,
    "advantage": rk.losses.TopKAdvantage,
}


def call(name: str, w: dict[str, Any], mask: Tensor | None = None, **options: Any) -> rk.losses.LossOutput:
    loss = LOSSES[name](**options)
    given = {k: w[k] for k in (*loss.needed(), *loss.takes) if k in w}
    return loss(rk.TokenScores(**{k: w[k] for k in loss.read()}), mask=mask, **given)


def teachers_kl(w: dict[str, Any]) -> Tensor:
    """EOPD's forward KL of each token."""
    forward = rk.losses.TopKKL("forward", normalize="teacher")
    return forward(w["topk_logp"], teacher=w["teacher"]).token_loss


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_sampled_tail_with_a_clipped_importance_weight(w: dict[str, Any], direction: str, unbiased: bool):
    s, t = w["logp"].requires_grad_(), w["teacher"].target_logp
    out = call("tail", w, iw_clip=(0.9, 1.1), direction=direction, unbiased=unbiased)
    outside = ~(w["teacher"].ids == w["target"][:, None]).any(1)

    def formula(s: Tensor) -> Tensor:
        x, lq, lp = (s - t).detach(), *(y.to(s.dtype) for y in (w["topk_logp"], w["teacher"].logp))
        q, p = lq.exp(), lp.exp()
        u = (-x).exp()
        if direction == "reverse":
            head, tail = (q * (lq - lp)).sum(1), straight_through(s, x, x + unbiased)
        else:
            head, tail = (p * (lp - lq)).sum(1), straight_through(s, -x * u, -u + (not unbiased))
        weight = (s - w["old_logp"]).exp().clamp(0.9, 1.1).detach()
        return head + torch.where(outside, weight * tail, 0)

    hold(out.token_loss, formula, s.detach())
    hold(torch.autograd.grad(out.loss, s)[0] * N, gradient(formula), s)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("weight", ["student", "teacher", "none"])
def test_candidate_rewards_of_every_weight(w: dict[str, Any], weight: str, renormalize: bool):
    lq, old, lp = w["topk_logp"].requires_grad_(), w["old_topk_logp"], w["teacher"].logp
    w["teacher"].ids[0, 1] = -1
    out = call("pg", w, weight=weight, renormalize=renormalize, clip=(0.1, 0.3), dual_clip=1.2)
    real = w["teacher"].ids >= 0

    def formula(lq: Tensor) -> Tensor:
        o, p = old.to(lq.dtype), lp.to(lq.dtype)
        by = {"student": o, "teacher": p, "none": 0 * o}[weight].exp() * real
        by = by / by.sum(1, keepdim=True) if renormalize else by
        return (surrogate(lq, o, -by * (o - p), clip=(0.1, 0.3), dual=1.2) * real).sum(1)

    hold(out.token_loss, formula, lq.detach())
    hold(torch.autograd.grad(out.loss, lq)[0] * N, gradient(formula), lq)


def test_what_the_teacher_lacks_leaves_its_own_term_only(w: dict[str, Any]):
    teacher = w["teacher"]
    clean = {name: call(name, w) for name in LOSSES}
    at = teacher.target_logp.clone()
    at[0], at[1] = -math.inf, math.nan
    logp, entropy = teacher.logp.clone(), teacher.entropy.clone()
    logp[2, 1], entropy[3] = math.nan, math.nan
    w["teacher"] = teacher._replace(target_logp=at, logp=logp, entropy=entropy)
    for name, before in clean.items():
        out = call(name, w)
        assert out.token_loss.isfinite().all(), name
        assert torch.equal(out.token_loss[4:], before.token_loss[4:]), name
        assert out.metrics["invalid_teacher"] > 0
    uncertain = torch.where(entropy > 0.8, teachers_kl(w), 0)
    assert torch.allclose(call("eopd", w).token_loss[:2], uncertain[:2])  # advantage 0


def test_eopd_below_the_threshold_is_ppo_on_the_teachers_log_ratio(w: dict[str, Any]):
    out = call("eopd", w, entropy_threshold=math.inf)
    ppo = rk.losses.GRPO()(w["logp"], old_logp=w["old_logp"], advantages=w["teacher"].target_logp - w["old_logp"])
    assert torch.equal(out.token_loss, ppo.token_loss)
    both = call("eopd", w, entropy_threshold=-1.0, kl_coef=0.5)
    assert torch.allclose(both.token_loss, ppo.token_loss + 0.5 * teachers_kl(w))


@pytest.mark.parametrize("name", LOSSES)
def test_what_sits_at_masked_tokens_has_no_effect(w: dict[str, Any], name: str):
    keep = torch.rand(N) < 0.6
    found = []
    for fill in (0.0, math.nan):

        def spoil(x: Tensor, fill: float = fill) -> Tensor:
            return torch.where(keep if x.dim() == 1 else keep[:, None], x, fill)

        given = {k: spoil(x) for k, x in w.items() if k not in ("target", "teacher")} | {"target": w["target"]}
        t = w["teacher"]
        given["teacher"] = rk.TopK(t.ids, spoil(t.logp), target_logp=spoil(t.target_logp), entropy=spoil(t.entropy))
        leaves = [given[k].requires_grad_() for k in ("logp", "topk_logp")]
        out = call(name, given, mask=keep)
        grads = torch.autograd.grad(out.loss, leaves, allow_unused=True, materialize_grads=True)
        assert not any(g[~keep].any() for g in grads)
        assert not out.token_loss[~keep].any()
        found.append([out.loss, out.token_loss, *grads, *out.metrics.values()])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("eopd", {"teacher": {"entropy": None}}, r"^EOPD: teacher\.entropy is None"),
    ("eopd", {"teacher": {"target_logp": None}}, r"^EOPD: teacher\.target_logp is None"),
    ("eopd", {"clip": (2.0, 0.2)}, "^EOPD: clip"),
    ("eopd", {"entropy_threshold": math.nan}, "^EOPD: entropy_threshold must be a number, got nan"),
    ("tail", {"teacher": {"target_logp": None}}, r"^SampledTailKL: teacher\.target_logp is None"),
    ("tail", {"iw_clip": (2.0, 1.0)}, "^SampledTailKL: iw_clip"),
    ("tail", {"iw_clip": (0.0, 1.0), "old_logp": None}, "^SampledTailKL: old_logp is None"),
    ("tail", {"direction": "jsd"}, "^SampledTailKL: direction"),
    ("pg", {"weight": "both"}, "^TopKPG: weight"),
    ("pg", {"dual_clip": 0.5}, "^TopKPG: dual_clip"),
    ("advantage", {"topk": "forward"}, "^TopKAdvantage: topk must be a TopKKL, got 'forward'"),
]


@pytest.mark.parametrize("name,given,named", BAD, ids=[x[2] for x in BAD])
def test_bad_input_is_named(w: dict[str, Any], name: str, given: dict[str, Any], named: str):
    teacher = w["teacher"]._replace(**given.get("teacher", {}))
    more = {k: v for k, v in given.items() if k != "teacher" and k not in w}
    with pytest.raises(ValueError, match=named):
        call(name, {**w, **{k: v for k, v in given.items() if k in w}, "teacher": teacher}, **more)
