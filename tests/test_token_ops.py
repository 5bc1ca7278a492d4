"""The kernels that close a row and open its gradient, against their plain PyTorch twins in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlad_kernels.engine.gradients import row_cotangents_cpu
from rlad_kernels.engine.outputs import row_outputs_cpu, row_slots_cpu
from tests.conftest import DEVICE, INTERPRET

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRET, reason="on CPU the twins are what runs")

N, V = 37, 500
OPS = torch.ops.rlad


def rows(j: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics, slot logits and slots of random rows: duplicates, empty slots, slots without mass, rows without a rest."""
    z = torch.randn(N, V, dtype=torch.float64) * spread
    slots = torch.randint(-1, V, (N, j), dtype=torch.int32)
    slots[:, 0].clamp_(min=0)
    slots[::3, j // 2] = slots[::3, 0]
    slots[1::3, j // 3] = slots[1::3, -1].clamp(min=0)
    z[2, slots[2, 0]] = -torch.inf
    at = torch.where(slots < 0, 0, slots).long()
    picked = torch.where(slots < 0, -torch.inf, z.gather(1, at))
    z = z.scatter(1, at, torch.where(slots < 0, z.gather(1, at), -torch.inf))
    z = torch.where(torch.arange(N)[:, None] == 5, -torch.inf, z)
    top = z.amax(1)
    e = (z - torch.where(top.isinf(), 0, top)[:, None]).exp()
    gap = torch.where(e > 0, e * (z - top[:, None]), 0)
    sumz = torch.where(z.isinf(), 0, z).sum(1)
    stats = torch.stack([top, e.sum(1), gap.sum(1), (e * e).sum(1), sumz, z.argmax(1).to(z.dtype)])
    return stats, picked, slots


def close(found: Tensor, want: Tensor, scale: float = 8.0) -> None:
    """Within a few ulp of each value, or of 1."""
    want = want.to(found.device)
    assert found.shape == want.shape
    assert torch.equal(found.isnan(), want.isnan())
    same = (found == want) | found.isnan()
    assert (same | ((found - want).abs() <= scale * 2**-24 * want.abs().clamp(min=1))).all(), (found - want).abs().max()


@pytest.mark.parametrize("target", (True, False))
@pytest.mark.parametrize(("j", "spread"), ((1, 0.1), (1, 60.0), (2, 3.0), (17, 0.1), (17, 60.0), (140, 3.0)))
def test_outputs(j: int, spread: float, target: bool) -> None:
    stats, z, slots = rows(j, spread)
    stats, z = stats.float(), z.float()  # what the kernel is given is exact: both see the same numbers
    found = OPS.row_outputs(stats, z, slots, V, target, True, True, target)
    want = row_outputs_cpu(stats.double(), z.double(), slots, V, target, True, True, target)
    for name, mine, exact in zip(want._fields, found, want, strict=True):
        if name == "is_top1":
            assert torch.equal(mine, exact)
        elif name == "lse_error":  # of the kernel's own lse
            error = found[1].double() - want.lse
            assert ((mine - error).abs()[~error.isnan()] <= 4e-7 * (1 + want.lse.abs()[~error.isnan()])).all()
        elif name == "log_sum_sq_probs":
            close(mine, exact, 32.0)
        else:
            close(mine, exact, 16.0 if name in ("entropy", "tail_logp") else 8.0)


def test_outputs_of_ids_out_of_range_are_nan() -> None:
    stats, z, slots = rows(3, 1.0)
    slots[4, 1] = V
    found = OPS.row_outputs(stats.float(), z.float(), slots, V, True, True, True, True)
    for x in found:
        if x.is_floating_point():
            assert x[4].isnan().all() and not x[6].isnan().any()


@pytest.mark.parametrize(
    ("j", "asked"), ((1, ""), (1, "l"), (1, "b"), (2, "lbct"), (17, "c"), (17, "t"), (17, "lbct"), (140, "lbct"))
)
def test_cotangents(j: int, asked: str) -> None:
    stats, z, slots = rows(j, 3.0)
    o = row_outputs_cpu(stats, z, slots, V, True, True, True, False)
    o = o._replace(
        **{k: torch.nan_to_num(getattr(o, k), nan=0.0).float() for k in ("logp", "lse", "entropy", "topk_logp", "tail_logp")}
    )
    error = torch.randn(N) * 1e-7
    k = j - 1
    a, l, b, c, t = torch.randn(N), torch.randn(N), torch.randn(N), torch.randn(N, k), torch.randn(N)
    cots = [a, *(x if name in asked else None for name, x in (("l", l), ("b", b), ("c", c), ("t", t)))]
    more = [o.entropy if "b" in asked else None, o.tail_logp if "t" in asked else None]
    given = [slots, o.logp, o.topk_logp if k else None, o.lse, error, *cots, *more]
    own, dz, found = OPS.row_cotangents(*given)
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]
    want_own, want_dz, want = row_cotangents_cpu(*exact)

    def spread(ids: Tensor, x: Tensor) -> Tensor:
        assert all(len(r[r >= 0].unique()) == (r >= 0).sum() for r in ids)  # a column has one slot
        out = torch.zeros(N, V + 1, dtype=torch.float64)
        return out.scatter(1, torch.where(ids < 0, V, ids).long(), torch.where(ids < 0, 0, x.double()))

    assert torch.equal(spread(own, own + 1), spread(want_own, want_own + 1))
    mine, theirs = spread(own, dz), spread(want_own, want_dz)
    size = 1 + sum(x.abs().sum(1) if x.dim() > 1 else x.abs() for x in (a, l, b * (1 + o.entropy), c, t))
    assert ((mine - theirs).abs() <= 64 * 2**-24 * size[:, None]).all(), ((mine - theirs).abs() / size[:, None]).max()
    for mine, theirs in zip(found, want, strict=True):
        assert torch.equal(mine.isinf(), theirs.isinf())
        gap = torch.where(mine.isinf(), 0, mine - theirs).abs()
        limit = 64 * 2**-24 * (size + torch.where(theirs.isinf(), 0, theirs.abs()))
        assert (gap <= limit).all(), (gap / limit).max()


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32), ids=str)
def test_slots(dtype: torch.dtype) -> None:
    target = torch.tensor([0, V - 1, V, -1, -100], dtype=dtype)
    ids = torch.tensor([[0, -1], [V, 3], [-2, 4], [V - 1, 2], [1, 1]])
    want = torch.tensor([[0, 0, -1], [V - 1, V, 3], [V, V, 4], [V, V - 1, 2], [V, 1, 1]], dtype=torch.int32)
    for given in ((target, ids), (target, None), (None, ids)):
        at = slice(0 if given[0] is not None else 1, 3 if given[1] is not None else 1)
        assert torch.equal(OPS.row_slots(*given, V), want[:, at])
        assert torch.equal(row_slots_cpu(*given, V), want[:, at])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("factor", (1.0, 0.3, torch.nan))
def test_scale(dtype: torch.dtype, factor: float) -> None:
    x = torch.randn(3, 5000).to(dtype)
    want = (x.float() * factor).to(dtype)
    OPS.scale_(x, torch.tensor(factor))
    assert torch.equal(x, want) or (factor != factor and x.isnan().all())
    OPS.scale_(x[:0], torch.tensor(factor))
    with pytest.raises(ValueError, match="contiguous"):
        OPS.scale_(x[:, ::2], torch.tensor(factor))
