"""Supports of up to 4,096 ids: scores and losses against the whole vocabulary; what is searched for ends at 1,024."""

from __future__ import annotations

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.losses import TopKKL
from tests.conftest import INTERPRET
from tests.sweeps import leaf, problem, relative

N, K, V = (1, 2100, 2300) if INTERPRET else (3, 4096, 4200)  # interpreted, a slot costs milliseconds; the blocks are the same
LAST = K - 90


def given() -> tuple[rk.LMHead, torch.Tensor, torch.Tensor, rk.TopK]:
    """Student's hidden states and targets, and a teacher's support in any order, with an empty slot and a duplicate."""
    p = problem(n=N, v=V, bias=False)
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(N)]).int()
    ids[:, 7], ids[:, LAST] = -1, ids[:, 3]
    ids[0, 5] = p.target[0]
    teacher = rk.linear_support(torch.randn(N, 16), rk.LMHead(torch.randn(V, 16)), ids, target=p.target)
    return p.head, p.hidden, p.target, teacher


def test_log_probs_and_tail() -> None:
    head, hidden, y, teacher = given()
    scores = rk.linear_logp(hidden, head, y, topk_ids=teacher.ids, entropy=True, tail=True)
    h, w = (leaf(x.detach().double()) for x in (hidden, head.weight))
    lq = (h @ w.T).log_softmax(1)
    ids = teacher.ids.long()
    at = torch.where(ids < 0, -torch.inf, lq.gather(1, ids.clamp_min(0)))
    outside = torch.ones(N, V, dtype=torch.bool).scatter(1, ids.clamp_min(0), False)
    outside[:, 0] |= ~(ids == 0).any(1)
    tail = torch.where(outside, lq, -torch.inf).logsumexp(1)
    assert torch.allclose(scores.topk_logp.double(), at, atol=1e-5)
    assert torch.allclose(scores.tail_logp.double(), tail, atol=1e-4)
    gathered = rk.linear_gather(hidden, head, teacher.ids)
    assert torch.allclose((gathered - scores.lse.unsqueeze(1)).double(), at, atol=1e-4)
    cotangent = torch.randn(N, K)
    loss = (cotangent * scores.topk_logp.clamp_min(-1e4)).sum() + scores.tail_logp.sum() + scores.entropy.sum() + scores.logp.sum()
    want = (cotangent * at.clamp_min(-1e4)).sum() + tail.sum() - (lq.exp() * lq).sum() + lq.gather(1, y[:, None]).sum()
    for got, exact in zip(torch.autograd.grad(loss, (hidden, head.weight)), torch.autograd.grad(want, (h, w)), strict=True):
        assert relative(got, exact) <= 1e-5


@pytest.mark.parametrize("direction", ["forward"] if INTERPRET else ["forward", "reverse"])
@pytest.mark.parametrize("normalize", ["tail"] if INTERPRET else ["both", "teacher", "none", "tail"])
def test_a_teacher(normalize: str, direction: str) -> None:
    head, hidden, y, teacher = given()
    loss = TopKKL(direction, normalize=normalize)
    out = rk.linear_loss(hidden, head, y, loss, teacher=teacher)
    h, w = (leaf(x.detach().double()) for x in (hidden, head.weight))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        ids = teacher.ids[i].tolist()
        use = [k for k, v in enumerate(ids) if v >= 0 and ids.index(v) == k]
        z = (h[i] @ w.T).log_softmax(0)
        lq, lp = z[[ids[k] for k in use]], teacher.logp[i, use].double()
        if normalize == "both":
            lq = lq.log_softmax(0)
        if normalize in ("both", "teacher"):
            lp = lp.log_softmax(0)
        if normalize == "tail":
            assert teacher.tail_logp is not None
            out_of = torch.ones(V, dtype=torch.bool)
            out_of[[ids[k] for k in use]] = False
            lq, lp = torch.cat([lq, z[out_of].logsumexp(0).view(1)]), torch.cat([lp, teacher.tail_logp[i].double().view(1)])
        total = total + ((lq.exp() * (lq - lp)).sum() if direction == "reverse" else (lp.exp() * (lp - lq)).sum())
    want = total / N
    assert torch.allclose(out.loss.double(), want, rtol=1e-4)
    grads = torch.autograd.grad(out.loss, (hidden, head.weight)), torch.autograd.grad(want, (h, w))
    for got, exact in zip(*grads, strict=True):
        assert relative(got, exact) <= 1e-4


@pytest.mark.slow_interpreted
def test_what_is_too_large() -> None:
    head, hidden, y, teacher = given()
    more = torch.cat([teacher.ids, teacher.ids[:, :1]], 1)
    with pytest.raises(ValueError, match=r"^linear_logp: topk_ids .*1 <= K <= min\(4096, vocab_size=4200\), got K=4097"):
        rk.linear_logp(hidden, head, y, topk_ids=more)
    with pytest.raises(ValueError, match=r"^TopKKL: teacher.ids .*1 <= K <= 4096, got K=4097"):
        rk.linear_loss(hidden, head, y, TopKKL(), teacher=rk.TopK(more, more.float()))
    with pytest.raises(ValueError, match=r"^linear_topk: k must have 1 <= K <= min\(1024, vocab_size=4200\), got K=1025"):
        rk.linear_topk(hidden, head, 1025)
