"""The budgets that results are held to: the same on every machine, wide enough for any order of a sum, and no wider."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.methods.divergence import VALUES, kl
from tests.oracles import EPS, budget, gradient, hold, within

ROWS, DIM, VOCAB = 12, 32, 300


def head(value: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A divergence from the hidden states of student and teacher."""

    def formula(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return value((h @ w.T).log_softmax(-1), (t @ w.T).log_softmax(-1))

    return formula


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(ROWS, DIM), torch.randn(VOCAB, DIM) / DIM**0.5 * 2, torch.randn(ROWS, DIM)


FORMULAS = {name: head(VALUES[name]) for name in ("forward_kl", "reverse_kl", "gkd_jsd", "abkd", "total_variation", "taid")}
FORMULAS |= {f"d {name}": gradient(f) for name, f in FORMULAS.items()}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.cpu)], ids=str)
def test_ten_times_the_budget_is_seen(dtype: torch.dtype, name: str) -> None:
    """In the smallest element too; and the budget is a hundred ulps of the largest at most."""
    eps, inputs = torch.finfo(dtype).eps, operands()
    exact, bound = budget(FORMULAS[name], *inputs, eps=eps)
    assert eps * exact.abs().max() <= bound <= 100 * eps * exact.abs().max()
    right = exact.to(dtype)
    hold(right, FORMULAS[name], *inputs)
    wrong = right.flatten().index_add(0, exact.abs().argmin(), torch.tensor([20 * bound], dtype=dtype)).view_as(right)
    with pytest.raises(AssertionError, match="exceeds"):
        hold(wrong, FORMULAS[name], *inputs)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_budget_holds_for_every_order_of_the_sums(name: str) -> None:
    """Plain float32 PyTorch with its words and its dimensions in any order; not with operands of ten bits."""
    h, w, t = operands()
    exact, bound = budget(FORMULAS[name], h, w, t)
    for _ in range(20):
        words, dims = torch.randperm(VOCAB), torch.randperm(DIM)
        within_order(FORMULAS[name](h[:, dims], w[words][:, dims], t[:, dims]), exact, bound, dims)
    coarse = FORMULAS[name](*(((x * 4097) - (x * 4097 - x)) for x in (h, w, t)))
    with pytest.raises(AssertionError, match="exceeds"):
        within(coarse, exact, bound)


def within_order(found: Tensor, exact: Tensor, bound: float, dims: Tensor) -> None:
    within(found[:, dims.argsort()] if found.dim() == 2 else found, exact, bound)


def test_a_budget_is_the_same_number_each_time() -> None:
    inputs = operands()
    first, second = (budget(FORMULAS["d taid"], *inputs)[1] for _ in range(2))
    assert first == second


def test_a_budget_knows_where_a_difference_cancels() -> None:
    x = torch.full((64,), 1e-3)
    careless, careful = (budget(f, x)[1] for f in (lambda x: x.exp() - 1, torch.expm1))
    assert careful < 1e-9 < 0.5 * EPS < careless < 4 * EPS


def test_a_budget_of_float64_is_that_of_float32_in_its_ulps() -> None:
    inputs = operands()
    single, double = (budget(head(kl), *inputs, eps=eps)[1] for eps in (EPS, 2.0**-52))
    assert double == pytest.approx(single * 2.0**-29, rel=1e-6)


def test_a_sum_that_no_rule_is_for_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"no rule for the roundings of aten\.prod"):
        budget(lambda x: x.prod(), torch.ones(3))
