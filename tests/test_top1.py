"""extras["is_top1"]: among equal logits the lowest id is the top one, as argmax chooses, wherever the equal ones stand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.backends.contract import INTERPRET


def top1(weight: Tensor, target: Tensor, ids: Tensor | None = None, **head: object) -> list[bool]:
    """``weight (V, 1)`` are the logits of every token."""
    hidden = torch.ones(len(target), 1, dtype=weight.dtype)
    found = rk.linear_logp(hidden, rk.LMHead(weight, **head), target, topk_ids=ids, extras="is_top1").extras["is_top1"]
    return found.tolist()


def test_the_issues_input() -> None:
    assert top1(torch.tensor([[2.0], [2.0], [1.0]]), torch.tensor([1, 0, 2])) == [False, True, False]


@pytest.mark.parametrize("tile", [None, (5, 61)], ids=str)
@pytest.mark.parametrize("v", [6, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_anywhere(dtype: torch.dtype, v: int, tile: tuple[int, int] | None) -> None:
    """Few different logits, so that most tokens tie: targets in and out of the support, duplicates, empty slots, −inf columns."""
    n, k, d = 12 if INTERPRET else 40, 5, 8
    hidden = torch.randint(-1, 2, (n, d)).to(dtype)
    weight, bias = torch.randint(-1, 2, (v, d)).to(dtype), torch.randint(0, 2, (v,)).to(dtype)
    bias[v // 3 + 1 :: 3] = -torch.inf
    z = hidden.double() @ weight.double().T + bias.double()
    tops = z.amax(1, keepdim=True)
    ranks = torch.where(z == tops, torch.rand(n, v, dtype=torch.float64), 0)
    target = torch.where(torch.arange(n) % 4 == 0, torch.randint(v, (n,)), ranks.argmax(1))  # mostly one of the largest
    ids = torch.randint(v, (n, k))
    ids[:, 0], ids[::2, 1], ids[::3, 2], ids[1::2, 3] = z.argmax(1), -1, target[::3], ids[1::2, 4]
    head, argmax = rk.LMHead(weight, bias), z.argmax(1)
    assert 0 < (argmax == target).sum() < n
    for support in (None, ids):
        with rk.set_tile(*(tile or (None, None))):
            s = rk.linear_logp(hidden, head, target, topk_ids=support, extras=("is_top1",))
        assert torch.equal(s.extras["is_top1"], argmax == target)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    """Over two stretches of a row, the tie between a lower and a higher column, in either order of target and other."""
    v = 9001
    for low, high in ((0, 1), (0, 9000), (4095, 4096), (4096, 8999), (17, 4100)):
        weight = torch.randn(v, 1, dtype=dtype)
        weight[low] = weight[high] = 9
        for ids in (None, torch.tensor([[high, 5], [low, 5]]), torch.tensor([[low, high]] * 2)):
            assert top1(weight, torch.tensor([low, high]), ids) == [True, False]
            assert top1(weight, torch.tensor([low, high]), ids, softcap=5.0, temperature=0.7) == [True, False]


def test_rows_of_minus_infinity_and_nan() -> None:
    bias = torch.full((4,), -torch.inf)
    assert top1(torch.ones(4, 1), torch.tensor([0, 1]), bias=bias) == [True, False]
    assert top1(torch.full((4, 1), torch.nan), torch.tensor([0, 1])) == [False, False]
