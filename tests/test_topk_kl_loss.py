"""TopKKL on log-probs and from hidden states, against direct formulas over probability vectors and gradients derived by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from tests.oracles import DLOGITS, DTYPES, gradient, hold, truncated_kl

DIRECTIONS = ["reverse", "forward"]
NORMALIZE = ["both", "teacher", "none", "tail"]
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # a program a row, half a second each
N, V, K = 8 if INTERPRET else 32, 11, 4
EPS = torch.finfo(torch.float32).eps


def draw(dtype: torch.dtype = torch.float32, k: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student log-probs at the teacher's top K and tail, the ids, and the teacher's, from two random vocabularies."""
    z, t = 1.5 * torch.randn(2, N, V, dtype=torch.float64)
    ids = t.topk(k).indices
    lq, tail_q, lp, tail_p = (x.to(dtype) for x in (*on_support(z, ids), *on_support(t, ids)))
    return lq.requires_grad_(), tail_q.requires_grad_(), ids.int(), lp, tail_p


def on_support(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs ``(…, K)`` at ``ids`` and the log-mass of all other tokens, from logits."""
    lq = z.log_softmax(-1)
    outside = torch.ones_like(lq).scatter(-1, ids.long(), 0.0) > 0
    return lq.gather(-1, ids.long()), torch.where(outside, lq, -torch.inf).logsumexp(-1)


def kl(
    topk_logp: Tensor, teacher: rk.TopK, mask: Tensor | None = None, *, tail_logp: Tensor | None = None,
    reduction: str | rk.Reduction | None = None, **options: Any,
) -> rk.losses.LossOutput:  # fmt: skip
    """TopKKL with these options on log-probs."""
    scores = rk.TokenScores(topk_logp=topk_logp, tail_logp=tail_logp)
    return rk.losses.TopKKL(**options)(scores, teacher=teacher, mask=mask, reduction=reduction)


def linear_kl(
    hidden: Tensor, head: rk.LMHead, teacher: rk.TopK, mask: Tensor | None = None, *,
    reduction: str | rk.Reduction | None = None, **options: Any,
) -> rk.losses.LossOutput:  # fmt: skip
    """The same from hidden states; which tokens were sampled does not matter to it."""
    target = torch.zeros(hidden.shape[:-1], dtype=torch.int64)
    return rk.linear_loss(hidden, head, target, rk.losses.TopKKL(**options), teacher=teacher, mask=mask, reduction=reduction)


def identity_head(v: int = V, dtype: torch.dtype = torch.float32) -> rk.LMHead:
    """With W = 1 the hidden states are the logits, and d_hidden is dlogits."""
    return rk.LMHead(torch.eye(v, dtype=dtype))


def check(out: rk.losses.LossOutput, formula: Callable[..., Tensor], *inputs: Tensor, calls: int = 1) -> None:
    """Hold token losses and their gradient by the first input to a per-token formula."""
    hold(out.token_loss, formula, *(x.detach() for x in inputs), calls=calls)
    hold(torch.autograd.grad(out.loss, inputs[0], retain_graph=True)[0] * N, gradient(formula), *inputs, calls=calls)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient_of_every_form(dtype: torch.dtype, direction: str, normalize: str) -> None:
    lq, tail_q, ids, lp, tail_p = draw(dtype)
    out = kl(lq, rk.TopK(ids, lp, tail_logp=tail_p), tail_logp=tail_q, direction=direction, normalize=normalize)

    def formula(lq: Tensor, tail_q: Tensor) -> Tensor:
        return truncated_kl(lq, tail_q, ids, lp.to(lq.dtype), tail_p.to(lq.dtype), direction, normalize)

    check(out, formula, lq, tail_q)
    assert out.loss.item() == pytest.approx(out.token_loss.mean().item(), rel=8 * EPS)
    if normalize == "tail":
        grad = torch.autograd.grad(out.loss, tail_q)[0] * N
        hold(grad, gradient(lambda tail_q, lq: formula(lq, tail_q)), tail_q, lq)


@pytest.mark.parametrize("form", DLOGITS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_logits_is_the_one_derived_by_hand(dtype: torch.dtype, form: tuple[str, str]) -> None:
    """q − p, q̂(log q̂/p̂ − L) and the like, through the head: inside the support and outside it."""
    normalize, direction = form
    z, teacher_z = 1.5 * torch.randn(N, V, dtype=dtype).requires_grad_(), 1.5 * torch.randn(N, V, dtype=dtype)
    teacher = rk.linear_topk(teacher_z, identity_head(dtype=dtype), K)
    out = linear_kl(z, identity_head(dtype=dtype), teacher, normalize=normalize, direction=direction)
    inside = torch.zeros(N, V).scatter(1, teacher.ids.long(), 1.0) > 0

    def by_hand(z: Tensor, t: Tensor) -> Tensor:
        return DLOGITS[form](z.softmax(1), t.softmax(1), inside)

    def by_autograd(z: Tensor, t: Tensor) -> Tensor:
        return truncated_kl(*on_support(z, teacher.ids), teacher.ids, *on_support(t, teacher.ids), direction, normalize)

    hold(torch.autograd.grad(out.loss, z)[0] * N, by_hand, z.detach(), teacher_z, plain=gradient(by_autograd), calls=2)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_from_hidden_states_is_the_same_as_from_scores(direction: str, normalize: str) -> None:
    head = rk.LMHead(torch.randn(V, 5, requires_grad=True), temperature=0.7)
    hidden = torch.randn(2, 3, 5, requires_grad=True)
    teacher = rk.linear_topk(torch.randn(2, 3, 5), head, K)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    options: dict[str, Any] = {"direction": direction, "normalize": normalize, "reduction": "seq-mean-token-mean", "scale": 0.5}
    out = linear_kl(hidden, head, teacher, mask, **options)
    z = hidden @ head.weight.T / 0.7
    lq, tail_q = on_support(z, teacher.ids)
    same = kl(lq, teacher, mask, tail_logp=tail_q, **options)
    # float32 logits of both sides differ by D·eps·max|z|, and a token's loss is at most 1 + max|log q/p| times as sensitive
    bound = 5 * EPS * z.abs().max().item() ** 2
    assert (out.token_loss - same.token_loss).abs().max() <= bound
    for x, y in zip(*(torch.autograd.grad(o.loss, (hidden, head.weight)) for o in (out, same)), strict=True):
        assert (x - y).abs().max() <= bound * head.weight.abs().max()
    assert out.metrics.keys() == same.metrics.keys() | (set() if normalize == "both" else {"entropy", "rows_skipped"})
    assert ("student_mass" in out.metrics) == (normalize != "both")
    for name, value in same.metrics.items():
        assert abs(value - out.metrics[name]) <= bound, name


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_empty_duplicate_and_non_finite_slots_leave_both_supports(direction: str, normalize: str) -> None:
    lq, tail_q, ids, lp, tail_p = draw()
    with torch.no_grad():
        ids[0, 1] = ids[1, 2:] = -1
        lq[0, 1] = lq[1, 2:] = lp[0, 1] = lp[1, 2:] = -torch.inf  # of an empty slot: not invalid
        ids[2, 3], lq[2, 3], lp[2, 3] = ids[2, 0], lq[2, 0], lp[2, 0]
        lp[3, 0], lp[3, 3], lp[4, 1] = torch.nan, -torch.inf, torch.inf
        ids[5] = -1  # no support at all
    teacher = rk.TopK(ids, lp, tail_logp=tail_p)
    out = kl(lq, teacher, tail_logp=tail_q, direction=direction, normalize=normalize)

    def formula(lq: Tensor, tail_q: Tensor) -> Tensor:
        return truncated_kl(lq, tail_q, ids, lp.to(lq.dtype), tail_p.to(lq.dtype), direction, normalize)

    check(out, formula, lq, tail_q)
    assert out.token_loss[5] == 0
    assert out.metrics["invalid_teacher"].item() == pytest.approx(2 / N)
    grad = torch.autograd.grad(out.loss, lq)[0]
    assert not grad[[0, 1, 1, 2, 3, 3, 4], [1, 2, 3, 3, 0, 3, 1]].any()
    assert not grad[5].any()


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_slot(direction: str, normalize: str) -> None:
    lq, tail_q, ids, lp, tail_p = draw(k=1)
    out = kl(lq, rk.TopK(ids, lp, tail_logp=tail_p), tail_logp=tail_q, direction=direction, normalize=normalize)
    if normalize == "both":  # one slot renormalised is certainty on both sides
        assert out.token_loss.tolist() == [0] * N
        assert torch.autograd.grad(out.loss, lq)[0].tolist() == [[0]] * N
    else:
        check(out, lambda x, t: truncated_kl(x, t, ids, lp.to(x.dtype), tail_p.to(x.dtype), direction, normalize), lq, tail_q)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_whole_vocabulary_as_support_is_the_whole_kl(direction: str, normalize: str) -> None:
    z, t = torch.randn(2, N, V)
    z.requires_grad_()
    teacher = rk.linear_topk(t, identity_head(), V)
    assert (teacher.tail_logp == -torch.inf).all()
    out = linear_kl(z, identity_head(), teacher, direction=direction, normalize=normalize)

    def formula(z: Tensor, t: Tensor) -> Tensor:
        lq, lp = z.log_softmax(1), t.log_softmax(1)
        return (lq.exp() * (lq - lp)).sum(1) if direction == "reverse" else (lp.exp() * (lp - lq)).sum(1)

    check(out, formula, z, t, calls=2)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tail_without_tail_logp_is_one_minus_the_support(direction: str) -> None:
    """Row 0 leaves the student a real tail; in row 1 the support holds all its mass, so the tail is 2^-23 without gradient."""
    lq = torch.tensor([[0.5, 0.25], [0.75, 0.25]]).log().requires_grad_()
    lp, tail_p = torch.tensor([[0.4, 0.4], [0.5, 0.25]]).log(), torch.tensor([0.2, 0.25]).log()
    teacher = rk.TopK(torch.tensor([[3, 5], [3, 5]]), lp, tail_logp=tail_p)
    out = kl(lq, teacher, direction=direction, normalize="tail", reduction=rk.Reduction(denominator=1))

    def formula(lq: Tensor) -> Tensor:
        q, p = lq.exp(), lp.to(lq.dtype).exp()
        mass = q.sum(1)
        tail = torch.stack([1 - mass[0], torch.tensor(2.0**-23, dtype=lq.dtype)])
        q, p = torch.cat([q, tail[:, None]], 1), torch.cat([p, tail_p.to(lq.dtype).exp()[:, None]], 1)
        return (q * (q / p).log()).sum(1) if direction == "reverse" else (p * (p / q).log()).sum(1)

    hold(out.token_loss, formula, lq.detach())
    hold(torch.autograd.grad(out.loss, lq)[0], gradient(formula), lq)
    assert out.metrics["tail_clamped"].item() == 0.5
    assert "tail_clamped" not in kl(lq, teacher, normalize="tail", tail_logp=tail_p).metrics


@pytest.mark.parametrize("offset", [0, 30, 100])
def test_raw_logits_do_as_well_as_log_probs_when_both_are_renormalised(offset: float) -> None:
    """However large the logits: the KL is 4e-4 here, a float32 normaliser of logits near 100 carries 4e-6."""
    z = (torch.randn(N, K) + offset).requires_grad_()
    lp = (z.detach() + 0.03 * torch.randn(N, K)).log_softmax(1)
    ids = torch.arange(K).expand(N, K)
    none = torch.zeros(N)
    check(kl(z, rk.TopK(ids, lp)), lambda z, lp: truncated_kl(z, none, ids, lp, none), z, lp)


def test_scale_multiplies_value_and_gradient() -> None:
    lq, tail_q, ids, lp, tail_p = draw()
    teacher = rk.TopK(ids, lp, tail_logp=tail_p)
    for normalize in NORMALIZE:
        one, four = (kl(lq, teacher, tail_logp=tail_q, normalize=normalize, scale=x) for x in (1.0, 4.0))
        assert torch.equal(4 * one.token_loss, four.token_loss)
        assert torch.equal(4 * torch.autograd.grad(one.loss, lq)[0], torch.autograd.grad(four.loss, lq)[0])


def test_no_gradient_outside_the_support() -> None:
    """Exactly none through linear_gather; through the sweep the softmax sums to one only up to rounding."""
    weight, hidden = torch.randn(300, N, requires_grad=True), torch.eye(N, requires_grad=True)  # so that d_weight = dlogitsᵀ
    teacher = rk.linear_topk(torch.randn(N, N), rk.LMHead(weight.detach()), K)
    outside = torch.ones(N, 300).scatter(1, teacher.ids.long(), 0.0).T > 0
    linear_kl(hidden, rk.LMHead(weight), teacher, normalize="both").loss.backward()
    exact, weight.grad = weight.grad, None
    assert exact is not None
    assert not exact[outside].any()
    scores = rk.linear_logp(hidden, rk.LMHead(weight), torch.zeros(N, dtype=torch.int64), topk_ids=teacher.ids)
    assert scores.topk_logp is not None
    kl(scores.topk_logp, teacher, normalize="both").loss.backward()
    assert weight.grad is not None
    assert weight.grad[outside].abs().max() < 1e-6 * weight.grad.abs().max()


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_gradient_near_convergence(dtype: torch.dtype, direction: str, normalize: str) -> None:
    """At KL ≈ 1e-4 the gradient is a difference of nearly equal numbers; its relative error stays below 5e-3."""
    weight = torch.randn(64, 32).to(dtype)
    hidden, near = ((torch.randn(N, 32) * 0.5).to(dtype) for _ in range(2))
    near = (hidden + 0.0065 * near).to(dtype)
    hidden.requires_grad_()
    teacher = rk.linear_topk(near, rk.LMHead(weight), 8)
    out = linear_kl(hidden, rk.LMHead(weight), teacher, normalize=normalize, direction=direction)
    grad = torch.autograd.grad(out.loss, hidden)[0].double()
    h = hidden.detach().double().requires_grad_()
    z, t = h @ weight.double().T, near.double() @ weight.double().T
    full = (z.softmax(1) * (z.log_softmax(1) - t.log_softmax(1))).sum(1).mean().item()
    assert 0.5e-4 < full < 2e-4
    ids = teacher.ids
    loss = truncated_kl(*on_support(z, ids), ids, *on_support(t, ids), direction, normalize).mean()
    expected = torch.autograd.grad(loss, h)[0]
    assert (grad - expected).norm() <= 5e-3 * expected.norm()


def test_metrics() -> None:
    lq, _, ids, lp, _ = draw()
    keep = torch.rand(N) < 0.6
    out = kl(lq, rk.TopK(ids, lp), keep, normalize="none")
    assert out.metrics.keys() == {"student_mass", "teacher_mass", "invalid_teacher"}
    assert kl(lq, rk.TopK(ids, lp), keep).metrics.keys() == {"teacher_mass", "invalid_teacher"}
    hold(out.metrics["student_mass"], lambda x: x.exp().sum(1)[keep].mean(), lq.detach())
    hold(out.metrics["teacher_mass"], lambda x: x.exp().sum(1)[keep].mean(), lp)
    assert out.metrics["invalid_teacher"] == 0


@pytest.mark.parametrize("spoiled", ["lq", "tail_q", "ids", "lp", "tail_p"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_what_sits_at_masked_tokens_has_no_effect(normalize: str, spoiled: str) -> None:
    keep, found = torch.rand(N) < 0.6, []
    given = dict(zip(("lq", "tail_q", "ids", "lp", "tail_p"), (x.detach() for x in draw()), strict=True))
    for fill in (0, 10**6 if spoiled == "ids" else torch.nan):
        x = given[spoiled]
        w = given | {spoiled: torch.where(keep[:, None] if x.dim() > 1 else keep, x, fill)}
        lq = w["lq"].clone().requires_grad_()
        teacher = rk.TopK(w["ids"], w["lp"], tail_logp=w["tail_p"])
        out = kl(lq, teacher, keep, tail_logp=w["tail_q"], normalize=normalize)
        grad = torch.autograd.grad(out.loss, lq)[0]
        assert not grad[~keep].any()
        assert not out.token_loss[~keep].any()
        found.append([out.loss, out.token_loss, grad, *out.metrics.values()])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_the_teacher_receives_no_gradient() -> None:
    lq, tail_q, ids, lp, tail_p = draw()
    lp.requires_grad_()
    tail_p.requires_grad_()
    kl(lq, rk.TopK(ids, lp, tail_logp=tail_p), tail_logp=tail_q, normalize="tail").loss.backward()
    assert (lp.grad, tail_p.grad) == (None, None)
    assert lq.grad is not None
    assert tail_q.grad is not None


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_masked_hidden_states_and_teacher_rows_have_no_effect(normalize: str) -> None:
    keep, found = torch.rand(N) < 0.6, []
    weight = torch.randn(V, 5, requires_grad=True)
    hidden, teacher = torch.randn(N, 5), rk.linear_topk(torch.randn(N, 5), rk.LMHead(weight.detach()), K)
    for fill, bad_id in ((0.0, 0), (torch.nan, 10**6)):
        x = torch.where(keep[:, None], hidden, fill).requires_grad_()
        ids, lp = torch.where(keep[:, None], teacher.ids, bad_id), torch.where(keep[:, None], teacher.logp, fill)
        spoiled = rk.TopK(ids, lp, tail_logp=torch.where(keep, teacher.tail_logp, fill))
        out = linear_kl(x, rk.LMHead(weight), spoiled, keep, normalize=normalize)
        grads = torch.autograd.grad(out.loss, (x, weight))
        assert not grads[0][~keep].any()
        found.append([out.loss, out.token_loss, *grads, *out.metrics.values()])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_bfloat16_log_probs_are_computed_in_float32() -> None:
    lq, _, ids, lp, _ = draw(torch.bfloat16)
    wide = lq.detach().float().requires_grad_()
    out, same = (kl(x, rk.TopK(ids, lp)) for x in (lq, wide))
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.token_loss, same.token_loss)
    grad = torch.autograd.grad(out.loss, lq)[0]
    assert torch.equal(grad, torch.autograd.grad(same.loss, wide)[0].bfloat16())
