"""How many operations a call dispatches: a small one costs its launches and nothing else, so there must be few."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rlad_kernels as rk
from rlad_kernels.engine import logp, topk
from rlad_kernels.engine.op import SWEEP_OPS

pytestmark = pytest.mark.interpreted

N, D, V = 64, 16, 384
# they compute nothing and launch nothing
FREE = {
    *("alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "select", "slice", "split", "squeeze", "t"),
    *("transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"),
    *("new_empty_strided",),
    "_to_copy",  # CPUs have no product of bfloat16 matrices with a float32 result: the operands are widened, which CUDA never does
}
SWEEPS = {name: getattr(m, name) for m in (logp, topk) for name in SWEEP_OPS if hasattr(m, name)}


class Operations(TorchDispatchMode):
    """Counts what is dispatched, inside the sweeps too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        with self:
            parts = func.decompose(*args, **kwargs) if func.namespace == "aten" else NotImplemented
            if parts is not NotImplemented:
                return parts
        if name not in FREE:
            self.found[name] += 1
        if func.namespace == "rlad" and name in SWEEPS:
            with self:
                return SWEEPS[name](*args, **kwargs)
        return func(*args, **kwargs)


def operations(step: Any) -> Counter[str]:
    with Operations() as counted:
        step()
    return counted.found


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, rk.LMHead, torch.Tensor]:
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    return hidden, rk.LMHead(torch.randn(V, D, dtype=dtype, requires_grad=True)), torch.randint(0, V, (N,))


DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


@DTYPES
def test_forward_and_backward_of_a_small_call(dtype: torch.dtype) -> None:
    hidden, head, target = inputs(dtype)
    found = operations(lambda: rk.linear_logp(hidden, head, target).logp.sum().backward())
    assert found["mm"] + found["addmm"] + found["addmm_"] == 4  # one tile
    assert found.total() <= 40, found


@DTYPES
def test_top_k_of_a_small_call(dtype: torch.dtype) -> None:
    hidden, head, _ = inputs(dtype)
    with torch.no_grad():
        found = operations(lambda: rk.linear_topk(hidden, head, 8))
    assert found["mm"] == found["fold_topk_"] == 1
    assert found.total() <= 25, found


@DTYPES
def test_each_tile_more(dtype: torch.dtype) -> None:
    hidden, head, target = inputs(dtype)

    def forward(tiles: int) -> Any:
        with rk.set_tile(rows=N, cols=V // tiles):
            return rk.linear_logp(hidden, head, target).logp

    def both(tiles: int) -> None:
        with rk.set_tile(rows=N, cols=V // tiles):
            forward(tiles).sum().backward()
        hidden.grad = head.weight.grad = None

    one, three = operations(lambda: forward(1)).total(), operations(lambda: forward(3)).total()
    assert three - one <= 2 * 4
    whole = operations(lambda: both(3)).total() - operations(lambda: both(1)).total()
    assert whole - (three - one) <= 2 * 6
