"""How the Triton row passes cut a row into blocks and programs: what only shows at their borders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlad_kernels.backends.triton import dlogits, fold
from rlad_kernels.backends.triton._launch import pick
from tests.conftest import DEVICE, INTERPRET

pytestmark = [
    pytest.mark.skipif(not INTERPRET and DEVICE == "cpu", reason="Triton on the CPU needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy speaks up where a select discards inf − inf
]
INF, I32 = float("inf"), torch.int32


def plain(x: torch.Tensor, c0: int = 0, softcap: float = 0.0) -> Any:
    """The arguments from logits to softcap of a tile without bias or temperature."""
    return x, c0, None, torch.ones(x.shape[0]), 1.0, softcap


@pytest.mark.parametrize("cols", (7, 2100, 5000))
def test_a_grid_of_one_axis_holds_any_number_of_rows(cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    monkeypatch.setattr(dlogits, "launch", lambda kernel, grid, *args, **flags: grids.append(grid))
    x, none = torch.empty(1, cols).expand(70_000, cols), torch.empty(70_000, 0)
    dlogits.dlogits_(
        x, x, 0, None, torch.ones(70_000), 1.0, 0.0, none.to(I32), none, torch.empty(6, 1).expand(6, 70_000),
        none[:, :0].to(I32), None, False, False,
    )  # fmt: skip
    block = dict(pick(dlogits.TABLE, cols).blocks)["BLOCK"]
    assert grids == [(70_000 * -(-cols // block),)]
    assert grids[0][0] < 2**31


@pytest.mark.parametrize("softcap", (0.0, 5.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_slots_next_to_the_borders_of_blocks(softcap: float, dtype: torch.dtype) -> None:
    """Every program writes its own slots only, the target's one adds to `lost`, and nothing is written past the row's end."""
    cols, col0 = 4603, 1000
    block = dict(pick(dlogits.TABLE, cols).blocks)["BLOCK"]
    places = [0, block - 1, block, 2 * block - 1, 2 * block, cols - 1]
    slots = torch.tensor([[col0 - 1, *(col0 + c for c in places), col0 + cols, -1]] * 2, dtype=I32)
    x, slot_dz = torch.randn(2, cols + 7)[:, :cols], torch.randn(slots.shape)
    rows = torch.stack([x.logsumexp(1), *torch.randn(5, 2)])
    target, lost = slots[:, [4, 1]].diagonal()[:, None].contiguous(), torch.zeros(2, 1)
    held = torch.full((2, cols + 9), 7.0, dtype=dtype)
    dlogits.dlogits_(held[:, :cols], *plain(x, col0, softcap), slots, slot_dz, rows, target, lost, False, False)
    assert (held[:, cols:] == 7).all()
    slope = 1 / torch.cosh(x[:, places].double() / softcap) ** 2 if softcap else 1.0
    want = slot_dz[:, 1:-2].double() * slope
    got = held[:, places]
    torch.testing.assert_close(got.double(), want.to(dtype).double(), rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-9)
    exact = want[[0, 1], [3, 0]]  # each row's target
    gap = exact - got[[0, 1], [3, 0]].double()
    torch.testing.assert_close(lost[:, 0].double(), gap, rtol=0, atol=1e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("cols", (2048, 2049, 4500))
def test_fold_names_the_lowest_of_equal_maxima_in_whatever_block_they_are(cols: int) -> None:
    places = [[cols - 1], [cols - 1, 3], [5, 4], [700, cols // 2, cols - 2], [0, cols - 1], list(range(cols))]
    x = torch.randn(len(places), cols + 5)[:, :cols].clamp(max=4)
    for row, at in zip(x, places, strict=True):
        row[at] = 5.0
    stats = torch.zeros(6, len(places))
    stats[0] = -INF
    none = torch.empty(len(places), 0)
    fold.fold_(*plain(x, 11), none.to(I32), stats, none, True, True)
    assert stats[5].tolist() == [11 + min(at) for at in places]
    fold.fold_(*plain(x, 11 + cols), none.to(I32), stats, none, True, True)  # a later tile of the same maximum changes nothing
    assert stats[5].tolist() == [11 + min(at) for at in places]


@pytest.mark.parametrize("place", (0, 2047, 2048, 4499))
def test_nan_reaches_every_sum_and_no_other_row(place: int) -> None:
    x = torch.randn(2, 4500)
    x[0, place] = torch.nan
    stats = torch.zeros(6, 2)
    stats[0] = -INF
    none = torch.empty(2, 0)
    fold.fold_(*plain(x), none.to(I32), stats, none, True, True)
    assert stats[1:5, 0].isnan().all()
    assert stats[:, 1].isfinite().all()


def test_sums_far_below_the_maximum_keep_their_terms() -> None:
    """Rescaled from −3e4 upwards in every block, with −inf between: no inf·0."""
    x = torch.linspace(-3e4, -2.9e4, 6000).repeat(2, 1)
    x[1, ::7] = -INF
    stats = torch.zeros(6, 2)
    stats[0] = -INF
    none = torch.empty(2, 0)
    fold.fold_(*plain(x), none.to(I32), stats, none, True, True)
    z = x.double()
    gap = z - z.amax(1, keepdim=True)
    e = gap.exp()
    assert torch.equal(stats[0], x.amax(1))
    torch.testing.assert_close(stats[1].double(), e.sum(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(stats[2].double(), (e * gap.clamp(min=-1e5)).sum(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(stats[3].double(), (e * e).sum(1), rtol=2e-6, atol=0)
