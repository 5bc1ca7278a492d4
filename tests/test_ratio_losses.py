"""GRPO and TRRD against the papers' min/clamp forms: values, gradients, KL estimators, metrics, dtypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import GRPO, LossOutput, Reference
from rlad_kernels.losses.ratio.trrd import TRRD
from tests.oracles import DTYPES, gradient, hold, kl_estimate, surrogate

SHAPE = (4, 16)
CLIPS = [
    pytest.param((0.2, 0.2), id="clip_.2_.2"),
    pytest.param((0.1, 0.28), id="clip_.1_.28"),
    pytest.param((1.0, 3.0), id="clip_1_3"),
]
SUM = rk.Reduction("token-mean", denominator=1)
ESTIMATORS = ["k2", "k3", "k3+", "k3++", "k4", "k5"]


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """s, o, t, b and Â of a trained step: ratios on both sides of both clips, signs mixed, one Â exactly 0."""
    s = -3 * torch.rand(SHAPE, dtype=torch.float64)
    o, t, b = (s + scale * torch.randn(SHAPE, dtype=torch.float64) for scale in (0.4, 0.8, 0.5))
    a = torch.randn(SHAPE, dtype=torch.float64)
    a[0, 0] = 0
    return s.to(dtype).requires_grad_(), *(x.to(dtype) for x in (o, t, b, a))


def grpo(s: Tensor, o: Tensor, a: Tensor, loss: GRPO | None = None, **more: Any) -> LossOutput:
    return (loss or GRPO())(s, old_logp=o, advantages=a, **more)


def trrd(s: Tensor, o: Tensor, t: Tensor, a: Tensor, loss: TRRD | None = None, **more: Any) -> LossOutput:
    return (loss or TRRD())(s, old_logp=o, teacher_logp=t, advantages=a, **more)


def check(out: LossOutput, formula: Any, s: Tensor, *rest: Tensor) -> None:
    """Hold token losses, their mean and the gradient of the mean to a per-token formula."""
    hold(out.token_loss, formula, s.detach(), *rest)
    hold(out.loss.detach(), lambda *x: formula(*x).mean(), s.detach(), *rest, scale=out.token_loss.abs().mean().item())
    hold(torch.autograd.grad(out.loss, s)[0] * s.numel(), gradient(formula), s, *rest)


@pytest.mark.parametrize("dual", [None, 1.5], ids=["plain", "dual_1.5"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grpo_is_the_clipped_surrogate(dtype: torch.dtype, clip: tuple[float, float], dual: float | None) -> None:
    s, o, _, _, a = draw(dtype)
    out = grpo(s, o, a, GRPO(clip=clip, dual_clip=dual))
    check(out, lambda s, o, a: surrogate(s, o, a, clip=clip, dual=dual), s, o, a)


@pytest.mark.parametrize("dual", [None, 1.5], ids=["plain", "dual_1.5"])
@pytest.mark.parametrize("clip", CLIPS[:2])
@pytest.mark.parametrize("clamp", [None, 0.5], ids=["free", "clamp_.5"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_trrd_is_the_clipped_surrogate_on_the_geometric_anchor(
    dtype: torch.dtype, alpha: float, clamp: float | None, clip: tuple[float, float], dual: float | None
) -> None:
    s, o, t, _, a = draw(dtype)
    options = TRRD(alpha=alpha, clip=clip, teacher_clamp=clamp, dual_clip=dual)
    out = trrd(s, o, t, a, options, reduction="token-mean")
    check(out, lambda s, o, t, a: surrogate(s, o, a, t, alpha=alpha, clip=clip, clamp=clamp, dual=dual), s, o, t, a)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_to_the_reference_is_added_to_each_token(dtype: torch.dtype, name: str) -> None:
    s, o, t, b, a = draw(dtype)
    kl = Reference(0.7, name)
    check(
        grpo(s, o, a, GRPO(reference=kl), ref_logp=b),
        lambda s, o, a, b: surrogate(s, o, a) + 0.7 * kl_estimate(s, b, name), s, o, a, b,
    )  # fmt: skip
    check(
        trrd(s, o, t, a, TRRD(reference=kl), ref_logp=b, reduction="token-mean"),
        lambda s, o, t, a, b: surrogate(s, o, a, t, alpha=0.5) + 0.7 * kl_estimate(s, b, name), s, o, t, a, b,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["k1", *ESTIMATORS])
def test_estimators_without_a_coefficient_are_metrics_only(name: str) -> None:
    s, o, _, b, a = draw()
    out = grpo(s, o, a, GRPO(reference=Reference(estimator=name)), ref_logp=b)
    plain = grpo(s, o, a)
    assert torch.equal(out.token_loss, plain.token_loss)
    assert torch.equal(*(torch.autograd.grad(x.loss, s)[0] for x in (out, plain)))
    hold(out.metrics["kl_ref"], lambda s, b: kl_estimate(s, b, name).mean(), s.detach(), b)


def test_k1_refuses_to_be_backpropagated() -> None:
    with pytest.raises(ValueError, match=r"^GRPO: reference\.estimator 'k1'"):
        GRPO(reference=Reference(0.1, "k1"))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_expected_gradient_of_each_estimator(name: str) -> None:
    """Ten tokens in exactly the student's proportions .1 .2 .3 .4: their mean is the expectation over the student."""
    counts = torch.tensor([1, 2, 3, 4])
    q, p = counts / 10, torch.tensor([0.4, 0.1, 0.3, 0.2])
    tokens = torch.arange(4).repeat_interleave(counts)
    z = q.log().requires_grad_()
    s, ref = z.log_softmax(0)[tokens], p.log()[tokens]
    out = grpo(s, s, torch.zeros(10), GRPO(reference=Reference(1.0, name)), ref_logp=ref)
    gap = (q / p).log()
    reverse, forward = q * (gap - (q * gap).sum()), q - p
    expected = forward if name in ("k3", "k5") else reverse
    assert (reverse - forward).abs().max() > 0.05  # the two are told apart
    # ten terms of size ≤ 3 (k5's e^{-x}·x at p/q = 4), each with a few float32 roundings, divided by ten
    assert (torch.autograd.grad(out.loss, z)[0] - expected).abs().max() <= 8 * 3 * torch.finfo(torch.float32).eps


def test_old_teacher_reference_and_advantages_receive_no_gradient() -> None:
    s, *others = draw()
    o, t, b, a = (x.requires_grad_() for x in others)
    trrd(s, o, t, a, TRRD(reference=Reference(0.1)), ref_logp=b).loss.backward()
    assert s.grad is not None
    assert s.grad.abs().max() > 0
    assert [x.grad for x in (o, t, b, a)] == [None] * 4


def test_bfloat16_log_probs_are_computed_in_float32() -> None:
    tensors = draw(torch.bfloat16)
    out = trrd(*tensors[:3], tensors[4])
    wide = [x.detach().float().requires_grad_() for x in tensors]
    same = trrd(*wide[:3], wide[4])
    assert out.loss.dtype == out.token_loss.dtype == torch.float32
    assert torch.equal(out.token_loss, same.token_loss)
    grad = torch.autograd.grad(out.loss, tensors[0])[0]
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, torch.autograd.grad(same.loss, wide[0])[0].bfloat16())


def test_outputs_are_detached_but_for_the_loss() -> None:
    s, o, t, b, a = draw()
    out = trrd(s, o, t, a, ref_logp=b)
    assert out.loss.requires_grad
    assert out.loss.shape == ()
    assert out.token_loss.shape == SHAPE
    assert not out.token_loss.requires_grad
    assert all(x.shape == () and not x.requires_grad for x in out.metrics.values())
    with torch.no_grad():
        assert torch.equal(trrd(s, o, t, a, ref_logp=b).loss, out.loss)


def test_a_teacher_that_does_not_know_a_token_is_no_distance_from_it() -> None:
    s, o, t, _, a = (x.detach() for x in draw())
    lost = torch.rand(SHAPE) < 0.3
    out = trrd(s, o, torch.where(lost, -torch.inf, t), a, TRRD(alpha=0.5))
    want = torch.where(lost, 0, s.double() - t.double()).mean()
    assert abs(out.metrics["kl_teacher"].item() - want.item()) <= 16 * torch.finfo(torch.float32).eps


def test_metrics_are_means_over_kept_tokens() -> None:
    s, o, t, b, a = draw()
    keep = torch.rand(SHAPE) < 0.6
    out = trrd(s, o, t, a, TRRD(alpha=0.5, clip=(0.1, 0.3)), mask=keep, ref_logp=b)
    s, o, t, b, a = (x.detach()[keep].double() for x in (s, o, t, b, a))
    r = (0.5 * (s - o) + 0.5 * (s - t)).exp()
    expected = {
        "clip_frac_low": ((a < 0) & (r < 0.9)).double().mean(), "clip_frac_high": ((a > 0) & (r > 1.3)).double().mean(),
        "ratio_mean": r.mean(), "ratio_max": r.max(), "kl_old": (s - o).mean(), "kl_teacher": (s - t).mean(),
        "kl_ref": ((b - s).exp() - 1 - (b - s)).mean(), "invalid_teacher": torch.tensor(0.0),
    }  # fmt: skip
    assert out.metrics.keys() == expected.keys()
    assert expected["clip_frac_low"] > 0
    assert expected["clip_frac_high"] > 0
    for name, value in expected.items():  # means of values below 4, each with a few float32 roundings
        assert abs(out.metrics[name].item() - value.item()) <= 16 * torch.finfo(torch.float32).eps, name


def test_a_metric_exists_only_where_its_inputs_do() -> None:
    s, o, t, b, a = draw()
    common = {"clip_frac_low", "clip_frac_high", "ratio_mean", "ratio_max", "kl_old"}
    teacher = {"kl_teacher", "invalid_teacher"}
    assert grpo(s, o, a).metrics.keys() == common
    assert grpo(s, o, a, ref_logp=b).metrics.keys() == common | {"kl_ref"}
    assert trrd(s, o, t, a).metrics.keys() == common | teacher
    assert trrd(s, o, t, a, ref_logp=b).metrics.keys() == common | teacher | {"kl_ref"}


@pytest.mark.parametrize("impossible", [False, True], ids=["finite", "token_without_mass"])
def test_alpha_one_is_grpo_to_the_bit(impossible: bool) -> None:
    s, o, t, _, a = draw()
    if impossible:  # 0·(s − t) must not become NaN
        s = torch.where(torch.arange(16) == 3, -torch.inf, s.detach()).requires_grad_()
    out = trrd(s, o, t, a, TRRD(alpha=1.0, dual_clip=2.0))
    plain = grpo(s, o, a, GRPO(dual_clip=2.0), reduction="seq-mean-token-mean")
    assert torch.equal(out.token_loss, plain.token_loss)
    assert torch.equal(*(torch.autograd.grad(x.loss, s)[0] for x in (out, plain)))


@pytest.mark.parametrize(
    ("sign", "edge"), [(1, math.log(1.2) / 0.5), (-1, -math.log(0.8) / 0.5)], ids=["positive_.365_nats", "negative_.446_nats"]
)
def test_step_zero_dead_zones(sign: int, edge: float) -> None:
    """On-policy, α = .5, ε = .2: tokens are clipped once teacher and student differ by more than ``edge`` nats."""
    gap = sign * edge * torch.tensor([1 - 1e-5, 1 + 1e-5])
    s = torch.zeros(2, requires_grad=True)
    out = trrd(s, s, -gap, sign * torch.ones(2), TRRD(alpha=0.5, clip=(0.2, 0.2)), reduction=SUM)
    before, beyond = torch.autograd.grad(out.loss, s)[0].tolist()
    assert before == pytest.approx(-sign * (1.2 if sign > 0 else 0.8), rel=1e-5)  # −Âr, r within 5e-6·edge of its bound
    assert beyond == 0


def test_worked_example_of_the_moved_trust_region() -> None:
    """p0 = .2, q = .8: r starts at .5 and TRRD pushes the token up to π = 1.2·√(.2·.8) = .48, GRPO only to .24."""
    old, teacher, up = torch.tensor([0.2]).log(), torch.tensor([0.8]).log(), torch.ones(1)
    start = trrd(old, old, teacher, up, reduction="token-mean")
    assert start.metrics["ratio_mean"].item() == pytest.approx(0.5, rel=4 * torch.finfo(torch.float32).eps)

    def pushes(bound: float, loss: Any) -> list[bool]:
        found = []
        for share in (0.9999, 1.0001):
            s = torch.tensor([bound * share]).log().requires_grad_()
            found.append(torch.autograd.grad(loss(s).loss, s)[0].item() < 0)
        return found

    assert pushes(0.48, lambda s: trrd(s, old, teacher, up, reduction="token-mean")) == [True, False]
    assert pushes(0.24, lambda s: grpo(s, old, up)) == [True, False]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_a_binding_teacher_clamp_leaves_alpha_of_the_gradient(alpha: float) -> None:
    t = torch.tensor([-1.0, -1.0, -1.0])
    s = (t + torch.tensor([0.5, 2.0, -2.0])).requires_grad_()
    out = trrd(s, s, t, torch.ones(3), TRRD(alpha=alpha, teacher_clamp=1.0, clip=(1.0, 9.0)), reduction=SUM)
    r = ((1 - alpha) * torch.tensor([0.5, 1.0, -1.0])).exp()
    expected = -r * torch.tensor([1.0, alpha, alpha])
    error = (torch.autograd.grad(out.loss, s)[0] - expected).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps * r.max()  # a product, an exponential, two factors


def test_no_advantage_gives_no_gradient_even_if_the_ratio_overflows() -> None:
    s = torch.tensor([-0.1, -0.1]).requires_grad_()
    o = torch.tensor([-0.1, -500.0])
    out = trrd(s, o, o, torch.zeros(2), reduction="token-mean")
    assert out.metrics["ratio_max"] == torch.inf
    assert out.token_loss.tolist() == [0, 0]
    assert torch.autograd.grad(out.loss, s)[0].tolist() == [0, 0]


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.inf], ids=str)
def test_a_non_finite_teacher_value_makes_its_token_plain_grpo(bad: float) -> None:
    s, o, t, _, a = draw()
    clean, plain = trrd(s, o, t, a, reduction="token-mean"), grpo(s, o, a)
    wrong = torch.zeros(SHAPE, dtype=torch.bool)
    wrong[1, 2:5] = wrong[3, 0] = True
    out = trrd(s, o, torch.where(wrong, bad, t), a, reduction="token-mean")
    assert torch.equal(out.token_loss, torch.where(wrong, plain.token_loss, clean.token_loss))
    grads = [torch.autograd.grad(x.loss, s)[0] for x in (out, plain, clean)]
    assert torch.equal(grads[0], torch.where(wrong, *grads[1:]))
    assert out.metrics["invalid_teacher"].item() == pytest.approx(4 / 64)
    assert all(x.isfinite() for x in out.metrics.values())


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_sits_at_masked_positions_has_no_effect(fill: float) -> None:
    keep = torch.rand(SHAPE) < 0.6
    keep[2] = False
    found = []
    for filler in (0.0, fill):
        torch.manual_seed(1)
        s, o, t, b, a = (torch.where(keep, x.detach(), filler) for x in draw())
        s.requires_grad_()
        out = trrd(s, o, t, a, TRRD(reference=Reference(0.3), dual_clip=2.0), mask=keep, ref_logp=b)
        out.loss.backward()
        found.append([out.loss, out.token_loss, s.grad, *out.metrics.values()])
        assert (s.grad[~keep] == 0).all()
        assert (out.token_loss[~keep] == 0).all()
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("rows", [4, 16], ids=["B_is_not_T", "B_is_T"])
def test_one_advantage_a_sequence_is_spread_over_its_tokens(rows: int) -> None:
    s, o, t = torch.randn(3, rows, 16)
    a = torch.randn(rows)
    for loss in (lambda a: grpo(s, o, a), lambda a: trrd(s, o, t, a)):
        assert torch.equal(loss(a).token_loss, loss(a[:, None].expand(rows, 16)).token_loss)


@pytest.mark.parametrize("loss", [GRPO, TRRD])
def test_all_masked_is_zero_and_attached_to_the_graph(loss: type[GRPO] | type[TRRD]) -> None:
    s, o, t, b, a = draw()
    given = {"old_logp": o, "advantages": a, "ref_logp": b} | ({"teacher_logp": t} if loss is TRRD else {})
    out = loss(reference=Reference(0.1))(s, **given, mask=torch.zeros(SHAPE))
    assert out.loss.requires_grad
    out.loss.backward()
    assert out.loss == 0
    assert s.grad is not None
    assert not s.grad.any()
    assert all(x == 0 for x in out.metrics.values())
