"""`keep`: logits that wait for the backward give the gradients that computing them again gives, whichever rows they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.sizes import byte_size
from rlad_kernels.engine import held, tiles
from tests.sweeps import leaf, problem, relative

N, V = 300, 131
ROW = 4 * 192  # bytes: rows of logits start at multiples of 64 elements
MASKS = ("none", "some", "no gradient")


def gradients(p: Any, keep: int | str | None, a: Tensor, mask: Tensor | None, **options: Any) -> list[Tensor]:
    hidden, weight, bias = leaf(p.hidden), leaf(p.weight), leaf(p.bias)
    scores = rk.linear_logp(hidden, rk.LMHead(weight, bias, **options), p.target, mask=mask, entropy=True, keep=keep)
    loss = (scores.logp * a).sum() + (scores.entropy * a * 0.3).sum()
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight, bias))
    assert all(map(torch.equal, first, again))  # what was kept is as it was
    return [scores.logp.detach(), *first]


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("rows", (0, 128, 256, N), ids="{} rows".format)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gradients_are_bitwise_those_without(dtype: torch.dtype, mask: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p, a = problem(n=N, v=V, d=16, dtype=dtype), torch.randn(N)
    keep = (torch.arange(N) % 3 > 0) if mask == "some" else None
    if mask == "no gradient":
        a[::2] = 0
    products: list[int] = []
    real = tiles.Tiles.logits
    monkeypatch.setattr(
        tiles.Tiles, "logits", lambda self, r0, r1, w, out=None: products.append(r1 - r0) or real(self, r0, r1, w, out)
    )
    with rk.set_tile(rows=128, cols=64):
        want = gradients(p, 0, a, keep)
        computed, products[:] = sum(products), []
        got = gradients(p, rows * ROW, a, keep)
    # where the rows without gradient move those that are kept, tiles have other rows, and sums another order
    moved = mask == "no gradient" and 0 < rows < N
    limit = 0 if not moved else 1e-6 if dtype == torch.float32 else 4e-3
    assert all(relative(mine, exact) <= limit for mine, exact in zip(got, want, strict=True))
    held = {"none": rows, "some": min(rows, 200), "no gradient": -(-rows // 2)}[mask]
    assert computed - sum(products) == 2 * held * -(-V // 64)  # two backwards


@pytest.mark.slow_interpreted
def test_the_setting_and_a_softcap() -> None:
    p, a = problem(n=40, v=V, d=16), torch.randn(40)
    want = gradients(p, None, a, None, softcap=3.0, temperature=0.7)
    with rk.set_keep("1MiB"):
        got = gradients(p, None, a, None, softcap=3.0, temperature=0.7)
        none = gradients(p, 0, a, None, softcap=3.0, temperature=0.7)
    assert all(map(torch.equal, got, want)) and all(map(torch.equal, none, want))


@pytest.mark.cpu
def test_compiled() -> None:
    p, a = problem(n=40, v=V, d=16), torch.randn(40)
    with rk.set_keep("1MiB"):

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            return (rk.linear_logp(hidden, rk.LMHead(weight), p.target).logp * a).sum()

        leaves = leaf(p.hidden), leaf(p.weight)
        want = torch.autograd.grad(loss(*leaves), leaves)
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(map(torch.equal, got, want))


@pytest.mark.slow_interpreted
def test_nothing_is_kept_where_it_would_not_be_used() -> None:
    p = problem(n=40, v=V, d=16)
    seen: list[int] = []
    original = held.held_rows
    cases = {
        "no gradient": lambda: rk.linear_logp(p.hidden.detach(), rk.LMHead(p.weight.detach()), p.target, keep="1GiB"),
        "frozen head": lambda: rk.linear_logp(leaf(p.hidden), rk.LMHead(p.weight.detach()), p.target, keep="1GiB"),
        "sparse": lambda: rk.linear_logp(leaf(p.hidden), rk.LMHead(leaf(p.weight)), p.target, keep="1GiB", filter_eps=1e-3),
    }
    try:
        held.held_rows = lambda *args: seen.append(original(*args)) or seen[-1]
        for case in cases.values():
            case()
        assert seen == [0] * len(cases)
        with rk.set_compaction(False):
            rk.linear_logp(leaf(p.hidden), rk.LMHead(leaf(p.weight)), p.target, keep="1GiB").logp.sum().backward()
        assert seen[-1] == 0
    finally:
        held.held_rows = original


def test_bytes() -> None:
    assert (byte_size("f", "x", "2GiB"), byte_size("f", "x", "1.5 kb"), byte_size("f", "x", 7)) == (2 << 30, 1536, 7)
    for wrong in (-1, "2 gallons", 1.5, True, None, ""):
        with pytest.raises(ValueError, match="f: x must be a number of bytes"):
            byte_size("f", "x", wrong)
    with pytest.raises(ValueError, match="linear_logp: keep must be"):
        rk.linear_logp(torch.ones(1, 2), rk.LMHead(torch.ones(3, 2)), torch.tensor([0]), keep="lots")
    with pytest.raises(ValueError, match="set_keep: memory must be"):
        rk.set_keep(-5)
