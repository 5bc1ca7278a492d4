"""torch.compile, fullgraph: any number of tokens, annealed numbers in one graph, and the same checks of values as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

import rlad_kernels as rk
from tests.methods import case
from tests.sweeps import problem
from tests.test_inference_mode import teacher_of

N = 6

pytestmark = pytest.mark.slow_interpreted  # what is traced is the same on every backend


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


@pytest.mark.parametrize("name", [name for name, m in rk.METHODS.items() if m.family == "divergence"])  # others: test_both_roads
def test_divergences_compile_with_dynamic_shapes(name: str) -> None:
    call, leaves, given = case(name)
    given |= {k: given[k].clone().requires_grad_() for k in leaves}
    want, got = call(**given), Compiled(lambda xs: call(**xs), dynamic=True).call(given)
    bound = 64 * torch.finfo(torch.float32).eps * want.token_loss.abs().max()
    assert (got.loss - want.loss).abs() <= bound
    assert (got.token_loss - want.token_loss).abs().max() <= bound
    assert got.metrics.keys() == want.metrics.keys()


def _hidden_calls() -> dict[str, Callable[..., Tensor]]:
    losses = rk.losses

    def old(h: Tensor) -> Tensor:
        return h[:, 0] - 3

    def sampled(h: Tensor) -> dict[str, Tensor]:
        return {"old_logp": old(h), "advantages": old(h) + 3}

    return {
        "linear_logp": lambda h, head, y, c: rk.linear_logp(h, head, y, entropy=True).logp.sum(),
        "linear_gather": lambda h, head, y, c: rk.linear_gather(h, head, y.unsqueeze(1)).sum(),
        "linear_loss": lambda h, head, y, c: rk.linear_loss(h, head, y, losses.CrossEntropy(z_loss=c)).loss,
        "linear_loss trrd": lambda h, head, y, c: rk.linear_loss(
            h, head, y, losses.TRRD(alpha=c), **sampled(h), teacher_logp=old(h) + 0.1, reduction="token-mean"
        ).loss,
        "linear_divergence": lambda h, head, y, c: rk.linear_divergence(h, head, h.detach() + 1, head, losses.TAID(c)).sum(),
        "linear_divergence_loss": lambda h, head, y, c: rk.linear_divergence_loss(
            h, head, h.detach() + 1, head, losses.JSD(c)
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
    hidden, losses = _hidden_calls(), rk.losses
    one, sampled = {"reduction": "token-mean"}, {"old_logp": old, "advantages": adv}
    taught = {**sampled, "teacher_logp": old - 0.2, **one}

    def sweep(loss: rk.TokenLoss, **given: Any) -> Tensor:
        return rk.linear_loss(p.hidden, p.head, p.target, loss, **given).loss

    def rlad(coef: float, scale: float = 1.0) -> Tensor:
        loss = losses.RLAD(topk=losses.TopKKL(scale=scale), topk_coef=coef)
        return sweep(loss, **sampled, teacher=teacher, **one)

    def divergence(teachers: int = 1, **given: Any) -> Tensor:
        states, heads = [p.hidden.detach()] * teachers, [other] * teachers
        return rk.linear_divergence_loss(p.hidden, p.head, states, heads, losses.ForwardKL(), **given).loss

    return {
        "grpo reference.coef": lambda c: losses.GRPO(reference=losses.Reference(c))(s, **sampled, ref_logp=old).loss,
        "grpo clip": lambda c: losses.GRPO(clip=(c, c + 0.1))(s, **sampled).loss,
        "grpo denominator": lambda c: losses.GRPO()(s, **sampled, reduction=rk.Reduction(denominator=100 * c)).loss,
        "trrd alpha": lambda c: losses.TRRD(alpha=c)(s, **taught).loss,
        "trrd teacher_clamp": lambda c: losses.TRRD(teacher_clamp=c)(s, **taught).loss,
        "kdrl kd_coef": lambda c: losses.KDRL(kd_coef=c)(s, **taught).loss,
        "opd coef": lambda c: losses.OPD(coef=c)(s, old_logp=old, teacher_logp=old - 0.2, **one).loss,
        "sweep grpo clip": lambda c: sweep(losses.GRPO(clip=(c, c + 0.1)), **sampled),
        "sweep grpo rollout": lambda c: sweep(losses.GRPO(rollout=losses.Rollout(high=c)), **sampled, rollout_logp=old - 0.1),
        "sweep gspo clip": lambda c: sweep(
            losses.GSPO(clip=(c, c + 0.1)), **sampled, reduction=rk.Reduction("token-mean", seq_ids=torch.zeros(N).long())
        ),
        "sweep grpo reference.coef": lambda c: sweep(losses.GRPO(reference=losses.Reference(c)), **sampled, ref_logp=old),
        "sweep topk_kl scale": lambda c: sweep(losses.TopKKL(scale=c), teacher=teacher),
        "sweep topk_kl tail": lambda c: sweep(losses.TopKKL("mixed", normalize="tail", beta=c), teacher=teacher),
        "sweep rlad topk_coef": lambda c: rlad(c),
        "sweep rlad topk.scale": lambda c: rlad(1.0, scale=c),
        "temperature": lambda c: rk.linear_logp(p.hidden, rk.LMHead(p.weight, temperature=c), p.target).logp.sum(),
        "divergence scale": lambda c: divergence(scale=c),
        "teacher_weights": lambda c: divergence(2, teacher_weights=(c, 1 - c)),
        **{
            name: lambda c, f=hidden[name]: f(p.hidden, p.head, p.target, c)
            for name in hidden if name not in ("linear_logp", "linear_gather")
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
        reduction = rk.Reduction("seq-mean-token-mean", seq_ids=ids, denominator=denominator)
        return grpo(s, old_logp=s.detach() - 0.1, advantages=s.detach(), mask=mask, reduction=reduction).loss

    grpo = rk.losses.GRPO()
    call = torch.compile(f, backend=backend, fullgraph=True)
    s, mask, ids, two = torch.randn(N).requires_grad_(), torch.ones(N), torch.tensor([0, 0, 1, 1, 1, 4]), torch.tensor(2.0)
    with rk.set_checks(True):
        call(s, mask, ids, two).backward()
        assert s.grad.abs().max() > 0
        for bad, message in (
            ((mask * 2, ids, two), r"^GRPO: mask must hold bools, or numbers equal to 0 or 1, got 2.0"),
            ((mask, ids.flip(0), two), r"^GRPO: seq_ids must be non-decreasing"),
            ((mask, ids, two * 0), r"^GRPO: denominator must be positive, got 0.0"),
        ):
            for g in (f, call):
                with pytest.raises(ValueError, match=message):
                    g(s, *bad)
