"""Divergences that are infinite: the value says so, and no gradient is NaN or reaches another token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.divergence import Divergence
from rlad_kernels.losses.vocab.kl import JSD, ForwardKL, Jeffreys, ReverseKL, SkewRKL
from rlad_kernels.losses.vocab.power import AlphaBeta, AlphaDivergence, PowerDivergence
from rlad_kernels.losses.vocab.weighed import AKL, TAID, ToDi
from tests.conftest import INTERPRET
from tests.methods.divergence import DIVERGENCES
from tests.sweeps import Problem, leaf, relative
from tests.test_divergence import SWEPT, grads, slow, teacher

N, V = 5, 40
INFINITE = [  # where p = 0 < q
    ReverseKL(), Jeffreys(), ToDi(), AKL(), JSD(1.0), SkewRKL(0.0), AlphaBeta(0.0, 0.7), AlphaDivergence(-0.5),
    PowerDivergence(-1.0), AlphaBeta(0.0, 0.0), AlphaBeta(-0.4, 0.1),
]  # fmt: skip


def sides() -> tuple[Problem, Problem]:
    """A teacher whose logit of column 3 is −inf at token 1: −3e38·10 is beyond float32; at the others it is finite."""
    p, t = teacher((N,), V, d=8), teacher((N,), V)
    with torch.no_grad():
        t.hidden[:, -1] = torch.where(torch.arange(N) == 1, 10.0, 0.0)
        t.weight[:, -1] = torch.where(torch.arange(V) == 3, -3e38, 0.0)
    return p, t


@pytest.mark.parametrize("divergence", INFINITE[:3] + INFINITE[-2:] if INTERPRET else INFINITE, ids=str)
def test_an_infinite_token_sends_no_gradient(divergence: Divergence) -> None:
    p, t = sides()
    call = {"divergence": divergence}
    other = torch.arange(N) != 1
    want = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, mask=other, reduction=rk.Reduction(denominator=N), **call)
    want_grads = grads(want.loss, p)
    assert want.metrics["infinite"] == 0
    assert want.loss.isfinite()

    out = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, **call)
    assert torch.equal(out.token_loss.isposinf(), ~other)
    assert out.loss == torch.inf
    assert torch.allclose(out.metrics["infinite"], torch.tensor(1 / N))
    token = rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, **call)
    assert torch.equal(token.isposinf(), ~other)
    frozen = rk.LMHead(p.weight.detach(), p.bias.detach())
    ahead = rk.linear_divergence(p.hidden, frozen, t.hidden, t.head, **call)
    for found in (grads(out.loss, p), grads(token.mean(), p), torch.autograd.grad(ahead.mean(), p.hidden)):
        for a, e in zip(found, want_grads, strict=False):
            assert relative(a, e) <= 1e-6
            assert (a[1] == 0).all() or a.shape[0] == V


@pytest.mark.parametrize("name", SWEPT)
def test_bounded_or_not_no_gradient_is_nan(name: str) -> None:
    """A column forbidden to the teacher alone, and to the student alone; between both is nothing of taid's target."""
    for who in (0, 1):
        both = teacher((N,), V, d=8), teacher((N,), V)
        with torch.no_grad():
            both[who].bias[7] = -torch.inf
        p, t = both
        out = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, DIVERGENCES[name])
        assert not out.loss.isnan()
        assert all(g.isfinite().all() for g in grads(out.loss, p))
        lost = {"jeffreys", "todi", "akl", *(("reverse_kl",) if who else ("forward_kl", "power_divergence"))}
        assert out.metrics["infinite"] == (name in lost)


def test_forward_kl_keeps_the_gradient_that_it_tends_to() -> None:
    """q = 0 < p: the value is inf, the gradient q − p as at any other logit."""
    p, t = teacher((N,), V, d=8), teacher((N,), V)
    with torch.no_grad():
        p.bias[7] = -torch.inf
    out = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ForwardKL())
    assert out.metrics["infinite"] == 1
    q, lp = p.twin().logits().softmax(-1), t.twin().logits().log_softmax(-1)
    assert relative(grads(out.loss, p)[2], (q - lp.exp()).mean(0)) <= 1e-6


def test_taid_without_a_column_of_both() -> None:
    p, t = teacher((N,), V, d=8), teacher((N,), V)
    with torch.no_grad():
        p.bias[::2] = -torch.inf
        t.bias[1::2] = -torch.inf
    out = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, TAID(0.4))
    assert out.metrics["infinite"] == 1
    assert (out.token_loss == torch.inf).all()
    assert all((g == 0).all() for g in grads(out.loss, p))


@slow
def test_several_teachers_of_which_one_is_infinite() -> None:
    """Its part of the gradient is left out, the others' is there."""
    p, t = sides()
    sound = teacher((N,), V)
    call = {"divergence": ReverseKL()}
    both = [t.hidden, sound.hidden], [t.head, sound.head]
    found = rk.linear_divergence(p.hidden, p.head, *both, teacher_weights=(0.3, 0.7), **call)
    assert torch.equal(found.isposinf(), torch.arange(N) == 1)
    parts = [rk.linear_divergence(p.hidden, p.head, x.hidden, x.head, **call) for x in (t, sound)]
    (want,) = torch.autograd.grad((0.7 * parts[1][1]), p.hidden)
    (got,) = torch.autograd.grad(found[1], p.hidden)
    assert relative(got, want) <= 1e-6


class Own(Divergence):
    """The reverse KL."""

    def values(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return (student_logp.exp() * (student_logp - teacher_logp)).sum(1)


@slow
def test_ones_own_divergence() -> None:
    p, t = sides()
    out = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, Own())
    assert torch.allclose(out.metrics["infinite"], torch.tensor(1 / N))
    want = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ReverseKL())
    for a, e in zip(grads(out.loss, p), grads(want.loss, p), strict=True):
        assert relative(a, e) <= 1e-5


@slow
def test_compiled() -> None:
    p, t = sides()

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out = rk.linear_divergence_loss(hidden, rk.LMHead(weight, bias), t.hidden, t.head, ReverseKL())
        return out.loss, out.metrics["infinite"]

    loss, part = f(*p.leaves)
    compiled, compiled_part = torch.compile(f, fullgraph=True, backend="aot_eager")(*p.leaves)
    assert compiled == loss == torch.inf
    assert part == compiled_part
    assert all(torch.equal(a, e) for a, e in zip(grads(compiled, p), grads(loss, p), strict=True))


def test_the_metric_is_always_there() -> None:
    p, t = teacher((N,), V, d=8), teacher((N,), V)
    for mask in (None, torch.zeros(N), torch.arange(N) > 2):
        assert rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ForwardKL(), mask=mask).metrics.keys() == {"infinite"}
    with torch.no_grad():
        assert rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ForwardKL()).metrics == {"infinite": torch.tensor(0.0)}


def test_nan_logits_still_show() -> None:
    p, t = teacher((N,), V, d=8), teacher((N,), V)
    t = Problem(leaf(torch.where(torch.arange(N).unsqueeze(1) == 2, torch.nan, t.hidden)), t.weight, t.bias, t.target, t.ids)
    out = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ReverseKL())
    assert out.token_loss[2].isnan()
    assert out.metrics["infinite"] == 0
    assert grads(out.loss, p)[0][2].isnan().all()
