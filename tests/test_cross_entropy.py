"""Cross-entropy inside the sweep: weights, z-loss, masks, and what is torch's own where it has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import rlad_kernels as rk
from tests.sweeps import leaf, problem, relative

CE, CrossEntropy = rk.losses.CrossEntropy(), rk.losses.CrossEntropy


def test_without_options_it_is_torchs() -> None:
    p = problem(shape=(3, 7))
    target = torch.where(torch.rand(3, 7) < 0.3, -100, p.target)
    out = rk.linear_loss(p.hidden, p.head, target, CE)
    want = cross_entropy(p.logits().flatten(0, 1), target.flatten())
    assert torch.allclose(out.loss, want, rtol=1e-6)
    for got, exact in zip(torch.autograd.grad(out.loss, p.leaves), torch.autograd.grad(want, p.leaves), strict=True):
        assert relative(got, exact) <= 1e-6
    assert (out.token_loss[target == -100] == 0).all()


def test_a_weight_of_zero_is_no_cross_entropy_but_keeps_its_z_loss() -> None:
    p = problem(n=6, bias=False)
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    bare = rk.linear_loss(p.hidden, p.head, p.target, CE, weights=weights)
    assert bare.metrics["rows_skipped"] == (0.5 if not p.hidden.is_cuda else 0)
    slope = torch.autograd.grad(bare.loss, p.hidden)[0]
    assert not slope[weights == 0].any()
    both = rk.linear_loss(p.hidden, p.head, p.target, CrossEntropy(z_loss=0.1), weights=weights)
    lse = rk.linear_logp(p.hidden, p.head, p.target).lse
    assert torch.allclose(both.token_loss - bare.token_loss, 0.1 * lse.detach().square(), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(both.loss, p.hidden)[0][weights == 0].any()


def test_weights_do_not_enter_the_divisor_and_get_no_gradient() -> None:
    p = problem(n=8)
    weights = torch.rand(8).requires_grad_()
    nll = -rk.linear_logp(p.hidden, p.head, p.target).logp.detach()
    out = rk.linear_loss(p.hidden, p.head, p.target, CE, weights=weights)
    assert torch.allclose(out.loss, (weights * nll).mean(), rtol=1e-6)
    out.loss.backward()
    assert weights.grad is None
    reduction = rk.Reduction(denominator=weights.sum())
    mean = rk.linear_loss(p.hidden, p.head, p.target, CE, weights=weights, reduction=reduction)
    assert torch.allclose(mean.loss, (weights * nll).sum() / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("compaction", [True, False], ids=["dropped", "computed"])
def test_garbage_at_masked_tokens(compaction: bool) -> None:
    p = problem(n=9)
    weights, mask = torch.rand(9), torch.arange(9) % 3 > 0
    loss = CrossEntropy(z_loss=0.01)
    want = rk.linear_loss(p.hidden, p.head, p.target, loss, weights=weights, mask=mask)
    dirty = leaf(torch.where(mask[:, None], p.hidden.detach(), torch.nan))
    weights = torch.where(mask, weights, torch.nan)
    with rk.set_compaction(compaction):
        got = rk.linear_loss(dirty, p.head, torch.where(mask, p.target, 10**6), loss, weights=weights, mask=mask)
    assert torch.allclose(got.loss, want.loss, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(got.loss, (dirty, p.weight)), torch.autograd.grad(want.loss, p.leaves[:2]), strict=True):
        assert relative(a, b) <= 1e-6


def test_the_z_loss_in_the_sparse_backward() -> None:
    """It takes the gradient of lse too, and errs by less than the probability it drops."""
    p = problem(n=9, v=101, sigma=6.0, bias=False)
    loss = CrossEntropy(z_loss=0.1)
    exact = rk.linear_loss(p.hidden, p.head, p.target, loss)
    want = torch.autograd.grad(exact.loss, p.leaves)
    for eps in (1e-2, 1e-3, 1e-4):
        out = rk.linear_loss(p.hidden, p.head, p.target, loss, filter_eps=eps)
        assert torch.equal(out.loss, exact.loss)
        for got, full in zip(torch.autograd.grad(out.loss, p.leaves), want, strict=True):
            assert relative(got, full) <= out.metrics["dropped_mass_max"]


def test_compiles_fullgraph() -> None:
    p = problem(n=8)
    weights = torch.rand(8)

    def f(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rk.linear_loss(hidden, rk.LMHead(weight), p.target, CrossEntropy(z_loss=1e-2), weights=weights).loss

    want, got = f(p.hidden, p.weight), torch.compile(f, fullgraph=True, backend="aot_eager")(p.hidden, p.weight)
    assert torch.allclose(got, want, rtol=1e-6)
    leaves = (p.hidden, p.weight)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def both_roads(p: Any, loss: Any, target: torch.Tensor, **given: Any) -> list[Any]:
    """The loss in the sweep, and on the sweep's scores."""
    smooth = "mean_logits" in loss.read()
    scores = rk.linear_logp(p.hidden, p.head, target, mean_logits=smooth, mask=given.get("mask"))
    return [rk.linear_loss(p.hidden, p.head, target, loss, **given), loss(scores, **{"mask": target != -100, **given})]


def exactly(out: Any, want: torch.Tensor, p: Any) -> None:
    assert torch.allclose(out.loss, want, rtol=1e-12)
    exact = torch.autograd.grad(want, p.leaves, retain_graph=True)
    for got, full in zip(torch.autograd.grad(out.loss, p.leaves), exact, strict=True):
        assert relative(got, full) <= 1e-11


@pytest.mark.cpu
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "logit_scale": -1.3, "vocab_size": 50}], ids=["plain", "tempered"])
@pytest.mark.parametrize("eps", [0.1, 0.9])
def test_label_smoothing_is_torchs(eps: float, options: dict[str, Any]) -> None:
    p = problem(shape=(3, 7), **options).twin()
    target = torch.where(torch.rand(3, 7) < 0.3, -100, p.target % 50)
    want = cross_entropy(p.logits().flatten(0, 1), target.flatten(), label_smoothing=eps)
    for out in both_roads(p, CrossEntropy(label_smoothing=eps), target):
        exactly(out, want, p)


@pytest.mark.cpu
def test_class_weights_are_torchs_and_the_z_loss_is_a_mean_over_tokens() -> None:
    p = problem(shape=(3, 7)).twin()
    target = torch.where(torch.rand(3, 7) < 0.3, -100, p.target)
    classes = torch.rand(p.weight.shape[0], dtype=torch.float64) * (torch.rand(p.weight.shape[0]) > 0.2)
    weights = classes[target.clamp_min(0)]
    z = p.logits().flatten(0, 1)
    weighted = cross_entropy(z, target.flatten(), weight=classes)
    for c in (0.0, 0.3):
        want = weighted + c * z.logsumexp(-1).square()[target.flatten() != -100].mean()
        for out in both_roads(p, CrossEntropy(normalize_weights=True, z_loss=c), target, weights=weights):
            exactly(out, want, p)
    for out in both_roads(p, CrossEntropy(normalize_weights=True), target, weights=torch.zeros(3, 7)):
        assert out.loss == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_label_smoothing_in_half(dtype: torch.dtype) -> None:
    """The even part goes to every row of the head, what waits in float32 and what is cast alike."""
    p = problem(n=40)
    low = [leaf(x.detach().to(dtype)) for x in p.leaves]
    high = [leaf(x.detach().double()) for x in low]
    out = rk.linear_loss(low[0], rk.LMHead(*low[1:]), p.target, CrossEntropy(label_smoothing=0.3))
    want = cross_entropy(high[0] @ high[1].T + high[2], p.target, label_smoothing=0.3)
    assert torch.allclose(out.loss.double(), want, rtol=2e-3)
    for got, exact in zip(torch.autograd.grad(out.loss, low), torch.autograd.grad(want, high), strict=True):
        assert relative(got.double(), exact) <= 2e-2


def test_label_smoothing_under_autocast() -> None:
    p = problem(n=12)
    want = cross_entropy(p.logits(), p.target, label_smoothing=0.2)
    with torch.autocast(p.hidden.device.type, torch.bfloat16):
        outs = both_roads(p, CrossEntropy(label_smoothing=0.2), p.target)
    for out in outs:
        assert torch.allclose(out.loss, want, rtol=1e-2)
        exact = torch.autograd.grad(want, p.leaves, retain_graph=True)
        for got, full in zip(torch.autograd.grad(out.loss, p.leaves), exact, strict=True):
            assert relative(got, full) <= 2e-2


def test_label_smoothing_with_masks_and_in_the_sparse_backward() -> None:
    p = problem(n=9, v=101, sigma=6.0)
    loss, mask = CrossEntropy(label_smoothing=0.2), torch.arange(9) % 3 > 0
    want = rk.linear_loss(p.hidden[mask], p.head, p.target[mask], loss)
    exact = torch.autograd.grad(want.loss, p.leaves)
    dirty = leaf(torch.where(mask[:, None], p.hidden.detach(), torch.nan))
    for compaction in (True, False):
        with rk.set_compaction(compaction):
            given = {"hidden": dirty, "head": p.head, "target": p.target, "mask": mask}
            scores = rk.linear_logp(**given, mean_logits=True)
            for out in (rk.linear_loss(**given, loss=loss), loss(scores, mask=mask)):
                assert torch.allclose(out.loss, want.loss, rtol=1e-6)
                for got, full in zip(torch.autograd.grad(out.loss, (dirty, *p.leaves[1:])), exact, strict=True):
                    assert relative(got, full) <= 2e-6
    out = rk.linear_loss(**given, loss=loss, filter_eps=1e-3)
    for got, full in zip(torch.autograd.grad(out.loss, (dirty, *p.leaves[1:])), exact, strict=True):
        assert relative(got, full) <= out.metrics["dropped_mass_max"] + 2e-6


def test_the_mean_of_the_logits_needs_a_head_without_softcap() -> None:
    p = problem(n=4)
    head = rk.LMHead(p.weight, softcap=30.0)
    for call in (
        lambda: rk.linear_loss(p.hidden, head, p.target, CrossEntropy(label_smoothing=0.1)),
        lambda: rk.linear_logp(p.hidden, head, p.target, mean_logits=True),
    ):
        with pytest.raises(ValueError, match=r"mean_logits \(label smoothing\) needs a head without softcap, got softcap=30.0"):
            call()
    with pytest.raises(ValueError, match=r"CrossEntropy: scores.mean_logits is None; linear_logp\(…, mean_logits=True\) gives it"):
        CrossEntropy(label_smoothing=0.1)(rk.linear_logp(p.hidden, p.head, p.target))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weights": torch.ones(3)}, r"CrossEntropy: weights has shape \(3,\), wanted \(4,\)"),
    "target": ({"target": torch.zeros(3).long()}, r"linear_loss: target has shape \(3,\)"),
    "reduction": ({"reduction": "mean"}, r"CrossEntropy: reduction must be a Reduction or one of .* got 'mean'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_message(case: str) -> None:
    p = problem(n=4)
    given, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        rk.linear_loss(**{"hidden": p.hidden, "head": p.head, "target": p.target, "loss": CE} | given)


@pytest.mark.parametrize("z_loss", [-1.0, torch.nan, torch.inf, None, "0"])
def test_z_loss_is_checked(z_loss: Any) -> None:
    with pytest.raises(ValueError, match=rf"^CrossEntropy: z_loss must be in \[0, inf\), got {z_loss!r}"):
        CrossEntropy(z_loss=z_loss)
