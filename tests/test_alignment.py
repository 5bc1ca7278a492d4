"""On CUDA each operand of a product starts its rows where cuBLAS's fast kernels want them, whatever the shapes.

No GPU is needed: the engine runs on fake tensors that say they are on CUDA, and what it multiplies is written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import rlad_kernels as rk
from rlad_kernels.core.config import settings
from rlad_kernels.engine import divergence, logp, loss, tiles, topk
from rlad_kernels.engine.call import Call

pytestmark = pytest.mark.cpu

D, K = 256, 16
# rows, vocabulary, and what set_tile was told
SHAPES = [
    (8191, 50_257, None),
    (4321, 32_003, None),
    (8192, 151_655, None),
    (64, 32_003, None),
    (1, 50_257, None),
    (8191, 50_257, (1000, 18_994)),
    (2 * D - 1, 50_257, (128, None)),  # whose dlogits wait for one product
    (300, 50_304, (128, None)),  # and d_weight's memory holds a chunk's logits
    (4321, 32_003, (3000, 5000)),
]


class Products(TorchFunctionMode):
    """Writes down the matrices of each product."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.__name__ in ("mm", "addmm", "addmm_"):
            self.matrices += [x for x in (*args, *kwargs.values(), out) if isinstance(x, Tensor)]
        return out


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    settings.tile_rows, settings.tile_cols = request.param[2] or (None, None)
    return request.param[:2]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[Products]:
    settings.compaction = False  # how many rows are kept, nobody knows here
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tiles, "INTERPRET", True)  # no huge pages
    monkeypatch.setattr(tiles, "has_bf16_mm", lambda: False)
    for sizes in (tiles._TILE, tiles._CHUNK_BYTES, tiles._WHOLE):
        monkeypatch.setitem(sizes, "cpu", sizes["cuda"])
    with FakeTensorMode(), Products() as found:
        yield found


def call(n: int, v: int, bias: bool = True) -> Call:
    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    return Call(new(n, D), new(v, D), new(v) if bias else None, new(1, dtype=torch.float32), 1.0, 0.0, v)


def row(n: int, *more: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(n, *more, dtype=dtype)


def check(found: Products) -> None:
    assert found.matrices
    for x in found.matrices:
        along, across = sorted(x.stride())
        assert along == 1 or 1 in x.shape, (tuple(x.shape), x.stride())
        assert across % 64 == 0 or 1 in x.shape, (tuple(x.shape), x.stride())
        assert x.storage_offset() * x.element_size() % 128 == 0, (tuple(x.shape), x.storage_offset())


@pytest.mark.parametrize("keep", (0, 200 << 20))
def test_log_probs(keep: int, shape: tuple[int, int], products: Products) -> None:
    n, v = shape
    c, target, ids = call(n, v), row(n, dtype=torch.int64), row(n, K, dtype=torch.int32)
    s = logp.linear_logp(*c[:3], target, ids, None, *c[3:], True, True, False, 0.0, False, keep, "linear_logp")
    saved = (s.logp, s.topk_logp, s.lse, s.lse_error, s.entropy, s.tail_logp, s.slope, s.keep_columns, s.mean, s.logits)
    grads = (row(n), row(n), row(n), row(n, K), row(n))
    logp.linear_logp_bwd(*c[:3], target, ids, None, *c[3:], *saved, *grads, True, True, True)
    check(products)


def test_top_k(shape: tuple[int, int], products: Products) -> None:
    c = call(*shape)
    topk.linear_topk(*c[:3], None, None, *c[3:], 64, False)
    check(products)


def test_a_loss_in_the_sweep(shape: tuple[int, int], products: Products) -> None:
    n, v = shape
    target, given = row(n, dtype=torch.int64), {"advantages": row(n), "old_logp": row(n)}
    keep = row(n, dtype=torch.bool)
    loss.run("test", call(n, v), target, keep, row(n), rk.losses.GRPO(), given, 0.0, (True, True, True))
    check(products)


def test_a_divergence(shape: tuple[int, int], products: Products) -> None:
    n, v = shape
    divergence.run("test", call(n, v), [call(n, v)], row(1, n), rk.losses.JSD(), None, row(n), (True, True, True))
    check(products)


def test_kept_columns() -> None:
    n, v = 300, 1001
    c = Call(torch.randn(n, 64), torch.randn(v, 64), None, torch.ones(1), 1.0, 0.0, v)
    given = {"advantages": torch.randn(n), "old_logp": torch.zeros(n)}
    keep, weight = torch.ones(n, dtype=torch.bool), torch.ones(n)
    with Products() as found:
        loss.run("test", c, torch.arange(n), keep, weight, rk.losses.GRPO(), given, 1e-3, (True, True, True))
    check(found)
