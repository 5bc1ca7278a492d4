"""torch.compile, fullgraph: any number of tokens, annealed numbers in one graph, and the same checks of values as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

import rlad_kernels as rk
from rlad_kernels.core.registry import METHODS
from tests.sweeps import problem
from tests.test_inference_mode import method_case, teacher_of

N = 6


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> None:
    torch._dynamo.reset()


class Compiled:
    """A fullgraph compiled function that counts its graphs."""

    def __init__(self, f: Callable[..., Any], backend: str = "eager", **options: Any) -> None:
        self.graphs = 0

        def count(graph: Any, inputs: Any) -> Any:
            self.graphs += 1
            return lookup_backend(backend)(graph, inputs)

        self.call = torch.compile(f, backend=count, fullgraph=True, **options)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("name", METHODS)
def test_methods_compile_with_dynamic_shapes(name: str) -> None:
    call, leaves, given = method_case(name)
    tensors = {**given, **{k: given[k].clone().requires_grad_() for k in leaves}}
    want, got = call(**tensors), Compiled(lambda xs: call(**xs), dynamic=True).call(tensors)
    bound = 64 * torch.finfo(torch.float32).eps * want.token_loss.abs().max()
    assert (got.loss - want.loss).abs() <= bound
    assert (got.token_loss - want.token_loss).abs().max() <= bound
    assert got.metrics.keys() == want.metrics.keys()


def _hidden_calls() -> dict[str, Callable[..., Tensor]]:
    def old(h: Tensor) -> Tensor:
        return h[:, 0] - 3

    return {
        "linear_logp": lambda h, head, y, c: rk.linear_logp(h, head, y, entropy=True).logp.sum(),
        "linear_gather": lambda h, head, y, c: rk.linear_gather(h, head, y.unsqueeze(1)).sum(),
        "linear_cross_entropy_loss": lambda h, head, y, c: rk.linear_cross_entropy_loss(h, head, y, z_loss=c).loss,
        "linear_divergence": lambda h, head, y, c: rk.linear_divergence(
            h, head, h.detach() + 1, head, divergence="taid", tau=c
        ).sum(),
        "linear_divergence_loss": lambda h, head, y, c: rk.linear_divergence_loss(
            h, head, h.detach() + 1, head, divergence="jsd", beta=c
        ).loss,
        "rlad_loss": lambda h, head, y, c: rk.rlad_loss(
            h, head, y, old_logp=old(h), advantages=old(h) + 3, teacher_logp=old(h) + 0.1, alpha=c, reduction="token-mean"
        ).loss,
    }  # fmt: skip


@pytest.mark.parametrize("name", _hidden_calls())
def test_any_number_of_tokens_in_one_graph(name: str) -> None:
    call = _hidden_calls()[name]
    f = Compiled(lambda h, w, y: call(h, rk.LMHead(w), y, 0.25), dynamic=True)
    for n in (N, 2 * N, N + 3):
        p = problem(n=n, v=31)
        got, want = f.call(p.hidden, p.weight, p.target), call(p.hidden, rk.LMHead(p.weight), p.target, 0.25)
        given = [(x, *torch.autograd.grad(x, (p.hidden, p.weight))) for x in (got, want)]
        for a, b in zip(*given, strict=True):  # the same operations in the same order
            assert (a - b).abs().max() <= 4 * torch.finfo(torch.float32).eps * b.abs().max()
    assert f.graphs == 1


def _annealed() -> dict[str, Callable[[float], Tensor]]:
    """A loss as a function of one of its numbers."""
    p = problem(n=N, v=31)
    weight = p.weight.detach()
    teacher, other = teacher_of(p, weight.roll(1, 0)), rk.LMHead(weight.roll(1, 0))
    old, adv = torch.randn(N) - 3, torch.randn(N)
    s = (old + 0.1 * torch.randn(N)).requires_grad_()
    hidden = _hidden_calls()
    one = {"reduction": "token-mean"}
    rlad = {"old_logp": old, "advantages": adv, "teacher": teacher, **one}
    return {
        "grpo kl_coef": lambda c: rk.grpo_loss(s, old, adv, ref_logp=old, kl_coef=c).loss,
        "grpo clip": lambda c: rk.grpo_loss(s, old, adv, clip=(c, c + 0.1)).loss,
        "grpo denominator": lambda c: rk.grpo_loss(s, old, adv, denominator=100 * c).loss,
        "trrd alpha": lambda c: rk.trrd_loss(s, old, old - 0.2, adv, alpha=c, **one).loss,
        "trrd teacher_clamp": lambda c: rk.trrd_loss(s, old, old - 0.2, adv, teacher_clamp=c, **one).loss,
        "kdrl kd_coef": lambda c: rk.kdrl_loss(s, old, old - 0.2, adv, kd_coef=c, **one).loss,
        "opd coef": lambda c: rk.opd_loss(s, old, old - 0.2, coef=c, **one).loss,
        "topk_kl scale": lambda c: rk.linear_topk_kl_loss(p.hidden, p.head, teacher, scale=c).loss,
        "rlad topk_kl_coef": lambda c: rk.rlad_loss(p.hidden, p.head, p.target, topk_kl_coef=c, **rlad).loss,
        "rlad scale": lambda c: rk.rlad_loss(p.hidden, p.head, p.target, topk_kl_coef=1.0, scale=c, **rlad).loss,
        "temperature": lambda c: rk.linear_logp(p.hidden, rk.LMHead(p.weight, temperature=c), p.target).logp.sum(),
        "divergence scale": lambda c: rk.linear_divergence_loss(p.hidden, p.head, p.hidden.detach(), other, scale=c).loss,
        "teacher_weights": lambda c: rk.linear_divergence_loss(
            p.hidden, p.head, [p.hidden.detach()] * 2, [other] * 2, teacher_weights=(c, 1 - c)
        ).loss,
        **{
            name: lambda c, f=hidden[name]: f(p.hidden, p.head, p.target, c)
            for name in ("linear_cross_entropy_loss", "linear_divergence", "linear_divergence_loss", "rlad_loss")
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", _annealed())
def test_annealed_numbers_compile_once(name: str) -> None:
    """Once as a constant, once as a number; aot_eager runs the passes that make a constant of it where an op takes a float."""
    f = _annealed()[name]
    compiled = Compiled(f, "aot_eager")
    for step in range(5):
        c = 0.9 - 0.1 * step
        got, want = compiled.call(c), f(c)
        assert (got - want).abs() <= 1e-5 * want.abs()
    assert compiled.graphs == 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.cpu)])
def test_compiled_calls_check_values(backend: str) -> None:
    """A mask of other numbers, decreasing seq_ids, a denominator of 0: ValueErrors of the running graph (on CUDA on request)."""

    def f(s: Tensor, mask: Tensor, ids: Tensor, denominator: Tensor) -> Tensor:
        options = {"reduction": "seq-mean-token-mean", "seq_ids": ids, "denominator": denominator}
        return rk.grpo_loss(s, s.detach() - 0.1, s.detach(), mask, **options).loss

    call = torch.compile(f, backend=backend, fullgraph=True)
    s, mask, ids, two = torch.randn(N).requires_grad_(), torch.ones(N), torch.tensor([0, 0, 1, 1, 1, 4]), torch.tensor(2.0)
    with rk.set_checks(True):
        call(s, mask, ids, two).backward()
        assert s.grad.abs().max() > 0
        for bad, message in (
            ((mask * 2, ids, two), r"^grpo_loss: mask must hold bools, or numbers equal to 0 or 1, got 2.0"),
            ((mask, ids.flip(0), two), r"^grpo_loss: seq_ids must be non-decreasing"),
            ((mask, ids, two * 0), r"^grpo_loss: denominator must be positive, got 0.0"),
        ):
            for g in (f, call):
                with pytest.raises(ValueError, match=message):
                    g(s, *bad)
