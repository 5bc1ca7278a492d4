"""DAC-KL: the band on a support is the band on the vocabulary; the span term is that of whole distributions, within spans."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels import supports
from rlad_kernels.losses import SpanCorrelation, TopKKL

B, T, V = 2, 5, 30
EYE = rk.LMHead(torch.eye(V))
DAC_KL = TopKKL("forward", normalize="none")


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.5), (0.1, 1.0), (0.3, 0.31)])
def test_a_support_of_one_over_the_lower_bound_holds_the_band(low: float, high: float) -> None:
    z, t = (2 * torch.randn(B, T, V)).requires_grad_(), 2 * torch.randn(B, T, V)
    y = torch.randint(V, (B, T))
    assert rk.METHODS["dac_kl"].loss == DAC_KL
    teacher = rk.linear_topk(t, EYE, min(V, int(1 / low) + 1), target=y)
    teacher = supports.probability_band(supports.with_sampled(teacher, y), low, high, target=y)
    out = rk.linear_loss(z, EYE, y, DAC_KL, teacher=teacher)
    lq, lp = z.double().log_softmax(-1), t.double().log_softmax(-1)
    inside = (lp.exp() >= low) & (lp.exp() <= high) | (torch.arange(V) == y[..., None])
    want = torch.where(inside, lp.exp() * (lp - lq), 0).sum(-1)
    assert torch.allclose(out.token_loss.double(), want, atol=1e-5)
    got, exact = (torch.autograd.grad(x, z)[0] for x in (out.loss, want.mean()))
    assert torch.allclose(got, exact, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_spans_of_whole_distributions(packed: bool) -> None:
    z, t = torch.randn(B, T, V).requires_grad_(), torch.randn(B, T, V)
    spans = torch.tensor([[7, 7, 7, 2, 2], [2, -1, -1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    ids, kept = rk.spans.span_ids(spans, mask)
    given: dict[str, Any] = {"teacher": rk.linear_topk(t, EYE, V), "spans": torch.where(spans < 0, -1, ids), "mask": mask}
    hidden, y = z, torch.zeros(B, T, dtype=torch.int64)
    if packed:
        given = {**{k: given[k].flatten() for k in ("spans", "mask")}, "teacher": rk.linear_topk(t.flatten(0, 1), EYE, V)}
        hidden, y = z.flatten(0, 1), y.flatten()
    out = rk.linear_loss(hidden, EYE, y, SpanCorrelation(), **given)
    p, q = t.double().softmax(-1), z.double().softmax(-1)
    linked = [(0, 0), (0, 1), (0, 3)]  # not over a span's end, nor a row's, nor to what is masked or in no span
    want = {at: (p[at] * p[at[0], at[1] + 1] - q[at] * q[at[0], at[1] + 1]).square().sum() for at in linked}
    token = out.token_loss.view(B, T)
    assert {tuple(at) for at in token.nonzero().tolist()} == set(want)
    assert all(torch.allclose(token[at].double(), x, rtol=1e-5) for at, x in want.items())
    got, exact = (torch.autograd.grad(x, z)[0] for x in (out.loss, sum(want.values()) / mask.sum()))
    assert torch.allclose(got, exact, atol=1e-8)
    assert kept.sum() == 7


def test_a_student_that_is_the_teacher_has_none() -> None:
    z = torch.randn(B, T, V, requires_grad=True)
    teacher = rk.linear_topk(z.detach(), EYE, 4)
    out = rk.linear_loss(z, EYE, torch.zeros(B, T).long(), SpanCorrelation(), teacher=teacher, spans=torch.zeros(B, T).long())
    assert out.loss <= 1e-12


def test_a_slot_that_one_side_lacks_or_that_is_not_finite() -> None:
    ids = torch.tensor([[4, 9, -1, 6], [9, 4, 4, 7]])
    lp = torch.tensor([[0.5, 0.25, 0.9, 0.1], [0.5, 0.25, 0.9, 0.1]]).log()
    lp[0, 3] = torch.nan
    lq = torch.tensor([[0.2, 0.0, 0.9, 0.1], [0.4, 0.3, 0.9, 0.1]]).log().requires_grad_()
    out = SpanCorrelation()(lq, teacher=rk.TopK(ids, lp), spans=torch.tensor([5, 5]))
    want = (0.5 * 0.25 - 0.2 * 0.3) ** 2 + (0.25 * 0.5 - 0.0 * 0.4) ** 2  # of id 4, and of 9
    assert torch.allclose(out.token_loss, torch.tensor([want, 0.0]))
    assert out.metrics["invalid_teacher"] == 0.5
    gradient = torch.autograd.grad(out.loss, lq)[0]
    assert gradient.isfinite().all()
    assert not gradient[0, 2:].any() and not gradient[1, 2:].any()
