"""The Triton loss kernels against float64 formulas: interpreted on the CPU, or compiled where a GPU is."""

import pytest
import torch

from rlad_kernels.backends.triton.clipped_ratio import ESTIMATORS, clipped_ratio
from rlad_kernels.backends.triton.topk_kl import topk_kl
from rlad_kernels.core.modes import numbers
from tests.oracles import gradient, hold, kl_estimate, surrogate, truncated_kl
from tests.test_triton_rows import I32, INF, ULP, near
from tests.test_triton_rows import pytestmark as pytestmark


@pytest.mark.parametrize("teacher", [None, INF, 0.5], ids=["grpo", "trrd", "clamped"])
@pytest.mark.parametrize(("dual", "estimator"), [(0.0, "k1"), *((1.5, name) for name in ESTIMATORS[1:])])
def test_clipped_ratio(teacher, dual, estimator):
    s = -3 * torch.rand(300)
    o, t, b, a = s + 0.4 * torch.randn(300), s + 0.8 * torch.randn(300), s + 0.3 * torch.randn(300), torch.randn(300)
    coef = 0.0 if estimator == "k1" else 0.7
    given = numbers(0.3, 0.1, 0.28, teacher or INF, dual, coef)
    loss, grad, rows = clipped_ratio(s, o, t if teacher else None, a, b, given, estimator)

    def formula(s, o, t, a, b):
        anchor = {"t": t, "alpha": 0.3, "clamp": teacher} if teacher else {}
        return surrogate(s, o, a, clip=(0.1, 0.28), dual=dual or None, **anchor) + coef * kl_estimate(s, b, estimator)

    hold(loss, formula, s, o, t, a, b)
    hold(grad, gradient(formula), s, o, t, a, b)
    hold(rows[5], lambda s, b: kl_estimate(s, b, estimator), s, b)
    hold(rows[4], lambda s, t: s - t if teacher else s * 0, s, t)
    gap = 0.3 * (s - o) + 0.7 * (s - t).clamp(-teacher, teacher) if teacher else s - o
    assert torch.equal(rows[0].bool(), (a < 0) & (gap.exp() < 0.9))
    assert torch.equal(rows[1].bool(), (a > 0) & (gap.exp() > 1.28))


def test_clipped_ratio_at_the_edges():
    s = torch.tensor([0.0, -1.0, -1.0, -1.0, -INF])
    o = torch.tensor([-200.0, -1.2, -1.2, -1.2, -1.0])
    t = torch.tensor([-1.0, -INF, float("nan"), INF, -1.0])
    a = torch.tensor([0.0, -1.0, -1.0, -1.0, 1.0])
    for teacher, alpha in ((None, 1.0), (t, 0.5), (t, 1.0)):
        loss, grad, rows = clipped_ratio(s, o, teacher, a, None, numbers(alpha, 0.2, 0.2, INF, 0.0, 0.0), "k3")
        r = (s - o).exp()[1]
        near(loss, torch.stack([r * 0, r, r, r, r * 0]), 4 * ULP)
        near(grad, loss.double(), 0)
        assert rows[6].tolist() == ([0, 0, 0, 0, 0] if teacher is None else [0, 1, 1, 1, 0])
        assert (rows[4, 1:4] == 0).all()


def test_small_kl_estimates_keep_their_digits():
    w = torch.logspace(-6, 1, 200).repeat(2) * torch.tensor([[1.0], [-1.0]]).repeat(1, 200).flatten()
    zero = torch.zeros(400)
    _, grad, rows = clipped_ratio(-w, zero, None, zero, zero, numbers(1.0, 0.2, 0.2, INF, 0.0, 1.0), "k3")
    w = w.double()
    value = torch.where(w.abs() < 1e-4, w**2 / 2 + w**3 / 6, torch.expm1(w) - w)
    near(rows[5], value, value * 8 * ULP)
    near(grad, -torch.expm1(w), torch.expm1(w).abs() * 8 * ULP)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize(("name", "given"), [("both", 0), ("teacher", 0), ("none", 0), ("tail", 0), ("tail", 1)])
@pytest.mark.parametrize("k", [1, 5, 40, 200])
def test_topk_kl(k, name, given, direction):
    ids = torch.rand(6, 300).argsort(1)[:, :k].to(I32)
    lq, lp = (2 * torch.randn(2, 6, 300)).log_softmax(-1).gather(-1, ids.long().expand(2, -1, -1))
    tail_q, tail_p = torch.log1p(-torch.stack([lq, lp]).double().exp().sum(-1)).float()
    if k > 1:
        ids[0, 3:], ids[1, k - 1], ids[2] = -1, ids[1, 0], -1
        lp[3, 0], lp[3, 1], lp[3, 2] = float("nan"), -INF, INF
    tail_p[4], tail_p[5] = -INF, float("nan")
    tails = (tail_q if given else None, tail_p if name == "tail" else None)
    loss, d_topk, d_tail, rows = topk_kl(lq, ids, lp, *tails, direction, name)
    valid = torch.stack([(ids[:, :i] != ids[:, i : i + 1]).all(1) for i in range(k)], 1) & (ids >= 0) & lp.isfinite()

    def formula(lq, tail_q, lp, tail_p):
        own = tail_q if given else torch.log1p(-torch.where(valid, lq, -INF).exp().sum(1))
        return truncated_kl(lq, own, ids, lp, tail_p, direction, name)

    exact = (lq, tail_q, lp, torch.where(tail_p.isfinite(), tail_p, -INF))
    hold(loss, formula, *exact)
    hold(d_topk, gradient(formula), *exact)
    hold(d_tail, gradient(lambda tail, lq, *rest: formula(lq, tail, *rest) + 0 * tail), tail_q, lq, *exact[2:])
    assert (d_topk[~valid] == 0).all()
    near(rows[0], torch.where(valid, lq, -INF).double().exp().sum(1), 8 * ULP)
    near(rows[1], torch.where(valid, lp, -INF).double().exp().sum(1), 8 * ULP)
    assert torch.equal(rows[2].bool(), ((ids >= 0) & ~lp.isfinite()).any(1) | (tail_p.isnan() & (name == "tail")))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_small_divergences_keep_their_digits(direction):
    lp = torch.randn(6, 50) - 3
    lq = lp + 0.014 * torch.randn(6, 50)
    ids = torch.arange(50, dtype=I32).repeat(6, 1)
    loss, grad, *_ = topk_kl(lq, ids, lp, None, None, direction, "both")
    p, q = lp.double().log_softmax(1), lq.double().log_softmax(1)
    want = (q.exp() * (q - p)).sum(1) if direction == "reverse" else (p.exp() * (p - q)).sum(1)
    slope = q.exp() * (q - p - want[:, None]) if direction == "reverse" else q.exp() - p.exp()
    near(loss, want, want * 64 * ULP / 0.014)  # δ ≈ 0.014 with a few ulp of 1
    near(grad, slope, p.exp() * 16 * ULP)


def test_topk_kl_at_the_edges():
    lq = torch.tensor([[-INF, -0.5], [-1e-8, -20.0], [-1.0, -2.0], [-INF, -INF]])
    lp, ids = torch.tensor([[-1.0, -0.6]]).repeat(4, 1), torch.tensor([[3, 7]], dtype=I32).repeat(4, 1)
    ids[2] = -1
    for name in ("both", "teacher", "none", "tail"):
        loss, grad, _, rows = topk_kl(lq, ids, lp, None, -torch.ones(4) if name == "tail" else None, "reverse", name)
        assert loss.isfinite().all() & grad.isfinite().all()
        assert (loss[2] == 0) & (grad[2:] == 0).all() & (grad[0, 0] == 0)
        assert loss[3] == (1 if name == "tail" else 0)  # log 1 − log e^{-1} in the bucket
        assert rows[3].tolist() == ([0, 1, 0, 0] if name == "tail" else [0, 0, 0, 0])
    near(grad[1, 0], lq.exp()[1, 0].double() * (lq[1, 0].double() + 2), 4 * ULP)  # nothing flows through a clamped tail
    assert topk_kl(lq, ids, lp, None, None, "forward", "none")[0].isposinf().tolist() == [True, False, False, True]
