"""How the Triton row passes cut a row into blocks and programs: what only shows at their borders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlad_kernels.backends.triton import dlogits
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
