"""Reference's clamp and weight: values and gradients by hand, what they are in expectation, both roads, and 200 nats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import CISPO, DPPO, GMPO, GRPO, GSPO, MOPD, PSPO, REINFORCE, SAPO, TRRD, VESPO, ClipCov, Reference
from rlad_kernels.losses.ratio.kl import KL_ESTIMATORS
from tests.extremes import GAPS, S, exact, hold, tokens
from tests.test_both_roads import World, in_the_sweep, on_log_probs, same

SUM = rk.Reduction(denominator=1.0)
LOSSES = (GRPO, CISPO, SAPO, GSPO, GMPO, PSPO, DPPO, VESPO, ClipCov, TRRD)


def term(reference: Reference, s: Tensor, ref: Tensor, old: Tensor, loss: type = GRPO) -> tuple[Tensor, Tensor]:
    """The KL term of each token, each a sequence, and its derivative."""
    leaf = s.detach().clone()[:, None].requires_grad_()
    given: dict[str, Any] = {"old_logp": old[:, None], "advantages": torch.zeros(len(s)), "ref_logp": ref[:, None]}
    made = loss(reference=reference)
    given |= {"teacher_logp": given["old_logp"]} if "teacher_logp" in made.needs else {}
    out = made(leaf, **given, reduction=SUM)
    assert out.metrics["kl_ref"] == pytest.approx((out.token_loss.mean() / (reference.coef or 1)).item(), rel=1e-5, nan_ok=True)
    return out.token_loss.flatten(), torch.autograd.grad(out.loss, leaf)[0].flatten()


@pytest.mark.parametrize("estimator", [k for k in KL_ESTIMATORS if k != "k1"])
def test_where_a_clamp_binds_there_is_no_gradient(estimator: str) -> None:
    x = torch.tensor([-4.0, -2.9, -1.0, 0.5, 1.4, 2.9, 4.0])
    zero = torch.zeros_like(x)
    value, slope = term(Reference(2.0, estimator, clamp=(3.0, 1.0)), x, zero, x)
    leaf = x.clamp(-3, 3).requires_grad_()
    free = KL_ESTIMATORS[estimator](leaf)
    want = torch.autograd.grad(free.sum(), leaf)[0]
    torch.testing.assert_close(value, 2 * free.detach().clamp(-1, 1))
    live = (x.abs() <= 3) & (free.detach().abs() <= 1)
    assert live.any() and not live.all()
    torch.testing.assert_close(slope, torch.where(live, 2 * want, 0))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_a_weighted_estimate_is_its_formula(estimator: str, loss: type) -> None:
    torch.manual_seed(0)
    s, ref, old = (-torch.rand(3, 9) * 3).unbind(0)
    value, slope = term(Reference(0.5, estimator, weighted=True), s, ref, old, loss)
    leaf = s.double().requires_grad_()
    x = leaf - ref.double()
    k = x if estimator == "k1" else (-x).exp() - 1 + x
    want = 0.5 * (leaf - old.double()).exp() * k
    torch.testing.assert_close(value, want.detach().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, torch.autograd.grad(want.sum(), leaf)[0].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.cpu
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_in_expectation_it_is_the_reverse_kl_on_anyones_samples(estimator: str) -> None:
    """Every token of a vocabulary, weighed by its probability under π_old: value and gradient, exactly; without the weight not."""
    z, ref, old = torch.randn(3, 9, dtype=torch.float64).unbind(0)
    logits = z.requires_grad_()
    logq, logref, logold = logits.log_softmax(0), ref.log_softmax(0), old.log_softmax(0)
    kl = (logq.exp() * (logq - logref)).sum()
    want = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    given: dict[str, Any] = {"old_logp": logold, "advantages": torch.zeros(9), "ref_logp": logref}
    seen = {}
    for weighted in (True, False):
        loss = GRPO(reference=Reference(1.0, estimator if weighted else "k3", weighted=weighted))
        each = [loss(logq[i], **{k: v[i] for k, v in given.items()}).loss for i in range(9)]
        total = sum((p * x for p, x in zip(logold.exp(), each, strict=True)), torch.zeros(()))
        seen[weighted] = total, torch.autograd.grad(total, logits, retain_graph=True)[0]
    torch.testing.assert_close(seen[True][0], kl)
    torch.testing.assert_close(seen[True][1], want)
    assert (seen[False][1] - want).abs().max() > 0.01


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_clamped_and_weighted(estimator: str) -> None:
    """Where the clamp binds the gradient is the weight's alone."""
    x = torch.tensor([-4.0, -1.0, 0.5, 4.0])
    old = x - 0.7
    value, slope = term(Reference(1.0, estimator, clamp=(3.0, 1.5), weighted=True), x, torch.zeros(4), old)
    r, near = torch.tensor(0.7).exp(), x.clamp(-3, 3)
    k = (near if estimator == "k1" else (-near).exp() - 1 + near).clamp(-1.5, 1.5)
    live = torch.tensor([False, True, True, False])
    torch.testing.assert_close(value, r * k)
    torch.testing.assert_close(slope, torch.where(live, r * (x + 1 if estimator == "k1" else x), r * k))


@pytest.mark.parametrize("weighted", [False, True])
def test_200_nats(weighted: bool) -> None:
    s, (gap, far) = tokens(GAPS, GAPS)
    reference = Reference(2.0, "k3", clamp=None if weighted else (20.0, 10.0), weighted=weighted)
    out = GRPO(reference=reference)(s, old_logp=S - gap, advantages=torch.zeros(len(s)), ref_logp=S - far, reduction=SUM)
    slope = torch.autograd.grad(out.loss, s)[0]
    if not weighted:
        near = far.clamp(-20, 20)
        assert torch.equal(out.token_loss, 2 * (torch.expm1(-near) + near).clamp(max=10))
        assert not slope.any()  # every gap here is 0 or beyond a bound
        return
    x, r = far.double().cpu(), gap.double().cpu().exp()
    hold(out.token_loss, 2 * torch.where(x < -45, (gap.double().cpu() - x).exp(), r * (torch.expm1(-x) + x)))
    hold(slope, 2 * r * x)


def test_exact_is_the_same_formula() -> None:
    """The derivative r·x is autograd's of r·k3."""
    s, (gap, far) = tokens((-3.0, 0.0, 2.0), (-3.0, 0.5, 2.0))
    out = GRPO(reference=Reference(1.0, weighted=True))(
        s, old_logp=S - gap, advantages=torch.zeros(len(s)), ref_logp=S - far, reduction=SUM
    )

    def formula(x: Tensor, i: int) -> Tensor:
        d, g = (x - (S - y[i].double().cpu()) for y in (far, gap))
        return (g.exp() * (torch.expm1(-d) + d)).sum()

    value, want = exact(formula, s)
    hold(out.token_loss, value)
    hold(torch.autograd.grad(out.loss, s)[0], want, scale=64)


@pytest.mark.parametrize("loss", [GRPO, GSPO, CISPO, TRRD])
@pytest.mark.parametrize("reference", [Reference(0.3, "k3", weighted=True), Reference(0.3, "k2", clamp=(0.2, 0.05))])
def test_both_roads_agree(reference: Reference, loss: type) -> None:
    world, made = World(), replace(loss(), reference=reference)
    same(world.call(in_the_sweep, made), world.call(on_log_probs, made), made)


def test_it_compiles() -> None:
    loss = GRPO(reference=Reference(0.3, "k3", clamp=(20.0, 10.0), weighted=True))
    given = {k: -torch.rand(2, 3) for k in ("old_logp", "ref_logp")} | {"advantages": torch.randn(2)}
    call = torch.compile(lambda s: loss(s, **given).loss, fullgraph=True, backend="aot_eager")
    found = []
    for f in (call, lambda s: loss(s, **given).loss):
        leaf = given["old_logp"].clone().requires_grad_()
        found.append(torch.autograd.grad(f(leaf), leaf)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPO(reference=Reference(1.0, clamp=(0.0, 1.0))), r"GRPO: reference\.clamp must be \(log-ratio, estimate\)"),
        (lambda: GRPO(reference=Reference(1.0, "k2", weighted=True)), r"reference\.estimator must be one of \('k1', 'k3'\) if it"),
        (lambda: GRPO(reference=Reference(1.0, "k1")), "'k1' has zero expected gradient"),
        (lambda: MOPD(reference=Reference(1.0, weighted=True)), "MOPD: reference must not be weighted"),
        (lambda: REINFORCE(reference=Reference(1.0, weighted=True)), "REINFORCE: reference must not be weighted"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
