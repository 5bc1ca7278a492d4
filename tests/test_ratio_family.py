"""What the methods of the ratio family are known by, in every layout: packed, masked, inside the sweep, compiled."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.backends.contract import INTERPRET
from rlad_kernels.losses import GRPO, ICEPOP, TIS, LossOutput, Reference, Rollout, annealed_coef
from rlad_kernels.losses.methods import METHODS
from rlad_kernels.losses.ratio.cispo import CISPO
from rlad_kernels.losses.ratio.gspo import GSPO
from rlad_kernels.losses.ratio.hdpo import HDPO
from rlad_kernels.losses.ratio.mopd import MOPD
from rlad_kernels.losses.ratio.opd import OPD
from rlad_kernels.losses.ratio.rlsd import RLSD
from rlad_kernels.losses.ratio.sapo import SAPO
from rlad_kernels.losses.ratio.sequences import sequence_mean, suffix_sums
from tests.methods import on_scores, ratio, split
from tests.oracles import gradient, hold, surrogate
from tests.sweeps import problem, relative

EPS = torch.finfo(torch.float32).eps
FAMILY = [name for name, method in METHODS.items() if method.family == "ratio"]
SUM = rk.Reduction(denominator=1)
TAUGHT = [name for name in FAMILY if "teacher_logp" in METHODS[name].needs]


def given(name: str, **more: Any) -> dict[str, Any]:
    _, inputs = ratio.inputs(METHODS[name].needs)
    inputs = inputs | ratio.OPTIONS.get(name, {}) | more
    inputs["logp"] = inputs["logp"].clone().requires_grad_()
    return inputs


def run(name: str, inputs: dict[str, Any]) -> tuple[LossOutput, Tensor]:
    out = on_scores(METHODS[name], **inputs)
    return out, torch.autograd.grad(out.loss, inputs["logp"])[0]


def spread(x: Any) -> Any:
    """A value a sequence or a token, packed."""
    return x[:, None].expand(4, ratio.LENGTH).flatten() if x.dim() == 1 else x.flatten()


@pytest.mark.parametrize("name", FAMILY)
def test_packed_equals_padded(name: str) -> None:
    padded = given(name)
    seq_ids = torch.arange(4).repeat_interleave(ratio.LENGTH) * 3 - 5
    packed = {k: spread(x) if isinstance(x, Tensor) else x for k, x in padded.items()} | {"seq_ids": seq_ids}
    packed["logp"] = packed["logp"].detach().requires_grad_()
    (want, slope), (got, packed_slope) = run(name, padded), run(name, packed)
    assert torch.allclose(got.loss, want.loss, rtol=1e-5)
    assert torch.allclose(got.token_loss.view(4, -1), want.token_loss, rtol=1e-5, atol=1e-7)
    assert torch.allclose(packed_slope.view(4, -1), slope, rtol=1e-5, atol=1e-8)
    for key, value in want.metrics.items():
        assert torch.allclose(got.metrics[key], value, rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("fill", [torch.nan, -torch.inf], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_what_sits_at_masked_positions_has_no_effect(name: str, fill: float) -> None:
    clean = given(name)
    per_token = {k for k, x in clean.items() if isinstance(x, Tensor) and x.dim() == 2 and k != "mask"}
    dirty = {k: torch.where(clean["mask"], x.detach(), fill) if k in per_token else x for k, x in clean.items()}
    dirty["logp"].requires_grad_()
    (want, slope), (got, dirty_slope) = run(name, clean), run(name, dirty)
    assert torch.equal(want.token_loss, got.token_loss)
    assert torch.equal(slope, dirty_slope)
    assert want.metrics.keys() == got.metrics.keys()
    assert all(torch.equal(got.metrics[k], x) for k, x in want.metrics.items())
    assert (slope[~clean["mask"]] == 0).all()


@pytest.mark.parametrize("name", FAMILY)
def test_all_masked_is_zero_and_attached_to_the_graph(name: str) -> None:
    out, slope = run(name, given(name, mask=torch.zeros(4, ratio.LENGTH)))
    assert out.loss == 0
    assert not slope.any()
    assert all(x == 0 for x in out.metrics.values())


def test_scores_of_different_shapes_are_refused() -> None:
    scores = rk.TokenScores(torch.zeros(2, 3), entropy=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"^GRPO: scores\.entropy has leading shape \(2, 4\), scores\.logp \(2, 3\)"):
        GRPO()(scores, old_logp=torch.zeros(2, 3), advantages=torch.zeros(2))


@pytest.mark.parametrize("name", FAMILY)
def test_only_the_policy_receives_gradient(name: str) -> None:
    inputs = given(name)
    floats = {k: x for k, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    for x in floats.values():
        x.requires_grad_()
    on_scores(METHODS[name], **inputs).loss.backward()
    assert [k for k, x in floats.items() if x.grad is not None] == ["logp"]


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.inf], ids=str)
@pytest.mark.parametrize("name", TAUGHT)
def test_a_teacher_value_that_is_not_finite_teaches_nothing_and_is_counted(name: str, bad: float) -> None:
    inputs = given(name, mask=None)
    inputs["teacher_logp"] = inputs["teacher_logp"].clone()
    inputs["teacher_logp"][1, 3] = bad
    out, slope = run(name, inputs)
    assert out.loss.isfinite()
    assert slope.isfinite().all()
    assert out.metrics["invalid_teacher"].item() == pytest.approx(1 / 28)
    assert all(x.isfinite() for x in out.metrics.values())
    if "advantages" not in METHODS[name].needs and name not in ("opd_clipped", "topd"):  # whose sum goes on past the token
        assert slope[1, 3] == 0


def swept(name: str) -> tuple[Any, dict[str, Any]]:
    """A student, and the method's inputs near its log-probs."""
    p = problem(shape=(4, ratio.LENGTH), d=8, v=37, temperature=0.8)
    logp = rk.linear_logp(p.hidden, p.head, p.target).logp.detach()
    inputs = given(name)
    p.mask = inputs.pop("mask")
    near = inputs.pop("logp").detach()
    return p, {k: logp + (x - near) if k.endswith("_logp") else x for k, x in inputs.items()}


@pytest.mark.parametrize("name", FAMILY)
def test_inside_the_sweep_equals_the_composed_loss(name: str) -> None:
    if INTERPRET and name not in ("cispo", "opd", "kdrl"):
        pytest.skip("three methods stand for the family where a sweep takes seconds")
    p, inputs = swept(name)
    scores = rk.linear_logp(p.hidden, p.head, p.target, mask=p.mask)
    method, _, rest = split(METHODS[name], **inputs, mask=p.mask)
    want = method(scores.logp, **rest)
    slopes = torch.autograd.grad(want.loss, p.leaves)
    with rk.set_tile(16, 20):
        out = rk.linear_loss(p.hidden, p.head, p.target, method.loss, **rest)
        grads = torch.autograd.grad(out.loss, p.leaves)
    assert torch.allclose(out.loss, want.loss, rtol=1e-5, atol=1e-5)
    assert torch.allclose(out.token_loss, want.token_loss, rtol=1e-5, atol=1e-5)
    for g, e in zip(grads, slopes, strict=True):
        assert relative(g, e) <= 1e-5
    for key, value in want.metrics.items():
        assert torch.allclose(out.metrics[key], value, rtol=1e-4, atol=1e-6), key
    assert set(out.metrics) - set(want.metrics) == {"entropy", *(("rows_skipped",) if method.loss.rowwise else ())}


@pytest.mark.cpu
def test_they_compile_fullgraph_inside_the_sweep() -> None:
    p, _ = swept("grpo")
    calls = {name: split(METHODS[name], **swept(name)[1], mask=p.mask) for name in ("cispo", "opd", "kdrl", "gspo")}

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> dict[str, LossOutput]:
        head = rk.LMHead(weight, bias)
        return {k: rk.linear_loss(hidden, head, p.target, method.loss, **rest) for k, (method, _, rest) in calls.items()}

    want, got = f(*p.leaves), torch.compile(f, fullgraph=True, backend="aot_eager")(*p.leaves)
    for name in calls:
        assert torch.allclose(got[name].loss, want[name].loss, rtol=1e-6)
        assert got[name].metrics.keys() == want[name].metrics.keys()
        slopes = [torch.autograd.grad(x[name].loss, p.leaves, retain_graph=True) for x in (got, want)]
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(*slopes, strict=True))


@pytest.mark.cpu
def test_losses_that_read_other_rows_compile_fullgraph() -> None:
    gspo, hdpo = given("gspo"), given("hdpo", rollout_logp=-torch.rand(4, ratio.LENGTH))
    logp = gspo.pop("logp")
    del hdpo["logp"]

    def f() -> Tensor:
        return GSPO()(logp, **gspo).loss + HDPO(rollout=ICEPOP)(logp, **hdpo).loss

    want, got = f(), torch.compile(f, fullgraph=True, backend="aot_eager")()
    assert torch.allclose(got, want, rtol=1e-6)
    slopes = [torch.autograd.grad(x, logp)[0] for x in (got, want)]
    assert torch.allclose(*slopes, rtol=1e-6, atol=1e-8)


def test_a_sequence_level_ratio_needs_the_sequences() -> None:
    """It reads other rows: a call from hidden states takes a fourth product."""
    p = problem(n=6)
    near = {"old_logp": torch.zeros(6), "advantages": torch.ones(6)}
    assert (GSPO().products, GRPO().products) == (4, 3)
    with pytest.raises(ValueError, match=r"^GSPO: the ratio of packed \(N,\) tokens needs Reduction\(seq_ids=…\)"):
        rk.linear_loss(p.hidden, p.head, p.target, GSPO(), **near, reduction="token-mean")


def test_mopd_adds_alpha_of_the_outcome() -> None:
    s = torch.tensor([[-1.0, -2.0, -3.0]]).requires_grad_()
    teacher, advantages = torch.tensor([[-0.5, -2.5, -3.0]]), torch.tensor([[2.0, 0.0, -1.0]])
    out = MOPD(advantage_coef=0.25)(s, rollout_logp=s.detach(), teacher_logp=teacher, advantages=advantages)
    want = torch.tensor([[-1.0, 0.5, 0.25]]) / 3  # −((t − s) + Â/4), the mean of three tokens
    assert (torch.autograd.grad(out.loss, s)[0] - want).abs().max() <= EPS


def test_cispo_counts_the_tokens_it_clips() -> None:
    """Of those with an advantage: the others send nothing, clipped or not."""
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1, -0.1, 0.1]).log_softmax(0)
    old, advantages = (
        logp - torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1, -0.1, 0.5]),
        torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0, 1.0, -1.0]),
    )
    metrics = CISPO(clip=(0.3, 0.4))(logp, old_logp=old, advantages=advantages).metrics
    assert metrics["clip_frac_high"].item() == pytest.approx(2 / 7) and metrics["clip_frac_low"].item() == pytest.approx(1 / 7)


def test_gspo_keeps_or_clips_a_sequence_as_a_whole() -> None:
    old = torch.full((2, 4), -1.0)
    s = torch.tensor([[-1.0, -1.0, -1.0, -0.998], [-0.5, -1.5, -0.9, -1.1]]).requires_grad_()  # mean gaps 5e-4 and 0
    out = GSPO()(s, old_logp=old, advantages=torch.ones(2), reduction=SUM)
    slope = torch.autograd.grad(out.loss, s)[0]
    assert slope[0].tolist() == [0] * 4  # 1.0005 > 1 + 4e-4
    assert torch.allclose(slope[1], torch.full((4,), -0.25), rtol=4 * EPS)  # −r/|y|, the same for every token
    assert out.metrics["clip_frac_high"].item() == 0.5


def test_gspo_token_has_gspos_value_and_each_tokens_own_advantage() -> None:
    inputs = given("gspo", clip=(1.0, math.inf))
    (want, _), (got, slope) = run("gspo", inputs), run("gspo_token", inputs)
    assert torch.equal(want.token_loss, got.token_loss)
    counts = inputs["mask"].sum(1, keepdim=True).clamp_min(1)
    assert torch.allclose(slope, got.token_loss / counts / 3, rtol=4 * EPS)  # −r_i·Â_t; three sequences have a kept token
    even = given("gspo", advantages=torch.randn(4))  # with one advantage a sequence the two are the same
    (_, a), (_, b) = run("gspo", even), run("gspo_token", even)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("n", [0, 1, 5, 64, 100])
def test_sums_over_packed_sequences(n: int) -> None:
    sequence = torch.randint(0, 2, (n,)).cumsum(0)
    keep = torch.rand(n) > 0.3
    x = torch.randn(n)
    for gamma in (1.0, 0.7, 0.0):
        at = range(n)
        want = [sum(gamma ** (j - i) * x[j].double() for j in at if j >= i and sequence[j] == sequence[i]) for i in at]
        assert torch.allclose(suffix_sums(x, sequence, gamma).double(), torch.tensor(want).double(), atol=n * EPS)
    means = [x[keep & (sequence == i)].sum() / max(int((keep & (sequence == i)).sum()), 1) for i in sequence]
    x.requires_grad_()
    got = sequence_mean(x, keep, sequence)
    assert torch.allclose(got, torch.tensor(means), atol=n * EPS)
    cotangent = torch.randn(n)
    got.backward(cotangent)
    back = [
        cotangent[sequence == s].sum() / max(int((keep & (sequence == s)).sum()), 1) * k
        for s, k in zip(sequence, keep, strict=True)
    ]
    assert torch.allclose(x.grad, torch.tensor(back), atol=n * EPS)


def test_cispo_keeps_the_gradient_that_the_clip_kills() -> None:
    s = torch.tensor([2.0, 0.5]).log().requires_grad_()
    zero, a = torch.zeros(2), torch.tensor([1.0, -1.0])
    given = {"old_logp": zero, "advantages": a}
    assert torch.autograd.grad(GRPO()(s, **given).loss, s)[0].tolist() == [0, 0]
    slope = torch.autograd.grad(CISPO(clip=(0.2, 0.2))(s, **given, reduction=SUM).loss, s)[0]
    assert torch.allclose(slope, torch.tensor([-1.2, 0.8]), rtol=2 * EPS)


def test_sapos_gate_is_one_on_policy_falls_on_both_sides_and_faster_for_negative_advantages() -> None:
    log_r = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0, 100.0])
    for sign, tau in ((1.0, 1.0), (-1.0, 1.05)):
        s = log_r.clone().requires_grad_()
        given = {"old_logp": torch.zeros(6), "advantages": sign * torch.ones(6)}
        loss = SAPO()(s, **given, reduction=SUM._replace(kind="token-mean")).loss
        weight = -sign * torch.autograd.grad(loss, s)[0] / log_r.exp()
        gate = torch.sigmoid(tau * (log_r.double().exp() - 1))
        assert torch.allclose(weight.double(), 4 * gate * (1 - gate), rtol=32 * EPS, atol=4 * EPS)
        assert weight.argmax() == 2
        assert weight[2] == 1
        assert weight[5] == 0  # r overflows float32, its gradient does not become NaN


def test_a_rollout_weight_multiplies_the_loss_and_not_the_kl() -> None:
    inputs = given("tis", dual_clip=1.5, mask=None)
    _, mu = inputs["logp"], inputs["rollout_logp"]
    ref = inputs["old_logp"] + 0.1
    for rollout in (TIS, ICEPOP, replace(ICEPOP, policy="current")):
        top = inputs["logp"].detach() if rollout.policy == "current" else inputs["old_logp"]
        x = (top - mu).exp()
        w = x.clamp(max=2) if rollout.form == "truncate" else torch.where((x >= 0.5) & (x <= 5), x, 0)
        out = on_scores(METHODS["grpo"], **inputs | {"rollout": rollout}, ref_logp=ref, reference=Reference(0.5))
        hold(
            out.token_loss,
            lambda s, o, a, w: w * surrogate(s, o, a, dual=1.5) + 0.5 * ((o + 0.1 - s).exp() - 1 - (o + 0.1 - s)),
            inputs["logp"].detach(), inputs["old_logp"], inputs["advantages"], w, calls=2,
        )  # fmt: skip
        assert torch.allclose(out.metrics["rollout_weight_mean"], w.mean(), rtol=1e-6)
        assert out.metrics["rollout_clip_frac"].item() == pytest.approx((w != x).double().mean().item())
        assert 0 < out.metrics["rollout_clip_frac"] < 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("rollout", [TIS, ICEPOP], ids=["tis", "icepop"])
def test_a_sampler_value_that_is_not_finite_takes_the_tokens_loss(rollout: Rollout, bad: float) -> None:
    s = torch.full((2,), -1.0).requires_grad_()
    out = GRPO(rollout=rollout)(s, old_logp=s, advantages=torch.ones(2), rollout_logp=torch.tensor([bad, -1.0]))
    assert out.token_loss.tolist() == [0, -1]
    assert torch.autograd.grad(out.loss, s)[0].tolist() == [0, -0.5]
    assert out.metrics["rollout_clip_frac"] == 0.5


def test_a_row_does_not_go_without_what_makes_it_the_method() -> None:
    for name, missing in (("dr_grpo", "denominator"), ("tis", "rollout_logp"), ("icepop", "rollout_logp")):
        inputs = given(name)
        del inputs[missing]
        with pytest.raises(ValueError, match=missing):
            on_scores(METHODS[name], **inputs)


def test_kdrl_without_a_coefficient_is_reinforcement_and_without_a_reward_distillation() -> None:
    inputs = given("kdrl")
    none, _ = run("kdrl", inputs | {"kd_coef": 0.0})
    plain = GRPO(clip=None)(inputs["logp"], **{k: inputs[k] for k in ("old_logp", "advantages", "mask")})
    assert torch.equal(none.token_loss, plain.token_loss)
    zero = torch.zeros_like(inputs["advantages"])
    only, slope = run("kdrl", inputs | {"advantages": zero, "kd_coef": 1.0})
    s, t = inputs["logp"].detach(), inputs["teacher_logp"]
    hold(only.token_loss[inputs["mask"]], lambda s, t: (s - t) ** 2 / 2, s[inputs["mask"]], t[inputs["mask"]])
    hold(
        slope[inputs["mask"]] * inputs["mask"].sum(), gradient(lambda s, t: (s - t) ** 2 / 2), s[inputs["mask"]], t[inputs["mask"]]
    )


def test_kdrls_coefficient_falls_to_its_floor() -> None:
    assert [annealed_coef(step) for step in (0, 10, 80, 280)] == pytest.approx([5e-3, 4.5e-3, 1e-3, 1e-3])
    assert annealed_coef(3, start=0.2, decrement=0.1, floor=0.002) == 0.002


def test_groups_of_sequences_in_any_order_and_only_kept_ones_count() -> None:
    correct = torch.tensor([1, 0, 0, 1, 0, 0])
    groups = torch.tensor([7, 3, 7, 9, 3, 9])
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[3] = False  # the only right one of group 9
    s = torch.full((6, 2), -1.0).requires_grad_()
    t = torch.zeros(6, 2)
    given = {"old_logp": s, "teacher_logp": t, "advantages": torch.zeros(6), "correct": correct, "group_ids": groups}
    out = HDPO()(s, **given, mask=mask, reduction=SUM)
    slope = torch.autograd.grad(out.loss, s)[0][:, 0]
    assert slope.tolist() == [0, -1, 0, 0, -1, -1]  # −β·(t − s) where every kept response of the group is wrong


def test_opd_pays_for_a_tokens_own_divergence_or_for_what_follows_too() -> None:
    o, t = -torch.rand(2, 5), -torch.rand(2, 5)
    s = o.clone().requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]])
    for gamma in (0.0, 0.5, 1.0):
        out = OPD(gamma=gamma, coef=2.0)(s, old_logp=o, teacher_logp=t, mask=mask, reduction=SUM)
        slope = torch.autograd.grad(out.loss, s)[0]
        reward = (t - o) * mask
        want = [2 * sum(gamma**j * reward[:, i + j] for j in range(5 - i)) for i in range(5)]
        assert torch.allclose(slope, -torch.stack(want, 1) * mask, atol=16 * EPS)


def test_a_second_teacher_is_mixed_in_or_chosen() -> None:
    t = torch.stack([torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-3.0, -torch.inf, -1.0])])
    assert rk.supports.combine_teachers(t[:, ::2], torch.tensor([0.25, 0.75])).tolist() == [-2.5, -1.5]
    chosen = rk.supports.combine_teachers([*t], torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]))
    assert chosen.tolist() == [-3.0, -2.0, -1.0]
    with pytest.raises(ValueError, match=r"combine_teachers: weights has shape \(3,\), wanted \(2,\) or \(2, 3\)"):
        rk.supports.combine_teachers(t, torch.ones(3))


def test_rlsd_never_turns_the_sign_of_an_advantage() -> None:
    inputs = given("rlsd", mask=None)
    s, t, a = inputs["logp"].detach(), inputs["teacher_logp"], inputs["advantages"]
    out = RLSD()(s.requires_grad_(), old_logp=s.detach(), teacher_logp=t, advantages=a, reduction=SUM)
    weight = torch.autograd.grad(out.loss, s)[0] / -a
    assert (weight >= 0.8 - EPS).all()
    assert (weight <= 1.2 + EPS).all()
    assert ((weight > 1) == ((t - s.detach()) * a > 0)).all()
