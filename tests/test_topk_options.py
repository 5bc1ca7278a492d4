"""TopKKL's axes beyond its first ones: directions, clamps, gradient paths, and each inside the sweep."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses.methods import METHODS
from rlad_kernels.losses.support.topk_kl import TopKKL
from tests.oracles import DTYPES, gradient, hold
from tests.test_topk_kl_loss import kl, linear_kl

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
N, V, K = 8 if INTERPRET else 32, 11, 4
EPS = torch.finfo(torch.float32).eps
FORMS = [(d, n) for d in ("reverse", "forward", "mixed", "jsd") for n in ("both", "teacher", "none", "tail")]
FORMS.remove(("jsd", "teacher"))
CLAMPS: list[dict[str, Any]] = [{}, {"log_ratio_clamp": 0.6}, {"logp_floor": -1.5}, {"loss_min": -0.1, "loss_max": 1.2}]

CASES = [
    (form, clamp, how) for form in FORMS for clamp in CLAMPS for how in ("kill", "pass")
    if (clamp or how == "kill")
    and not (form[1] == "both" and "logp_floor" in clamp) and not (form[0] == "jsd" and "log_ratio_clamp" in clamp)
]  # fmt: skip


def draw(dtype: torch.dtype = torch.float32, scale: float = 1.5) -> tuple[Tensor, Tensor, rk.TopK]:
    z, t = scale * torch.randn(2, N, V, dtype=torch.float64)
    ids = t.topk(K).indices
    lq, lp = (x.log_softmax(1) for x in (z, t))
    tail_q, tail_p = (x.exp().scatter(1, ids, 0).sum(1).log().to(dtype) for x in (lq, lp))
    teacher = rk.TopK(ids.int(), lp.gather(1, ids).to(dtype), tail_logp=tail_p)
    return lq.gather(1, ids).to(dtype).requires_grad_(), tail_q.requires_grad_(), teacher


def clamped(x: Tensor, low: float | None, high: float | None, gradient: str) -> Tensor:
    """The clamp with its two gradients, written as value and slope."""
    if low is high is None:
        return x
    y = x.clamp(low, high)
    return y if gradient == "kill" else x + (y - x).detach()


def formula(lq: Tensor, tail_q: Tensor, lp: Tensor, tail_p: Tensor, o: dict[str, Any]) -> Tensor:
    """Every axis again, in probabilities, on full supports."""
    how, beta = o.get("clamp_gradient", "kill"), o.get("beta", 0.5)
    if o["normalize"] == "tail":
        lq, lp = torch.cat([lq, tail_q[:, None]], 1), torch.cat([lp, tail_p[:, None]], 1)
    if (floor := o.get("logp_floor")) is not None:
        lq, lp = clamped(lq, floor, None, how), lp.clamp_min(floor)
    q, p = lq.exp(), lp.exp()
    q = q / q.sum(1, keepdim=True) if o["normalize"] == "both" else q
    p = p / p.sum(1, keepdim=True) if o["normalize"] in ("both", "teacher") else p

    def kl(a: Tensor, b: Tensor) -> Tensor:
        ratio = (a / b).log()
        if (c := o.get("log_ratio_clamp")) is not None:
            ratio = clamped(ratio, -c, c, how)
        return (a * ratio).sum(1)

    m = beta * p + (1 - beta) * q
    value = {
        "reverse": lambda: kl(q, p),
        "forward": lambda: kl(p, q),
        "mixed": lambda: beta * kl(p, q) + (1 - beta) * kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
    }[o["direction"]]()
    return clamped(value, o.get("loss_min"), o.get("loss_max"), how)


@pytest.mark.parametrize("form,clamp,how", CASES, ids=lambda x: "-".join(x) if isinstance(x, dict | tuple) else x)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_direction_normalisation_and_clamp(dtype: torch.dtype, form: tuple[str, str], clamp: dict[str, Any], how: str):
    direction, normalize = form
    o = {"direction": direction, "normalize": normalize, "beta": 0.3, **clamp, "clamp_gradient": how}
    lq, tail_q, teacher = draw(dtype)
    out = kl(lq, teacher, tail_logp=tail_q, **o)

    def value(lq: Tensor, tail_q: Tensor) -> Tensor:
        return formula(lq, tail_q, teacher.logp.to(lq.dtype), teacher.tail_logp.to(lq.dtype), o)

    hold(out.token_loss, value, lq.detach(), tail_q.detach())
    leaves = (lq, tail_q) if normalize == "tail" else (lq,)
    found = torch.autograd.grad(out.loss, leaves)
    hold(found[0] * N, gradient(value), lq, tail_q.detach())
    if normalize == "tail":
        hold(found[1] * N, gradient(lambda t, x: value(x, t)), tail_q, lq.detach())


@pytest.mark.parametrize("how", ["kill", "pass"])
@pytest.mark.parametrize("clamp", CLAMPS[1:], ids="-".join)
def test_the_clamps_bind_and_do_to_the_gradient_what_the_docstring_says(clamp: dict[str, Any], how: str):
    lq, _, teacher = draw()
    o = {"direction": "forward", "normalize": "none"}
    free, out = kl(lq, teacher, **o), kl(lq, teacher, **o, **clamp, clamp_gradient=how)
    assert not torch.equal(free.token_loss, out.token_loss)
    usual, grad = (torch.autograd.grad(x.loss, lq)[0] for x in (free, out))
    if how == "pass" and "logp_floor" not in clamp:  # the floor also bounds p, a factor of the gradient
        assert torch.allclose(usual, grad, rtol=1e-6)
        return
    gap, floor = (lq - teacher.logp).abs(), clamp.get("logp_floor", -math.inf)
    bind = {"log_ratio_clamp": gap > 0.6, "logp_floor": lq < floor}.get(
        next(iter(clamp)), (free.token_loss.clamp(-0.1, 1.2) != free.token_loss)[:, None]
    )
    bind = bind.expand_as(lq)
    assert bind.any()
    assert not bind.all()
    assert (grad[bind] == 0).all() == (how == "kill")
    assert (grad[~bind] != 0).all()


def test_straight_through_is_finite_where_the_student_has_no_mass():
    lq, _, teacher = draw()
    with torch.no_grad():
        lq[0, 0] = -math.inf
    for how in ("kill", "pass"):
        for o in ({"logp_floor": -10.0}, {"log_ratio_clamp": 5.0}):
            out = kl(lq, teacher, direction="forward", normalize="none", clamp_gradient=how, **o)
            assert out.token_loss.isfinite().all()
            assert torch.autograd.grad(out.loss, lq)[0].isfinite().all()


@pytest.mark.parametrize("direction", ["reverse", "mixed", "jsd"])
def test_renormalised_losses_keep_small_values_in_float32(direction: str):
    """At KL ≈ 1e-4 value and gradient come from float32 inputs to 1e-3; what float32 inputs themselves lose is not counted."""
    z = 2 * torch.randn(N, K)
    lq, lp = z.log_softmax(1).requires_grad_(), (z + 0.0145 * torch.randn(N, K)).log_softmax(1)
    teacher = rk.TopK(torch.arange(K).expand(N, K), lp)
    out = kl(lq, teacher, direction=direction)
    exact = lq.detach().double().requires_grad_()
    o = {"direction": direction, "normalize": "both"}
    want = formula(exact, exact[:, 0], lp.double(), lp[:, 0].double(), o)
    scale = 4 if direction == "jsd" else 1
    assert 2e-5 < scale * want.mean() < 5e-4
    assert (out.loss - want.mean()).abs() < 1e-3 * want.mean()
    slope = torch.autograd.grad(want.mean(), exact)[0]
    assert (torch.autograd.grad(out.loss, lq)[0] - slope).norm() < 1e-3 * slope.norm()
    assert (out.token_loss >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_outside_logp_is_the_reverse_kl_to_a_teacher_with_that_log_prob_elsewhere(dtype: torch.dtype):
    z, head = torch.randn(N, V, dtype=dtype, requires_grad=True), rk.LMHead(torch.eye(V, dtype=dtype))
    teacher = rk.linear_topk(torch.randn_like(z), head, K)
    out = linear_kl(z, head, teacher, normalize="teacher", outside_logp=-20.0)
    ids = teacher.ids.long()

    def whole(z: Tensor) -> Tensor:
        lq = z.log_softmax(1)
        lp = torch.full_like(lq, -20.0).scatter(1, ids, teacher.logp.to(z.dtype).log_softmax(1))
        return (lq.exp() * (lq - lp)).sum(1)

    hold(out.token_loss, whole, z.detach(), calls=2)
    hold(torch.autograd.grad(out.loss, z)[0] * N, gradient(whole), z, calls=2)


def test_without_the_tail_the_mass_outside_is_what_the_support_leaves():
    z, head = torch.randn(N, V), rk.LMHead(torch.eye(V))
    teacher = rk.linear_topk(torch.randn_like(z), head, K)
    loss = TopKKL(normalize="teacher", outside_logp=-20.0)
    scores = rk.linear_logp(z, head, teacher.ids[:, 0], topk_ids=teacher.ids, entropy=True, tail=True)
    found, want = (loss(s, teacher=teacher).token_loss for s in (scores._replace(tail_logp=None), scores))
    assert (found - want).abs().max() <= 20 * 8 * torch.finfo(torch.float32).eps  # 20 times the rounding of a sum near 1


def test_an_infinite_bound_is_none():
    z, head = torch.randn(N, V), rk.LMHead(torch.eye(V))
    teacher = rk.linear_topk(torch.randn_like(z), head, K)
    scores = rk.linear_logp(z, head, teacher.ids[:, 0], topk_ids=teacher.ids, tail=True)
    bounds = ({}, {"loss_max": math.inf}, {"loss_min": -math.inf})
    free, above, below = (TopKKL(**b)(scores, teacher=teacher).loss for b in bounds)
    assert free == above == below


BAD: list[tuple[dict[str, Any], str]] = [
    ({"direction": "jsd", "beta": 0.0}, "beta"),
    ({"direction": "mixed", "beta": 1.0}, "beta"),
    ({"direction": "jsd", "normalize": "teacher"}, "'both', 'tail' or 'none'"),
    ({"direction": "jsd", "log_ratio_clamp": 1.0}, "log_ratio_clamp"),
    ({"log_ratio_clamp": 0.0}, "log_ratio_clamp"),
    ({"logp_floor": -10.0}, "logp_floor"),
    ({"logp_floor": 1.0, "normalize": "none"}, "logp_floor"),
    ({"clamp_gradient": "half"}, "clamp_gradient"),
    ({"loss_min": 1.0, "loss_max": 0.0}, "loss_min"),
    ({"outside_logp": -100.0}, "outside_logp"),
    ({"outside_logp": -100.0, "normalize": "teacher"}, "entropy"),
    ({"outside_logp": -100.0, "normalize": "teacher", "direction": "forward"}, "outside_logp"),
]


@pytest.mark.parametrize("options,named", BAD, ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else "")
def test_options_without_a_meaning_are_refused(options: dict[str, Any], named: str):
    lq, _, teacher = draw()
    with pytest.raises(ValueError, match=f"^TopKKL: .*{named}"):
        kl(lq, teacher, **options)


def everything(b: int = 2, t: int = 5, d: int = 6) -> tuple[Tensor, rk.LMHead, Tensor, rk.TopK, Tensor, Tensor, Tensor]:
    head = rk.LMHead(torch.randn(V, d, requires_grad=True))
    hidden = torch.randn(b, t, d, requires_grad=True)
    target, mask = torch.randint(V, (b, t)), torch.rand(b, t) > 0.2
    teacher = rk.linear_topk(torch.randn(b, t, d), rk.LMHead(2 * torch.randn(V, d)), K, target=target, entropy=True)
    old = rk.linear_logp(hidden.detach() + 0.1 * torch.randn(b, t, d), head, target, topk_ids=teacher.ids)
    return hidden, head, target, teacher, mask, old.logp.detach(), old.topk_logp.detach()


IN_SWEEP = [k for k, m in METHODS.items() if m.family == "top-k"]


@pytest.mark.parametrize("name", ["ta_opd", "thunlp_opd"] if INTERPRET else IN_SWEEP)
def test_inside_the_sweep_is_the_same_as_from_scores(name: str):
    hidden, head, target, teacher, mask, old, old_topk = everything()
    method = METHODS[name]
    teacher = rk.supports.with_sampled(teacher, target) if name == "lsm_sampled" else teacher
    given = {"teacher": teacher, "old_logp": old, "old_topk_logp": old_topk, "spans": torch.zeros_like(target)}
    given = {k: x for k, x in given.items() if k in method.needs}
    scores = rk.linear_logp(hidden, head, target, topk_ids=teacher.ids, tail=True, entropy=True, mask=mask)
    same = method(scores, mask=mask, **given, **({"target": target} if "target" in method.needs else {}))
    out = rk.linear_loss(hidden, head, target, method.loss, mask=mask, **given)
    size = same.token_loss.abs().max()
    assert (out.token_loss - same.token_loss).abs().max() <= 1e-5 * size.clamp_min(1)
    for x, y in zip(*(torch.autograd.grad(o.loss, (hidden, head.weight)) for o in (out, same)), strict=True):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max().clamp_min(size)
    for key in same.metrics.keys() - (set() if method.products else {"entropy"}):  # rows of the support know no entropy
        assert out.metrics[key].item() == pytest.approx(same.metrics[key].item(), rel=1e-4, abs=1e-5), key


@pytest.mark.cpu
@pytest.mark.parametrize("loss", [
    rk.losses.TopKKL("jsd", normalize="tail", beta=0.3), rk.losses.TopKPG(weight="teacher"),
], ids=lambda x: x.name)  # fmt: skip
def test_options_beyond_the_methods_compile_fullgraph(loss: rk.TokenLoss):
    hidden, head, target, teacher, mask, _, old_topk = everything()
    given = {"teacher": teacher, "old_topk_logp": old_topk}
    given = {k: x for k, x in given.items() if k in loss.needs}

    def call(hidden: Tensor) -> Tensor:
        return rk.linear_loss(hidden, head, target, loss, mask=mask, **given).loss

    eager, compiled = call(hidden), torch.compile(call, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.equal(eager, compiled)
    assert torch.equal(*(torch.autograd.grad(x, hidden)[0] for x in (eager, compiled)))
