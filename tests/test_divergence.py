"""linear_divergence and its loss: value and gradient against float64, limits, small divergences, teachers, masks, products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.backends import reference
from rlad_kernels.core.divergence import Divergence
from rlad_kernels.engine.tiles import Tiles
from rlad_kernels.losses.vocab.kl import JSD, ForwardKL, Jeffreys, ReverseKL, SkewKL, SkewRKL
from rlad_kernels.losses.vocab.power import AlphaBeta, AlphaDivergence, Hellinger, PowerDivergence
from rlad_kernels.losses.vocab.weighed import AKL, TAID, ToDi
from tests.conftest import INTERPRET
from tests.exact_divergences import ALONE
from tests.methods.divergence import DIVERGENCES, VALUES, kl
from tests.oracles import budgets, hold, within
from tests.sweeps import Problem, leaf, problem, relative

TOKENS = (2, 6) if INTERPRET else (4, 16)
# interpreted, each formula is tests/test_methods.py's matter
SWEPT = ("reverse_kl", "gkd_jsd") if INTERPRET else tuple(DIVERGENCES)
slow = pytest.mark.skipif(INTERPRET, reason="facts of formulas and of Python, which other tests hold to this backend; slow here")
HEADS: dict[str, dict[str, Any]] = {"bias": {}, "softcap": {"softcap": 8.0, "logit_scale": 1.2, "temperature": 0.7}}


def teacher(shape: tuple[int, ...], v: int, d: int = 10, dtype: torch.dtype = torch.float32, **options: Any) -> Problem:
    return problem(shape=shape, d=d, v=v, dtype=dtype, sigma=1.5, **options)


def grads(loss: Tensor, p: Problem) -> list[Tensor]:
    return list(torch.autograd.grad(loss, p.leaves))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", SWEPT)
def test_value_and_gradient(name: str, head: str) -> None:
    """Any cotangent; heads of other widths, scales and biases; whole and in small tiles, and the loss as a weighted sum."""
    p, t = problem(shape=TOKENS, d=14, v=53, sigma=0.8, **HEADS[head]), teacher(TOKENS, 53, temperature=1.3)
    p.mask = torch.rand(TOKENS) > 0.2
    g = torch.randn(TOKENS)
    g[0, 0] = 0

    def formula() -> list[Tensor]:
        q, lp = p.twin(), t.twin().logits().log_softmax(-1)
        out = torch.where(p.mask, VALUES[name](q.logits().log_softmax(-1), lp), 0)
        return [out, out * g, *grads((out * g).sum(), q)]

    bounded, weighted, *slopes = budgets(formula)
    args = (p.hidden, p.head, t.hidden, t.head, DIVERGENCES[name])
    for tile in ((3, 20),) if INTERPRET else ((None, None), (3, 20)):
        with rk.set_tile(*tile):
            found = rk.linear_divergence(*args, mask=p.mask)
            within(found, *bounded, "value")
            for a, slope in zip(grads((found * g).sum(), p), slopes, strict=True):
                within(a, *slope, "gradient")
    out = rk.linear_divergence_loss(*args, mask=p.mask, weights=g, reduction=rk.Reduction(denominator=1.0))
    within(out.token_loss, *weighted, "token loss")
    for a, slope in zip(grads(out.loss, p), slopes, strict=True):
        within(a, *slope, "gradient of the loss")


@pytest.mark.cpu
@pytest.mark.parametrize("name", sorted({*DIVERGENCES} - {"todi", "akl", "taid"}))  # these hold a part of themselves constant
def test_gradcheck(name: str) -> None:
    p, t = problem(n=3, d=4, v=9, dtype=torch.float64, sigma=1.0, softcap=5.0), teacher((3,), 9, dtype=torch.float64)

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return rk.linear_divergence(hidden, rk.LMHead(weight, bias, softcap=5.0), t.hidden, t.head, DIVERGENCES[name])

    assert torch.autograd.gradcheck(f, p.leaves)


def pair(divergence: Divergence, p: Problem, t: Problem, scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    found = rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, divergence, scale=scale)
    return found.detach(), grads(found.sum(), p)


LIMITS = [
    (AlphaBeta(1.0, 0.0), ForwardKL(), 1e-5),
    (AlphaBeta(0.0, 1.0), ReverseKL(), 1e-5),
    (AlphaBeta(1.0, 1e-4), ForwardKL(), 2e-3),
    (AlphaDivergence(1.0), ForwardKL(), 1e-5),
    (AlphaDivergence(0.0), ReverseKL(), 1e-5),
    (PowerDivergence(0.0), ForwardKL(), 1e-5),
    (PowerDivergence(-1.0), ReverseKL(), 1e-5),
    (PowerDivergence(0.3), AlphaBeta(1.3, -0.3), 1e-6),
    (JSD(0.0), ForwardKL(), 0.0),
    (JSD(1.0), ReverseKL(), 0.0),
    (JSD(1e-5), ForwardKL(), 1e-2),
    (SkewKL(0.0), ForwardKL(), 0.0),
    (SkewKL(1e-6), ForwardKL(), 1e-2),
    (SkewRKL(0.0), ReverseKL(), 0.0),
    (SkewRKL(1e-6), ReverseKL(), 1e-2),
    (ToDi(1e-5), Jeffreys(), 1e-3),
    (TAID(1.0), ForwardKL(), 0.0),
]


@slow
@pytest.mark.parametrize("left, right, tolerance", LIMITS, ids=[f"{a} {b}" for a, b, _ in LIMITS])
def test_limits(left: Divergence, right: Divergence, tolerance: float) -> None:
    p, t = problem(shape=(3,), d=8, v=40, sigma=1.0), teacher((3,), 40)
    scale = 1e5 if left == JSD(1e-5) else 1.0  # which tends to β times the forward KL
    (a, da), (b, db) = pair(left, p, t, scale), pair(right, p, t)
    assert relative(a, b) <= tolerance
    assert all(relative(x, y) <= tolerance for x, y in zip(da, db, strict=True))


@slow
def test_taid_at_0_has_nothing_to_learn() -> None:
    p, t = problem(shape=(3,), d=8, v=40), teacher((3,), 40)
    found, gradients = pair(TAID(0.0), p, t)
    assert (found == 0).all()
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("name", SWEPT)
def test_identical_models_with_other_paddings_are_exactly_0_apart(name: str) -> None:
    p = problem(shape=(5,), d=8, v=37, sigma=4.0, bias=False)
    longer = torch.cat([p.weight.detach(), torch.randn(27, 8) * 50])
    shorter = torch.cat([p.weight.detach(), torch.randn(3, 8) * 50]).requires_grad_()
    head, other = rk.LMHead(shorter, vocab_size=37), rk.LMHead(longer, vocab_size=37)
    found = rk.linear_divergence(p.hidden, head, p.hidden, other, DIVERGENCES[name])
    assert (found == 0).all()
    for g in torch.autograd.grad(found.sum(), (p.hidden, shorter)):
        assert (g == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "name", ["reverse_kl"] if INTERPRET else ["forward_kl", "reverse_kl", "gkd_jsd", "skew_rkl", "todi", "hellinger", "akl"]
)
def test_low_precision_gradients(name: str, dtype: torch.dtype) -> None:
    n = 8 if INTERPRET else 24
    p, t = problem(shape=(n,), d=24, v=101, dtype=dtype, sigma=1.5), teacher((n,), 101)
    loss = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, DIVERGENCES[name]).loss
    q, lp = p.twin(), t.twin().logits().log_softmax(-1)
    for a, e in zip(grads(loss, p), grads(VALUES[name](q.logits().log_softmax(-1), lp).mean(), q), strict=True):
        assert a.dtype == dtype
        assert relative(a, e) <= 3e-3


@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_reverse_kl_gradient_of_close_models_in_bfloat16(size: float) -> None:
    """d_hidden and d_weight to 5e-3 down to a KL of 1e-4: plain −Σq·w in float32 would lose the value's digits first."""
    p = problem(shape=(8 if INTERPRET else 32,), d=32, v=201, dtype=torch.bfloat16, sigma=2.0, bias=False)
    t = Problem(p.hidden.detach().clone(), p.weight.detach().clone(), None, p.target, p.ids)
    near = leaf((p.weight.detach().float() * (1 + 0.9 * size**0.5 * torch.randn(p.weight.shape))).bfloat16())
    p = Problem(p.hidden, near, None, p.target, p.ids)
    found = rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, ReverseKL())
    q, lp = p.twin(), t.twin().logits().log_softmax(-1)
    want = kl(q.logits().log_softmax(-1), lp)
    assert size / 10 < want.mean() < size * 10
    assert relative(found, want) <= 1e-3
    for a, e in zip(grads(found.sum(), p), grads(want.sum(), q), strict=True):
        assert relative(a, e) <= 5e-3


@pytest.mark.parametrize("name", ["reverse_kl"] if INTERPRET else ["forward_kl", "reverse_kl", "gkd_jsd", "abkd", "todi"])
@pytest.mark.parametrize("level", [-120.0, 150.0])
def test_far_away_logits(name: str, level: float) -> None:
    """Every logit of both sides near ``level``: only differences matter."""
    p, t = problem(shape=(4,), d=8, v=40, bias=False), teacher((4,), 40)
    shift = torch.full((40,), level)
    student = rk.LMHead(p.weight, shift.clone().requires_grad_())
    found = rk.linear_divergence(p.hidden, student, t.hidden, rk.LMHead(t.weight, shift), DIVERGENCES[name])

    def formula(*sides: Tensor) -> Tensor:
        return VALUES[name](*((h @ w.T + level).log_softmax(-1) for h, w in (sides[:2], sides[2:])))

    hold(found, formula, *(x.detach() for x in (p.hidden, p.weight, t.hidden, t.weight)))
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (p.hidden, p.weight, student.bias)))


@pytest.mark.parametrize("name", SWEPT)
def test_a_column_dead_on_both_sides_counts_nothing(name: str) -> None:
    p, t = problem(shape=(4,), d=8, v=40), teacher((4,), 40)
    dead = torch.arange(40) == 11
    with torch.no_grad():
        p.bias[dead] = t.bias[dead] = -torch.inf
    found = rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, DIVERGENCES[name])
    less = [rk.LMHead(x.weight[~dead], x.bias[~dead]) for x in (p, t)]
    want = rk.linear_divergence(p.hidden, less[0], t.hidden, less[1], DIVERGENCES[name])
    assert torch.allclose(found, want, rtol=1e-5, atol=1e-6)
    assert all(g.isfinite().all() for g in grads(found.sum(), p))


def test_masked_rows_may_hold_anything() -> None:
    p, t = problem(shape=(2, 5), d=8, v=40), teacher((2, 5), 40)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
    given = {"divergence": ReverseKL(), "mask": mask}
    clean = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, **given)
    want = grads(clean.loss, p)
    with torch.no_grad():
        p.hidden[~mask] = torch.nan
        t.hidden[~mask] = torch.nan
    weights = torch.where(mask, 1.0, torch.nan)
    for compaction in (True, False):
        with rk.set_compaction(compaction):
            out = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, weights=weights, **given)
            assert torch.allclose(out.loss, clean.loss)
            assert (out.token_loss[~mask] == 0).all()
            for a, e in zip(grads(out.loss, p), want, strict=True):
                assert torch.allclose(a, e, atol=1e-7)
            token = rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, **given)
            for a, e in zip(grads((token * weights / mask.sum()).sum(), p), want, strict=True):
                assert torch.allclose(a, e, atol=1e-7)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_do(n: int) -> None:
    p, t = problem(shape=(n,), d=8, v=40), teacher((n,), 40)
    out = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ForwardKL(), mask=torch.zeros(n))
    assert out.loss == 0
    assert all((g == 0).all() for g in grads(out.loss, p))
    token = rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, ForwardKL(), mask=torch.zeros(n))
    assert all((g == 0).all() for g in grads(token.sum(), p))


@slow
def test_reductions_scale_and_weights() -> None:
    p, t = problem(shape=(2, 5), d=8, v=40, temperature=2.0), teacher((2, 5), 40, temperature=2.0)
    mask, weights = torch.rand(2, 5) > 0.3, torch.rand(2, 5)
    token = rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, ForwardKL(), mask=mask)
    out = rk.linear_divergence_loss(
        p.hidden, p.head, t.hidden, t.head, ForwardKL(), mask=mask, weights=weights, scale=4.0, reduction="seq-mean-token-mean"
    )
    want = 4 * torch.stack([(token * weights)[i][mask[i]].mean() for i in range(2)]).mean()
    assert torch.allclose(out.loss, want)
    assert torch.allclose(out.token_loss, (4 * token * weights).detach())
    for a, e in zip(grads(3 * out.loss, p), grads(3 * want, p), strict=True):
        assert relative(a, e) <= 1e-6
    scaled = rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, ForwardKL(), mask=mask, scale=4.0)
    assert torch.allclose(scaled, 4 * token)


class Flops:
    """Products of a call in units of one 2·N·V of its student's width, by what the matrix products were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total = 0
        product, add = Tiles._product, Tiles.add_product

        def counted(tiles: Tiles, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
            self.total += a.shape[0] * a.shape[1] * b.shape[1]
            return product(tiles, a, b, *rest)

        def counted_add(tiles: Tiles, into: Tensor, a: Tensor, b: Tensor, *rest: Any, **more: Any) -> None:
            self.total += a.shape[0] * a.shape[1] * b.shape[1]
            add(tiles, into, a, b, *rest, **more)

        monkeypatch.setattr(Tiles, "_product", counted)
        monkeypatch.setattr(Tiles, "add_product", counted_add)

    def take(self) -> int:
        total, self.total = self.total, 0
        return total


@slow
def test_products(monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, v = 12, 8, 40
    p, t = problem(shape=(n,), d=d, v=v), teacher((n,), v, d=d)
    flops, one = Flops(monkeypatch), n * d * v
    loss = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ForwardKL()).loss
    loss.backward()
    assert flops.take() == 4 * one
    rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, ForwardKL()).sum().backward()
    assert flops.take() == 6 * one
    frozen = rk.LMHead(p.weight.detach(), p.bias.detach())
    rk.linear_divergence(p.hidden, frozen, t.hidden, t.head, ForwardKL()).sum().backward()
    assert flops.take() == 3 * one
    rk.linear_divergence_loss(p.hidden, frozen, t.hidden, t.head, ForwardKL()).loss.backward()
    assert flops.take() == 3 * one
    rk.linear_divergence_loss(p.hidden.detach(), p.head, t.hidden, t.head, ForwardKL()).loss.backward()
    assert flops.take() == 3 * one
    with torch.no_grad():
        rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ForwardKL())
    assert flops.take() == 2 * one
    half = torch.arange(n) < n // 2
    rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ForwardKL(), mask=half).loss.backward()
    assert flops.take() == 2 * one
    rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ForwardKL(), weights=half.float()).loss.backward()
    assert flops.take() == 2 * one


def test_frozen_head_gradient() -> None:
    p, t = problem(shape=(7,), d=8, v=40), teacher((7,), 40)
    g = torch.randn(7)
    (want,) = torch.autograd.grad((rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, ForwardKL()) * g).sum(), p.hidden)
    frozen = rk.LMHead(p.weight.detach(), p.bias.detach())
    (got,) = torch.autograd.grad((rk.linear_divergence(p.hidden, frozen, t.hidden, t.head, ForwardKL()) * g).sum(), p.hidden)
    assert relative(got, want) <= 1e-6


def test_several_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ w_i·D(p_i, q), widths and heads of their own; a teacher whose weights are 0 in a chunk costs nothing there."""
    n, v = 4, 40
    p = problem(shape=(n,), d=8, v=v)
    ts = [teacher((n,), v, d=6), teacher((n,), v, d=12, softcap=9.0), teacher((n,), v, d=8)]
    first = torch.arange(n) < 2
    weights = [torch.where(first, 0.5, 0.0), torch.where(first, 0.0, torch.rand(n)), 0.3]
    heads, hiddens = [t.head for t in ts], [t.hidden for t in ts]
    call = {"divergence": ReverseKL(), "teacher_weights": weights}
    singles = [rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, ReverseKL()) for t in ts]
    want = sum(w * d for w, d in zip(weights, singles, strict=True))
    assert isinstance(want, Tensor)
    want_grads = grads(want.mean(), p)
    flops = Flops(monkeypatch)
    with rk.set_tile(rows=2):
        out = rk.linear_divergence_loss(p.hidden, p.head, hiddens, heads, **call)
    if p.hidden.device.type == "cpu":  # elsewhere nobody may read the weights
        assert flops.take() == n * v * (3 * 8 + 8) + 2 * v * (6 + 12)
    assert torch.allclose(out.token_loss, want.detach(), rtol=1e-5)
    for a, e in zip(grads(out.loss, p), want_grads, strict=True):
        assert relative(a, e) <= 1e-5
    token = rk.linear_divergence(p.hidden, p.head, hiddens, heads, **call)
    for a, e in zip(grads(token.mean(), p), want_grads, strict=True):
        assert relative(a, e) <= 1e-5


@pytest.mark.cpu
def test_a_teacher_in_float64_beside_a_student_in_float32() -> None:
    p, t = problem(shape=(5,), d=8, v=40), teacher((5,), 40, dtype=torch.float64)
    found = rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, ForwardKL())
    want = kl(t.logits().log_softmax(-1), p.twin().logits().log_softmax(-1))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), want.detach(), rtol=1e-5)


@pytest.mark.cpu
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float64), (torch.float64, torch.float32)], ids=["bf16-f64", "f64-f32"])
def test_a_teacher_in_another_dtype_has_probabilities_that_add_up_to_one(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Where a logit of 46 is rounded after its normaliser was made, each p is off by 2e-6, and what is near 1 is off by that."""
    z = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    z[:, 7] = 500.0
    student = rk.LMHead(torch.eye(50, dtype=dtypes[0])[:, :8] * 8)
    head = rk.LMHead(torch.eye(50, dtype=dtypes[1]), softcap=30.0, temperature=torch.linspace(0.6, 0.7, 64))
    hidden = torch.eye(64, dtype=dtypes[0])[:, :8]
    value = rk.linear_divergence(hidden, student, z.to(dtypes[1]), head, Hellinger())
    exact = (30 * torch.tanh(z.double() / 30) / torch.linspace(0.6, 0.7, 64).double().unsqueeze(1)).log_softmax(1)
    want = 1 - (0.5 * (exact + (hidden.double() @ student.weight.double().T).log_softmax(1))).exp().sum(1)
    assert (value.double() - want).abs().max() < 8 * 2.0**-24, "some ulps of one"


def test_teachers_receive_no_gradient() -> None:
    p, t = problem(shape=(3,), d=8, v=40), teacher((3,), 40)
    rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ForwardKL()).loss.backward()
    rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, ForwardKL()).sum().backward()
    assert t.hidden.grad is None
    assert t.weight.grad is None


@dataclass(frozen=True)
class Chernoff(Divergence):
    """Chernoff's coefficient, nowhere in the library."""

    share: float

    def values(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return -torch.logsumexp(self.share * teacher_logp + (1 - self.share) * student_logp, -1)


class Columns(Divergence):
    def values(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return student_logp - teacher_logp


def test_a_divergence_of_ones_own() -> None:
    """Value and gradient by autograd on chunks, reduced and for each token."""
    chernoff = Chernoff(0.3)
    p, t = problem(shape=(9,), d=8, v=40, softcap=7.0), teacher((9,), 40)
    mask = torch.arange(9) % 3 > 0
    with rk.set_tile(rows=4):
        out = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, chernoff, mask=mask)
    q = p.twin()
    want = chernoff.values(q.logits().log_softmax(-1), t.twin().logits().log_softmax(-1))[mask].mean()
    assert torch.allclose(out.loss.double(), want, rtol=1e-5)
    want_grads = grads(want, q)
    for a, e in zip(grads(out.loss, p), want_grads, strict=True):
        assert relative(a, e) <= 1e-5
    token = rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, chernoff, mask=mask)
    assert torch.allclose(token, out.token_loss)
    for a, e in zip(grads(token.sum() / mask.sum(), p), want_grads, strict=True):
        assert relative(a, e) <= 1e-5
    weights = torch.arange(9.0) % 2
    both = ([t.hidden, t.hidden], [t.head, t.head], chernoff)
    weighed = rk.linear_divergence(p.hidden, p.head, *both, mask=mask, teacher_weights=[weights, 1 - weights])
    assert torch.allclose(weighed, token)  # a teacher of weight 0 adds nothing to a row that another has
    with torch.no_grad():
        again = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, chernoff, mask=mask)
    assert torch.allclose(again.loss, out.loss)
    with pytest.raises(ValueError, match=r"Columns: values must return one value a row, shape \(9,\), got \(9, 40\)"):
        rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, Columns())


def test_akl_counts_ties_as_head() -> None:
    """Teacher ½, ¼, ¼ at μ = ½: the head is the first token; at μ = ¾ the two that tie come in together."""
    lp, lq = torch.tensor([[[0.5, 0.25, 0.25]], [[0.2, 0.5, 0.3]]]).log()
    gap = torch.tensor([0.3, 0.25, 0.05])
    half, more = (AKL(mu).kind().coefficients for mu in (0.5, 0.76))
    assert half is not None and more is not None
    assert torch.allclose(half(lq, lp, ALONE)[:, 0], torch.stack([gap[0], gap[1:].sum()]) / gap.sum())
    assert torch.allclose(more(lq, lp, ALONE)[:, 0], torch.tensor([1.0, 0.0]), atol=1e-6)
    assert torch.allclose(half(lp, lp, ALONE)[:, 0], torch.tensor([0.5, 0.5]))


def test_two_runs_are_bitwise_equal() -> None:
    p, t = problem(shape=(9,), d=8, v=40), teacher((9,), 40)
    runs = []
    for _ in range(2):
        out = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, JSD())
        runs.append([out.loss, out.token_loss, *grads(out.loss, p)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_backward_of_the_loss_runs_once() -> None:
    p, t = problem(shape=(3,), d=8, v=40), teacher((3,), 40)
    loss = rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, ForwardKL()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_divergence_loss: backward has run already"):
        loss.backward()


def test_every_divergence_is_tested_here() -> None:
    found = {x for x in vars(rk.losses).values() if isinstance(x, type) and issubclass(x, Divergence)}
    assert found - {Divergence} == {type(x) for x in DIVERGENCES.values()}


def test_the_reference_agrees_with_the_papers() -> None:
    lq, lp = torch.randn(2, 3, 20, dtype=torch.float64).log_softmax(-1)
    for name, divergence in DIVERGENCES.items():
        kind = divergence.kind()
        assert kind is not None
        if name == "akl":
            continue
        found = kind.factor * reference.divergence(lq, lp, kind.family, kind.numbers, kind.forward, kind.reverse)
        assert torch.allclose(found, VALUES[name](lq, lp), rtol=1e-10), name


@pytest.mark.parametrize("lam", [2 / 3, 0.5, 3.0])
def test_power_divergence_with_the_teacher_and_the_student_exchanged(lam: float) -> None:
    p, t = problem(n=7, bias=False), problem(n=7, bias=False)
    mine, other = (PowerDivergence(x) for x in (-1 - lam, lam))
    found = rk.linear_divergence(p.hidden.detach(), p.head, t.hidden.detach(), t.head, mine)
    want = rk.linear_divergence(t.hidden.detach(), t.head, p.hidden.detach(), p.head, other)
    assert torch.allclose(found, want, rtol=1e-4)
