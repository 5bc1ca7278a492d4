"""Every call under ``inference_mode`` and ``no_grad``, and on tensors that were made there: what training gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import rlad_kernels as rk
from rlad_kernels.losses.methods import METHODS
from tests.methods import case
from tests.sweeps import Problem, problem


def made_in_inference_mode(x: Any) -> Any:
    with torch.inference_mode():
        return tree_map_only(Tensor, torch.clone, x)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", METHODS)
def test_methods_without_autograd(name: str, mode: type) -> None:
    call, leaves, given = case(name)
    want = call(**{**given, **{k: given[k].clone().requires_grad_() for k in leaves}})
    with mode():
        got = call(**given)
    assert torch.equal(got.loss, want.loss.detach())
    assert torch.equal(got.token_loss, want.token_loss)
    assert all(torch.equal(x, want.metrics[key]) for key, x in got.metrics.items())
    assert want.metrics.keys() - got.metrics.keys() <= {"rows_skipped"}


@pytest.mark.parametrize("name", METHODS)
def test_methods_on_tensors_of_inference_mode(name: str) -> None:
    call, leaves, given = case(name)
    found = []
    for rest in (given, made_in_inference_mode(given)):
        tensors = [given[k].clone().requires_grad_() for k in leaves]
        out = call(**{**rest, **dict(zip(leaves, tensors, strict=True))})
        found.append([out.loss.detach(), *torch.autograd.grad(out.loss, tensors)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def teacher_of(p: Problem, weight: Tensor) -> rk.TopK:
    return rk.linear_topk(p.hidden, rk.LMHead(weight), 4, target=p.target)


def _rlad(p: Problem, weight: Tensor, old: Tensor, teacher: rk.TopK, mask: Tensor) -> Any:
    rlad = rk.losses.RLAD(topk=rk.losses.TopKKL(normalize="tail"), topk_coef=0.5, reduction="token-mean")
    reduction = rk.Reduction(denominator=old.new_full((), 7.0))
    given = {"old_logp": old, "advantages": old + 2, "teacher": teacher}
    return rk.linear_loss(p.hidden, p.head, p.target, rlad, **given, mask=mask, reduction=reduction)


@dataclass(frozen=True, kw_only=True)
class Own(rk.TokenLoss):
    needs = ("w",)
    reads = ("logp", "entropy")

    def tokens(self, scores: rk.TokenScores, *, w: Tensor) -> Any:
        return scores.logp.exp() * w + scores.entropy, {}


@dataclass(frozen=True)
class OwnDivergence(rk.losses.Divergence):
    def values(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return (student_logp.exp() * (student_logp - teacher_logp)).sum(1)


CALLS: dict[str, Callable[..., Any]] = {
    "linear_logp": lambda p, weight, old, teacher, mask: rk.linear_logp(
        p.hidden, p.head, p.target, topk_ids=teacher.ids, entropy=True, tail=True, mask=mask
    ),
    "linear_logp frozen": lambda p, weight, old, teacher, mask: (
        rk.linear_logp(p.hidden, rk.LMHead(p.weight.detach()), p.target, mask=mask).logp
    ),
    "linear_logp sparse": lambda p, weight, old, teacher, mask: (
        rk.linear_logp(p.hidden, p.head, p.target, mask=mask, filter_eps=1e-9).logp
    ),
    "linear_topk": lambda p, weight, old, teacher, mask: rk.linear_topk(p.hidden, p.head, 3, target=p.target, mask=mask),
    "linear_gather": lambda p, weight, old, teacher, mask: rk.linear_gather(p.hidden, p.head, teacher.ids, mask=mask),
    "linear_support": lambda p, weight, old, teacher, mask: rk.linear_support(p.hidden, p.head, teacher.ids, mask=mask),
    "linear_divergence": lambda p, weight, old, teacher, mask: rk.linear_divergence(
        p.hidden, p.head, p.hidden.detach(), rk.LMHead(weight), rk.losses.ForwardKL(), mask=mask
    ),
    "linear_loss on a support": lambda p, weight, old, teacher, mask: rk.linear_loss(
        p.hidden, p.head, p.target, rk.losses.TopKKL(), teacher=teacher, mask=mask
    ),
    "linear_loss rlad": _rlad,
    "linear_loss own": lambda p, weight, old, teacher, mask: rk.linear_loss(p.hidden, p.head, p.target, Own(), w=old, mask=mask),
    "own divergence": lambda p, weight, old, teacher, mask: rk.linear_divergence_loss(
        p.hidden, p.head, p.hidden.detach(), rk.LMHead(weight), OwnDivergence(), mask=mask, weights=old.abs()
    ),
    "sequence_stat": lambda p, weight, old, teacher, mask: rk.spans.sequence_stat(
        rk.linear_logp(p.hidden, p.head, p.target).logp, mask, how="min", seq_ids=torch.arange(9) // 3
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_from_hidden_states(name: str) -> None:
    """Under inference_mode; and in training with an old policy, a teacher and a mask that were computed under it."""
    p = problem(n=9, v=41)
    weight, mask = p.weight.detach().roll(1, 0), torch.rand(9) > 0.3

    def scored() -> tuple[Tensor, Tensor, rk.TopK, Tensor]:
        return weight.clone(), rk.linear_logp(p.hidden, p.head, p.target).logp.detach() - 0.1, teacher_of(p, weight), mask.clone()

    normal = scored()
    with torch.inference_mode():
        there = scored()
        got = CALLS[name](p, *there)
    want = CALLS[name](p, *normal)
    assert all(torch.equal(x, y) for x, y in zip(_tensors(got), _tensors(want), strict=True))
    trained = CALLS[name](p, normal[0], *there[1:])
    grads = [_gradients(out, p) for out in (want, trained)]
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def _tensors(out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out[:2] if isinstance(out, rk.losses.LossOutput) else out) if isinstance(x, Tensor)]


def _gradients(out: Any, p: Problem) -> list[Tensor]:
    values = [torch.where(x.isfinite(), x, 0).sum() for x in _tensors(out) if x.requires_grad]
    return [g for g in torch.autograd.grad(sum(values), p.leaves, allow_unused=True) if g is not None] if values else []
