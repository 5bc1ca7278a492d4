"""Gaps of up to 200 nats between the policies: values and gradients of every loss are the formula's, and never NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import GRPO, Reference
from rlad_kernels.losses.methods import METHODS
from rlad_kernels.losses.ratio.cispo import CISPO
from rlad_kernels.losses.ratio.gspo import GSPO
from rlad_kernels.losses.ratio.sapo import SAPO
from rlad_kernels.losses.ratio.trrd import TRRD
from rlad_kernels.losses.support.sampled_tail import SampledTailKL
from tests.extremes import GAPS, SIGNS, S, exact, hold, tokens
from tests.methods import on_scores, ratio
from tests.oracles import kl_estimate, straight_through, surrogate

BATCHWIDE = ("clip_cov", "kl_cov")  # what a token costs depends on all others
FAMILY = [name for name, method in METHODS.items() if method.family == "ratio" and name not in BATCHWIDE]
SUM = rk.Reduction(denominator=1.0)
WEIGHED = ("tis", "icepop", "seq_tis", "seq_mis")  # by e^{o − μ}, which may underflow beside an r that overflows


@pytest.mark.parametrize("name", FAMILY)
def test_every_method_is_its_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratio, "LENGTH", 1)
    needs = METHODS[name].needs
    policies = [k for k in needs if k.endswith("_logp")]
    gaps = GAPS if len(policies) < 3 else (-200.0, 0.0, 200.0)
    s, columns = tokens(*[gaps] * len(policies), SIGNS)
    given: dict[str, Any] = {k: S - x for k, x in zip(policies, columns, strict=False)}
    pool = {"advantages": columns[-1], "correct": torch.zeros(len(s)).bool(), "group_ids": torch.arange(len(s))}
    given |= {k: x for k, x in pool.items() if k in needs}
    options = ratio.OPTIONS.get(name, {}) | ({"denominator": 1.0} if name == "dr_grpo" else {})
    out = on_scores(METHODS[name], logp=s, **given, **options | {"denominator": 1.0})
    slope = torch.autograd.grad(out.loss, s)[0]
    slope = torch.where(slope.abs() == torch.finfo(slope.dtype).max, slope * 2, slope)  # of a detached weight that is infinite

    def alone(x: Tensor, i: int) -> Tensor:
        row = {k: v[i : i + 1].cpu() for k, v in given.items()}
        row = {k: v.double() if v.is_floating_point() else v for k, v in row.items()}
        return ratio.ORACLES[name](logp=x, **row, **options, mask=torch.ones(1, 1).bool())

    value, want = exact(alone, s)
    if name in WEIGHED:
        gone = (given["old_logp"] - given["rollout_logp"]).flatten().cpu() < -87
        value, want = torch.where(gone, 0, value), torch.where(gone, 0, want)
        kept = ~gone.to(s.device)
        hold(out.token_loss.flatten()[kept], value[~gone])
        hold(slope.flatten()[kept], want[~gone])
        return
    hold(out.token_loss, value)
    hold(slope, want, scale=8.0 if name == "sapo" else 1.0)  # σ(1 − σ) cancels where σ rounds to 1


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3+", "k3++", "k4", "k5"])
@pytest.mark.parametrize("loss", [GRPO, CISPO, GSPO])
def test_every_estimator_of_the_reference(loss: type, estimator: str) -> None:
    s, (gap,) = tokens(GAPS)
    given = {"old_logp": s.detach(), "advantages": torch.zeros(len(s)), "ref_logp": S - gap}
    out = loss(reference=Reference(0.5, estimator))(s, **given, reduction=SUM)
    value, want = exact(lambda x, i: 0.5 * kl_estimate(x, (S - gap[i : i + 1]).cpu().double(), estimator).sum(), s)
    if estimator == "k3++":  # k3 + (1 − e^{−x}), which float64 cannot add either
        want = 0.5 * gap.cpu().double()
    hold(out.token_loss, value)
    hold(torch.autograd.grad(out.loss, s)[0], want)


@pytest.mark.parametrize("tau", [1e-8, 1e-3, 1.0, 1e4])
def test_sapos_gate_saturates_where_its_temperature_says(tau: float) -> None:
    s, (gap, sign) = tokens((*GAPS, 1.0, 16.0, 25.0), SIGNS)
    out = SAPO(temperatures=(tau, tau))(s, old_logp=S - gap, advantages=sign, reduction=SUM)

    def gate(x: Tensor, i: int) -> Tensor:
        a, o = sign[i].double().cpu(), S - gap[i].double().cpu()
        return (-4 / tau * torch.sigmoid(tau * torch.expm1(x - o)) * a).sum()

    value, want = exact(gate, s)
    hold(out.token_loss, value)
    hold(torch.autograd.grad(out.loss, s)[0], want, scale=4 / tau + 64)


@pytest.mark.parametrize("loss", [CISPO, GRPO, SAPO, GSPO])
def test_a_token_without_mass_has_no_loss(loss: type) -> None:
    """r = 0: e^s·s → 0, not 0·(−∞)."""
    s = torch.full((2, 1), -math.inf).requires_grad_()
    out = loss()(s, old_logp=torch.full((2, 1), -3.0), advantages=torch.tensor([1.0, 0.0]), reduction=SUM)
    assert not out.token_loss.isnan().any()
    assert torch.autograd.grad(out.loss, s)[0].flatten().tolist() == [0, 0]


@pytest.mark.parametrize("clamp", [None, 2.0, 100.0])
@pytest.mark.parametrize("values", [(-math.inf, -3.0, -2.0), (-3.0, -math.inf, -2.0), (S, S - 200, S), (S, S + 200, S - 200)])
def test_an_anchor_of_weight_zero_has_no_effect(values: tuple[float, float, float], clamp: float | None) -> None:
    """α = 0: r = e^{clamp(s − t)} whatever the old policy gave, and where the clamp binds no gradient, even if r is inf."""
    s, o, t = (torch.full((3,), x) for x in values)
    a = torch.tensor([-1.0, 0.0, 2.0])
    found = []
    for old in (o, s.clamp(min=-3)):
        leaf = s.clone().requires_grad_()
        trrd = TRRD(alpha=0.0, teacher_clamp=clamp, reduction="token-mean")
        out = trrd(leaf, old_logp=old, teacher_logp=t, advantages=a, reduction=SUM)
        found.append((out.token_loss, torch.autograd.grad(out.loss, leaf)[0]))
    gap = values[0] - values[2]
    bound = gap if clamp is None else max(min(gap, clamp), -clamp)
    r = torch.tensor(bound, dtype=torch.float64).exp()
    hold(found[0][0], torch.stack([r.clamp(min=0.8), r * 0, -2 * r.clamp(max=1.2)]))
    inside = r >= 0.8 and abs(bound) == abs(gap)
    hold(found[0][1], torch.stack([r * inside, r * 0, -2 * r * (r <= 1.2 and abs(bound) == abs(gap))]).nan_to_num())
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_the_sampled_tail_and_its_importance_weight(direction: str, unbiased: bool) -> None:
    """w and e^{−x} may both leave float32 while w·e^{−x} does not."""
    s, (old, gap) = tokens(GAPS, GAPS)
    s = s.detach().squeeze(1).requires_grad_()
    empty = torch.full((len(s), 1), -math.inf)
    teacher = rk.TopK(torch.full((len(s), 1), -1), empty, target_logp=S - gap.squeeze(1))
    given = {"target": torch.zeros(len(s)).long(), "teacher": teacher, "old_logp": S - old.squeeze(1)}
    out = SampledTailKL(direction=direction, unbiased=unbiased)(rk.TokenScores(s, topk_logp=empty), **given, reduction=SUM)

    def formula(x: Tensor, i: int) -> Tensor:
        w, d = old[i].double().cpu().exp(), gap[i].double().cpu()
        odds = (old[i].double().cpu() - d).exp()
        if direction == "reverse":
            return straight_through(x, w * d, w * (1 + d) if unbiased else w * d).sum()
        return straight_through(x, -odds * d, -odds if unbiased else w - odds).sum()

    value, want = exact(formula, s.unsqueeze(1))
    hold(out.token_loss, value)
    hold(torch.autograd.grad(out.loss, s)[0], want)


@pytest.mark.parametrize("name", ["eopd", "thunlp_opd", "verl_topk_pg"])
def test_ratios_of_the_top_k_methods(name: str) -> None:
    s, (old, gap) = tokens(GAPS, GAPS)
    n = len(s)
    if name == "thunlp_opd":
        rows = s.view(n, 1)
        teacher = rk.TopK(torch.ones(n, 1).int(), S - old - gap)  # A = log p − log q_old = −gap, of weight 1
        out, advantages = METHODS[name](rows, old_topk_logp=S - old, teacher=teacher, reduction=SUM), -gap
    else:
        support = torch.zeros(n, 1).int(), torch.zeros(n, 1)
        teacher = rk.TopK(*support, target_logp=(S - old - gap).squeeze(1), entropy=torch.zeros(n))
        student, advantages = torch.zeros(n, 1), -gap
        if name == "verl_topk_pg":  # KL of a teacher sure of a token whose log-prob here is ±gap or more: clipped to [0, 10]
            student = -gap.abs()
            advantages = student.clamp(-10, 0)
        scores = rk.TokenScores(s.squeeze(1), topk_logp=student)
        out = METHODS[name](scores, old_logp=(S - old).squeeze(1), teacher=teacher, reduction=SUM)
    slope = torch.autograd.grad(out.loss, s)[0]
    slope = torch.where(slope.abs() == torch.finfo(slope.dtype).max, slope * 2, slope)  # of a detached weight that is infinite

    def alone(x: Tensor, i: int) -> Tensor:
        dual = METHODS[name].loss.dual_clip  # type: ignore[union-attr]
        return surrogate(x, S - old[i].double().cpu(), advantages[i].double().cpu(), dual=dual).sum()

    value, want = exact(alone, s)
    hold(out.token_loss, value)
    hold(slope, want)


def test_sequence_ratios_with_gaps_of_both_signs() -> None:
    """A mean of ±200 and 0 is finite although no token's ratio is, and so are GSPO's gradients."""
    s = torch.full((2, 3), S).requires_grad_()
    gaps = torch.tensor([[200.0, -200.0, 0.0], [200.0, 200.0, 200.0]])
    out = GSPO()(s, old_logp=S - gaps, advantages=torch.tensor([1.0, 1.0]), reduction=SUM)
    assert torch.autograd.grad(out.loss, s)[0].flatten().tolist() == pytest.approx([-1 / 3] * 3 + [0] * 3)
    assert out.loss.item() == pytest.approx(-1 - 1.0004)
