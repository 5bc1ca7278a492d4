"""How the Triton row passes cut a row into blocks and programs: what only shows at their borders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlad_kernels.backends.triton import divergence, dlogits, fold, topk
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


TIES = {
    "constant": lambda cols: torch.zeros(cols),
    "nothing": lambda cols: torch.full((cols,), -INF),
    "two values": lambda cols: (torch.arange(cols) % 3 == 0).float(),
    "ties below the top": lambda cols: torch.where(torch.arange(cols) % 400 == 7, torch.randn(cols) + 9, 2.0),
    "ascending": lambda cols: torch.arange(cols) / 64,
    "descending": lambda cols: -torch.arange(cols) / 64,
    "one lane": lambda cols: torch.where(torch.arange(cols) % 1024 == 5, 50 + torch.arange(cols) % 7, torch.randn(cols)),
    "both zeros": lambda cols: torch.where(torch.arange(cols) % 2 == 0, 0.0, -0.0),
    "infinite": lambda cols: torch.where(torch.arange(cols) % 5 == 0, -INF, torch.randn(cols)),
}


def fold_all(x: torch.Tensor, k: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top-K and statistics of rows cut into tiles whose leading dimension is padded."""
    rows = x.shape[0]
    stats, top, ids = torch.zeros(6, rows), torch.full((rows, k), -INF), torch.full((rows, k), -1, dtype=I32)
    stats[0] = -INF
    for c0 in range(0, x.shape[1], width):
        part = x[:, c0 : c0 + width]
        tile = torch.full((rows, part.shape[1] + 5), 1e30)[:, : part.shape[1]].copy_(part)
        topk.fold_topk_(*plain(tile, c0), torch.empty(rows, 0, dtype=I32), stats, torch.empty(rows, 0), top, ids, True)
    return stats, top, ids


def check_top(x: torch.Tensor, k: int, width: int) -> None:
    stats, top, ids = fold_all(x, k, width)
    cols = x.shape[1]
    order = x.sort(dim=1, descending=True, stable=True).indices
    taken = min(k, cols)
    assert torch.equal(ids[:, :taken].long(), order[:, :taken].sort(1).values)
    assert (ids[:, taken:] == -1).all()
    assert torch.equal(top[:, :taken], x.gather(1, ids[:, :taken].long()))
    outside = x.double().scatter(1, ids[:, :taken].long(), -INF)
    m = outside.amax(1) if cols else stats[0].double()
    gap = torch.where(outside > -INF, outside - m.clamp(min=-1e30)[:, None], -1e4)
    e = gap.exp()
    assert torch.equal(stats[0].double(), m)
    torch.testing.assert_close(stats[1].double(), e.sum(1), rtol=3e-6, atol=1e-38)
    torch.testing.assert_close(stats[2].double(), (e * gap).sum(1), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("k", (1, 20, 128))
@pytest.mark.parametrize("kind", TIES)
def test_top_of_rows_with_more_candidates_than_fit(kind: str, k: int) -> None:
    """Whole, and in tiles: ties straddle them, and a full state is met by more columns above its least than the pool holds."""
    x = torch.stack([TIES[kind](3001), TIES[kind](3001).roll(1234)])
    check_top(x, k, 3001)
    check_top(x, k, 1100)


@pytest.mark.parametrize(("cols", "k", "width"), [(9000, 1024, 4500), (700, 1024, 300), (5, 32, 2), (5000, 300, 2500)])
def test_top_of_many_and_of_more_than_there_are(cols: int, k: int, width: int) -> None:
    x = torch.randn(2, cols).round(decimals=2)
    x[1] = x[1].sort().values  # every tile replaces the top
    check_top(x, k, width)


def test_nan_is_on_top_and_more_of_it_than_fits_reaches_the_sums() -> None:
    x = torch.randn(3, 2500)
    x[0, 2000:2002] = torch.nan
    x[1, ::2] = torch.nan
    stats, top, ids = fold_all(x, 4, 2500)
    assert {2000, 2001} < set(ids[0].tolist())
    assert stats[1, 0].isfinite()
    assert ids[1].tolist() == [0, 2, 4, 6]
    assert top[1].isnan().all()
    assert stats[1, 1].isnan()
    assert torch.equal(ids[2].long(), x[2].topk(4).indices.sort().values)


def test_top_repeats_bit_by_bit() -> None:
    x = torch.randn(2, 6000)
    for one, other in zip(fold_all(x, 64, 2000), fold_all(x, 64, 2000), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ("sym", "mix", "taid"))
def test_the_teacher_is_overwritten_for_a_gradient_only_and_never_past_its_columns(family: str) -> None:
    cols = 1030
    held = [torch.randn(2, cols + 6) for _ in range(3)]
    x, y, out = (part[:, :cols] for part in held)
    numbers = (0.3, 0.7, 0.4)

    def call(out: torch.Tensor | None, teacher: torch.Tensor, accumulate: bool) -> torch.Tensor:
        value = torch.zeros(2)
        sides = [
            (raw, None, torch.ones(2), 1.0, 0.0, torch.stack([raw.amax(1), raw.logsumexp(1) - raw.amax(1)])) for raw in (x, teacher)
        ]
        divergence.divergence_(value, out, *sides[0], *sides[1], torch.ones(4, 2), family, *numbers, accumulate)
        return value

    before, teacher = [part.clone() for part in held], y.clone()
    value = call(None, y, False)
    assert torch.equal(held[1], before[1])
    assert torch.equal(call(out, y, False), value)
    assert not torch.equal(y, teacher)
    for part, old in zip(held, before, strict=True):
        assert torch.equal(part[:, cols:], old[:, cols:])
    first = out.clone()
    call(out, teacher.clone(), True)
    torch.testing.assert_close(out, 2 * first, rtol=0, atol=0)
