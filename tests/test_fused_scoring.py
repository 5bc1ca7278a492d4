"""The fully fused kernel: linear_logp through it against the tile path and the float64 oracle; its table and its raw outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.config import settings
from rlad_kernels.core.types import first_occurrence
from rlad_kernels.engine.statistics import Stats, add_slots, merge_tiles
from tests.sweeps import Problem, problem

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy speaks up where a select discards inf − inf
]
EXTRAS = ("mean_logits", "is_top1", "log_sum_sq_probs")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS = {
    "plain": {"bias": False},
    "bias": {},
    "softcap": {"bias": False, "softcap": 5.0},
    "padded": {"vocab_size": 290},
    "everything": {"softcap": 7.0, "logit_scale": 1.4, "vocab_size": 290, "temperature": 0.6},
}


def scores(p: Problem, fused: bool, extras: bool = True) -> dict[str, Tensor]:
    settings.fused_scoring = fused
    s = rk.linear_logp(
        p.hidden, p.head, p.target, topk_ids=p.ids, entropy=extras, tail=True, extras=EXTRAS if extras else (), mask=p.mask
    )
    found = {"logp": s.logp, "lse": s.lse, "topk_logp": s.topk_logp, "tail_logp": s.tail_logp, "entropy": s.entropy, **s.extras}
    return {name: x.detach() for name, x in found.items() if x is not None}


def agree(p: Problem, extras: bool = True) -> dict[str, Tensor]:
    """The fused scores, once they are what the tiles give, to a few roundings of a logit."""
    from rlad_kernels.backends.triton._launch import LAUNCHES

    want = scores(p, False, extras)
    LAUNCHES.clear()
    got = scores(p, True, extras)
    assert LAUNCHES["score_kernel"] > 0
    assert LAUNCHES["fold_kernel"] == 0
    assert got.keys() == want.keys()
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_same_as_the_tiles(name: str, dtype: torch.dtype) -> None:
    p = problem(n=21, v=301, dtype=dtype, **HEADS[name])
    p.ids[0, 1], p.ids[1, 2], p.ids[2, 0] = p.ids[0, 0], -1, p.target[2]  # a duplicate, an empty slot, the target
    p.ids[3] = torch.arange(5) + 126  # neighbours, on both sides of a stretch of columns
    p.mask = torch.arange(21) % 4 != 1
    got, want = agree(p), p.twin().expected()
    assert (got["logp"][~p.mask] == 0).all()
    error = (got["logp"].double() - want.logp).abs().max()
    assert error <= 1e-4


@pytest.mark.parametrize("arch", [80, 90])
def test_several_row_blocks_and_vocabulary_tiles(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlad_kernels.backends.triton import _launch

    monkeypatch.setattr(_launch, "INTERPRETED", (arch, 3))
    p = problem(n=131, d=72, v=319, k=2, dtype=torch.bfloat16, temperature=torch.rand(131) + 0.5)
    settings.tile_rows = 130
    agree(p, extras=arch == 80)


def test_extreme_rows() -> None:
    p = problem(n=6, v=300, dtype=torch.float32)
    with torch.no_grad():
        assert p.bias is not None
        p.bias[:270] = -torch.inf  # a tile of nothing, and a target in it
        p.hidden[0] *= 100
    p.target[1:] = 280
    p.target[1] = 3
    got = agree(p)
    assert got["logp"][1] == -torch.inf
    with torch.no_grad():
        p.weight[280, 0] = torch.nan
    settings.fused_scoring = True
    assert rk.linear_logp(p.hidden, p.head, p.target).logp[2:].isnan().all()


def test_gradients_through_the_fused_forward() -> None:
    p = problem(n=9)
    grads = []
    for settings.fused_scoring in (False, True):
        s = rk.linear_logp(p.hidden, p.head, p.target, entropy=True)
        assert s.entropy is not None
        grads.append(torch.autograd.grad((s.logp - 0.3 * s.entropy).sum(), p.leaves))
    for actual, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_partial_statistics() -> None:
    x, w, it = torch.randn(150, 24), torch.randn(270, 24), torch.rand(150) + 0.5
    slots = torch.randint(-1, 270, (150, 7), dtype=torch.int32)
    slots[:, 3] = slots[:, 0]
    args = (x, w, None, it, 0.9, 4.0, slots, True, True)
    parts, z = torch.ops.rlad.score_partials(*args)
    for again, first in zip(torch.ops.rlad.score_partials(*args), (parts, z), strict=True):
        assert torch.equal(again, first)
    exact = 4 * torch.tanh((x.double() @ w.double().T) * 0.9 / 4) * it.double()[:, None]
    at = slots.clamp(min=0).long()
    torch.testing.assert_close(z.double(), torch.where(slots < 0, -torch.inf, exact.gather(1, at)), rtol=0, atol=1e-5)
    lse = add_slots(Stats(*merge_tiles(parts)), z, first_occurrence(slots)).lse
    torch.testing.assert_close(lse.double(), exact.logsumexp(1), rtol=0, atol=1e-5)


def test_nothing_but_minus_infinity_and_no_rows() -> None:
    bias, slots = torch.full((70,), -torch.inf), torch.tensor([[3], [-1]], dtype=torch.int32)
    args = (torch.randn(70, 8), bias, torch.ones(2), 1.0, 0.0, slots, True, True)
    parts, z = torch.ops.rlad.score_partials(torch.randn(2, 8), *args)
    stats = merge_tiles(parts)
    assert stats.tolist() == [[-torch.inf] * 2, [0, 0], [0, 0], [0, 0], [-torch.inf] * 2, [0, 0]]
    assert (z == -torch.inf).all()
    settings.fused_scoring = True
    assert rk.linear_logp(torch.randn(0, 8), rk.LMHead(torch.randn(70, 8)), torch.zeros(0, dtype=torch.long)).logp.shape == (0,)


def test_the_table_chooses() -> None:
    from rlad_kernels.backends.triton import score
    from rlad_kernels.backends.triton._launch import LAUNCHES

    assert dict(score.FUSED_SCORING) == {}  # an entry needs a measurement: docs say that none has been taken
    p = problem(n=8, dtype=torch.bfloat16)

    def fused(p: Problem) -> bool:
        LAUNCHES.clear()
        rk.linear_logp(p.hidden, p.head, p.target)
        return LAUNCHES["score_kernel"] > 0

    assert not fused(p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "FUSED_SCORING", {(90, 2): 8})
        assert fused(p)
        assert not fused(problem(n=7, dtype=torch.bfloat16))
        assert not fused(problem(n=8, d=12, dtype=torch.bfloat16))  # rows of 24 bytes: TMA cannot read them
        assert not fused(problem(n=8, dtype=torch.float32))
        settings.fused_scoring = False
        assert not fused(p)
    settings.fused_scoring = True
    with pytest.raises(ValueError, match="16 bytes"):
        fused(problem(n=8, d=12, dtype=torch.bfloat16))
