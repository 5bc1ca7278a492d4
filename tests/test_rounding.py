"""bfloat16 dlogits: what rounding takes from the targets' entries goes back into the gradients."""

from __future__ import annotations

import pytest
import torch

import rlad_kernels as rk
from tests.sweeps import problem, relative


@pytest.mark.parametrize("path", ["linear_logp", "frozen", "sparse", "fused", "fused_sparse"])
def test_equal_cotangents_are_not_rounded_alike(path: str) -> None:
    """1/15 lies almost half an ulp of bfloat16 off: a mean over 15 tokens would be wrong by 0.34 % in every target's entry."""
    p = problem(n=15, d=24, v=97, dtype=torch.bfloat16, sigma=2.0, softcap=30.0)
    if path == "frozen":
        p.weight.requires_grad_(False)
        p.bias.requires_grad_(False)
    eps = 1e-6 if "sparse" in path else 0.0
    with rk.set_tile(8, 50):
        if "fused" in path:
            loss = rk.linear_loss(p.hidden, p.head, p.target, rk.losses.CrossEntropy(), filter_eps=eps).loss
        else:
            loss = -rk.linear_logp(p.hidden, p.head, p.target, filter_eps=eps).logp.mean()
        leaves = [x for x in p.leaves if x.requires_grad]
        grads = torch.autograd.grad(loss, leaves)
    want = p.twin()
    exact = torch.autograd.grad(-want.expected()[0].mean(), want.leaves)
    for g, e in zip(grads, exact, strict=False):
        assert relative(g, e) <= 2.5e-3  # bfloat16 gradients alone are off by 1.7e-3


@pytest.mark.parametrize("path", ["linear_logp", "frozen"])
def test_the_gradient_of_lse_is_rounded_as_dlogits_are(path: str) -> None:
    """l·p alone: W_y, long and of a p next to 0, is in ∂lse/∂h only by way of ∂logp/∂h, and leaves nothing behind."""
    p = problem(n=15, d=24, v=97, dtype=torch.bfloat16, sigma=0.5, bias=False, softcap=30.0)
    with torch.no_grad():
        p.weight[:15] = -p.hidden * 2
    p.target = torch.arange(15)
    head = rk.LMHead(p.weight.detach() if path == "frozen" else p.weight, **p.options)
    l = torch.linspace(-3, 3, 15)
    (got,) = torch.autograd.grad((rk.linear_logp(p.hidden, head, p.target).lse * l).sum(), p.hidden)
    exact = p.twin()
    z, weight = exact.logits(), exact.weight.detach()
    (want,) = torch.autograd.grad((z.logsumexp(-1) * l).sum(), exact.hidden)
    dlogits = l[:, None].abs() * z.detach().softmax(-1)
    bound = 2.0**-8 * (dlogits @ weight.abs() + want.abs())  # half an ulp of each dlogit, and of the gradient
    assert ((got.double() - want).abs() <= 1.01 * bound + 1e-6 * weight.abs().max()).all()
