"""Supports that hold almost everything: a tail mass down to e^-200, where a sum relative to the largest logit underflows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.backends import reference
from tests.oracles import truncated_kl
from tests.sweeps import EPS32, Problem, leaf, problem, relative

N, K = 9, 3


def far(depth: float, dtype: torch.dtype = torch.float32) -> Problem:
    """The support lies about ``depth`` nats above all other tokens; two targets are inside, one is far below even the others."""
    p = problem(n=N, v=130, k=K, sigma=1.0, dtype=dtype)
    ids = torch.randperm(120)[:K]
    bias = p.bias.detach().clone()
    bias[ids] += depth
    bias[125] -= depth / 2
    p.bias, p.ids = leaf(bias), ids.expand(N, K).clone()
    p.target = torch.randint(120, 125, (N,))
    p.target[0], p.target[4], p.target[7] = ids[0], ids[2], 125
    return p


def slack(p: Problem) -> float:
    """Error of a log-prob: a few roundings of the largest logit."""
    return 8 * EPS32 * p.twin().logits().abs().max().item()


DEPTHS = [16.0, 60.0, 110.0, 200.0]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("tile", [None, (4, 37)], ids=["one_tile", "tiles"])
def test_linear_logp_and_topk(depth: float, tile: tuple[int, int] | None) -> None:
    p = far(depth)
    t = p.twin()
    want = t.expected()
    with rk.set_tile(*(tile or (None, None))):
        out = rk.linear_logp(p.hidden, p.head, p.target, topk_ids=p.ids, entropy=True, tail=True, extras=("is_top1",))
        top = rk.linear_topk(p.hidden, p.head, K, target=p.target, entropy=True)
    assert want.tail_logp.max() < 12 - depth
    for name in ("logp", "lse", "topk_logp", "tail_logp"):
        assert (getattr(out, name) - getattr(want, name)).abs().max() <= slack(p), name
    assert torch.equal(out.extras["is_top1"], want.is_top1)
    for got in (out.entropy, top.entropy):
        assert (got - want.entropy).abs().max() <= slack(p)
    assert (top.tail_logp - want.tail_logp).abs().max() <= slack(p)
    assert (top.target_logp - want.logp).abs().max() <= slack(p)

    cotangent = torch.randn(N)
    got = torch.autograd.grad((out.tail_logp * cotangent).sum(), p.leaves)
    for g, e in zip(got, torch.autograd.grad((want.tail_logp * cotangent).sum(), t.leaves), strict=True):
        assert relative(g, e) <= 2 * slack(p)


def tailed(p: Problem, teacher: rk.TopK, direction: str) -> tuple[Tensor, list[Tensor]]:
    """The truncated KL with a tail bucket in float64, as a mean, and its gradients."""
    t = p.twin()
    s = t.expected()
    token = truncated_kl(s.topk_logp, s.tail_logp, p.ids, teacher.logp.double(), teacher.tail_logp.double(), direction, "tail")
    loss = token.mean()
    return loss, list(torch.autograd.grad(loss, t.leaves))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("way", ["linear", "log-probs", "sweep"])
def test_a_kl_with_a_tail_bucket(depth: float, direction: str, way: str) -> None:
    p = far(depth)
    logp = torch.randn(N, K + 1).log_softmax(1)  # the teacher puts about a quarter outside
    teacher = rk.TopK(p.ids.int(), logp[:, :K], tail_logp=logp[:, K], target_logp=torch.full((N,), -1.0))
    kl = rk.losses.TopKKL(direction, normalize="tail")
    if way == "linear":
        loss = rk.linear_loss(p.hidden, p.head, p.target, kl, teacher=teacher).loss
    elif way == "log-probs":
        s = rk.linear_logp(p.hidden, p.head, p.target, topk_ids=p.ids, tail=True)
        loss = kl(s, teacher=teacher).loss
    else:
        rlad, zero = rk.losses.RLAD(topk=kl, topk_coef=1.0, reduction="token-mean"), torch.zeros(N)
        loss = rk.linear_loss(p.hidden, p.head, p.target, rlad, old_logp=zero, advantages=zero, teacher=teacher).loss
    want, grads = tailed(p, teacher, direction)
    assert abs(loss.item() - want.item()) <= slack(p) * max(1, want.item())
    got = torch.autograd.grad(loss, p.leaves)
    for g, e in zip(got, grads, strict=True):
        assert relative(g, e) <= 2 * slack(p)


def test_a_support_of_everything_has_no_tail_and_no_gradient() -> None:
    p = problem(n=4, v=6)
    p.ids = torch.arange(6).expand(4, 6)
    out = rk.linear_logp(p.hidden, p.head, p.target, topk_ids=p.ids, tail=True)
    assert (out.tail_logp == -torch.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.tail_logp.sum(), p.leaves))
    z = p.twin().logits()
    assert (out.logp - reference.token_scores(z, p.target).logp).abs().max() <= 1e-5
