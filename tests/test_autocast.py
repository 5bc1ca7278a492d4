"""Autocast casts a call's inputs and nothing inside it, whether forward and backward run inside or outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.token_loss import Metrics
from tests.sweeps import Problem, leaf, problem

HALVES = [torch.bfloat16, torch.float16]


def frozen(p: Problem) -> rk.LMHead:
    return rk.LMHead(p.weight.detach(), p.bias.detach(), **p.options)


def teacher(p: Problem) -> tuple[Tensor, rk.LMHead]:
    return p.hidden.detach().flip(0), rk.LMHead(p.weight.detach().flip(1), **p.options)


def topk(p: Problem) -> Tensor:
    found = rk.linear_topk(p.hidden, p.head, 3, target=p.target, entropy=True)
    return torch.cat([found.logp, found.target_logp[:, None], found.entropy[:, None]], 1)


@dataclass(frozen=True, kw_only=True)
class Confident(rk.TokenLoss):
    reads = ("logp", "entropy")

    def tokens(self, scores: rk.TokenScores) -> tuple[Tensor, Metrics]:
        return scores.entropy - scores.logp, {}


def fused(p: Problem, eps: float = 0.0) -> Tensor:
    return rk.linear_loss(p.hidden, p.head, p.target, Confident(), filter_eps=eps).loss


CALLS: dict[str, Callable[[Problem], Tensor]] = {
    "linear_logp": lambda p: rk.linear_logp(p.hidden, p.head, p.target).logp,
    "filter_eps": lambda p: rk.linear_logp(p.hidden, p.head, p.target, filter_eps=0.01).logp,
    "frozen": lambda p: rk.linear_logp(p.hidden, frozen(p), p.target).logp,
    "topk": topk,
    "gather": lambda p: rk.linear_gather(p.hidden, p.head, p.ids),
    "fused": fused,
    "fused filter_eps": lambda p: fused(p, 0.01),
    "divergence": lambda p: rk.linear_divergence(p.hidden, p.head, *teacher(p), rk.losses.ForwardKL()),
    "divergence frozen": lambda p: rk.linear_divergence(p.hidden, frozen(p), *teacher(p), rk.losses.ForwardKL()),
    "divergence_loss": lambda p: rk.linear_divergence_loss(p.hidden, p.head, *teacher(p), rk.losses.ForwardKL()).loss,
}


def run(name: str, p: Problem, dtype: torch.dtype, forward: bool, backward: bool) -> tuple[Tensor, ...]:
    """The value and its gradients, as they arrive at the leaves."""
    device = p.hidden.device.type
    with torch.autocast(device, dtype=dtype, enabled=forward):
        value = CALLS[name](p)
    if not value.requires_grad:
        return (value,)
    pull = torch.linspace(-1, 1, value.numel()).view(value.shape) if value.dim() else torch.ones(())
    with torch.autocast(device, dtype=dtype, enabled=backward):
        grads = torch.autograd.grad(value, p.leaves, pull.to(value), allow_unused=True)
    return value, *(g for g in grads if g is not None)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("forward", "backward"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", CALLS)
def test_bit_by_bit_as_if_the_inputs_had_been_cast(name: str, forward: bool, backward: bool, dtype: torch.dtype) -> None:
    p = problem(n=9, v=61, d=24)
    low = Problem(*(leaf(x.to(dtype) if forward else x) for x in p.leaves), p.target, p.ids)
    for found, want in zip(run(name, p, dtype, forward, backward), run(name, low, dtype, False, False), strict=True):
        assert torch.equal(found, want.to(found.dtype))


@pytest.mark.cpu
@pytest.mark.parametrize("name", CALLS)
def test_float64_stays_float64(name: str) -> None:
    """Autocast leaves float64 alone in torch's own products."""
    p = problem(n=9, v=61, d=24, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (p.hidden @ p.weight.T).dtype == torch.float64
    for found, want in zip(run(name, p, torch.bfloat16, True, True), run(name, p, torch.bfloat16, False, False), strict=True):
        assert found.dtype == torch.float64
        assert torch.equal(found, want)


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["filter_eps", "fused filter_eps"])
def test_on_every_instruction_set(isa: str, name: str) -> None:
    """Products without ``out``, which autocast takes, are made only where there is no product of bfloat16."""
    for where in ((True, True), (False, True)):
        test_bit_by_bit_as_if_the_inputs_had_been_cast(name, *where, torch.bfloat16)
