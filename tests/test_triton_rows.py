"""The Triton launchers against float64 formulas: interpreted on the CPU, or compiled where a GPU is.

Tolerances are float32 error budgets: a logit z carries a few roundings of |z|, an exponential turns that absolute error
into a relative one, and a sum of positive terms keeps it.
"""

import os
from inspect import signature

import pytest
import torch

from rlad_kernels.backends.triton import KERNELS, LAUNCHERS
from rlad_kernels.backends.triton._launch import LAUNCHES
from rlad_kernels.backends.triton.clipped_ratio import clipped_ratio
from rlad_kernels.backends.triton.columns import column_stats_
from rlad_kernels.backends.triton.cotangents import row_cotangents
from rlad_kernels.backends.triton.divergence import divergence_
from rlad_kernels.backends.triton.dlogits import dlogits_
from rlad_kernels.backends.triton.dropped import dropped_mass
from rlad_kernels.backends.triton.fold import fold_
from rlad_kernels.backends.triton.gather import gather_dhidden_, gather_dot, gather_dweight_
from rlad_kernels.backends.triton.outputs import row_outputs
from rlad_kernels.backends.triton.scale import scale_
from rlad_kernels.backends.triton.slots import row_slots
from rlad_kernels.backends.triton.topk import fold_topk_
from rlad_kernels.backends.triton.topk_kl import topk_kl
from rlad_kernels.core.modes import numbers

INTERPRET, DEVICE = os.environ.get("TRITON_INTERPRET") == "1", os.environ.get("RLAD_TEST_DEVICE", "cpu")
pytestmark = [
    pytest.mark.skipif(not INTERPRET and DEVICE == "cpu", reason="Triton on the CPU needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy speaks up where a select discards inf − inf
]
ULP, TINY, INF, I32 = 2.0**-23, 2.0**-126, float("inf"), torch.int32
# bias, logit_scale, softcap, per-row temperature
HEADS = {"plain": (False, 1.0, 0.0, False), "tempered": (True, 0.7, 0.0, True), "softcapped": (True, 1.3, 5.0, True)}
TILES = [(6, 1), (17, 7), (130, 64), (1300, 1000), (4300, 4300)]  # columns, tile width: several tiles, or several blocks
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def rounding(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance of neighbours in `dtype` next to x."""
    return x.abs() * HALF_ULP[dtype] + (2.0**-25 if dtype == torch.float16 else TINY)


class Problem:
    """Raw logits with everything that goes wrong in them, and their exact tempered values."""

    def __init__(self, cols: int, head: str, rows: int = 4) -> None:
        has_bias, self.scale, self.softcap, per_row = HEADS[head]
        self.rows, self.cols = rows, cols
        self.x = 4 * torch.randn(rows, cols)
        self.x[0, : cols // 2] = -INF  # first tiles empty
        self.x[1] *= 150 / self.x[1].abs().max()
        self.x[2, ::3] = -INF
        self.x[3] *= 1e-3  # tanh next to 0
        self.bias = torch.randn(cols) * (torch.arange(cols) % 2) if has_bias else None
        self.inv_temp = torch.rand(rows) + 0.6 if per_row else torch.ones(rows)

    @property
    def raw(self) -> torch.Tensor:
        return self.x.double() + (0 if self.bias is None else self.bias.double())

    @property
    def z(self) -> torch.Tensor:
        a = self.raw * self.scale
        a = self.softcap * torch.tanh(a / self.softcap) if self.softcap else a
        return a * self.inv_temp.double()[:, None]

    @property
    def slack_each(self) -> torch.Tensor:
        """Absolute error of each float32 logit: the roundings of x + bias, scale, softcap, temperature."""
        size = (self.x.abs() + (0 if self.bias is None else self.bias.abs())) * self.scale * self.inv_temp[:, None]
        return 8 * ULP * torch.where(size.isinf(), self.z.abs(), size)

    @property
    def slack(self) -> torch.Tensor:
        return 8 * ULP * self.z.nan_to_num(neginf=0).abs().amax(1, keepdim=True).clamp(min=1e-3)

    def tiles(self, width: int):
        """Of each tile: a copy with a row stride of its own, and the arguments that follow it."""
        for c0 in range(0, self.cols, width):
            part = self.x[:, c0 : c0 + width]
            tile = torch.full((self.rows, part.shape[1] + 3), 7e7)[:, : part.shape[1]].copy_(part)
            bias = None if self.bias is None else self.bias[c0 : c0 + width].clone()
            yield tile, (c0, bias, self.inv_temp, self.scale, self.softcap)


def plain(x: torch.Tensor, c0: int = 0) -> tuple[object, ...]:
    """The arguments from logits to softcap for a tile without bias, temperature or softcap."""
    return x, c0, None, torch.ones(x.shape[0]), 1.0, 0.0


def fresh_stats(rows: int) -> torch.Tensor:
    stats = torch.zeros(6, rows + 2)[:, 1:-1]
    stats[0] = -INF
    return stats


def near(got: torch.Tensor, want: torch.Tensor, tolerance: torch.Tensor | float) -> None:
    """Equal infinities, and finite values within the tolerance."""
    assert torch.equal(got.isinf(), want.isinf())
    error = (got.double() - want.double()).abs()[want.isfinite()]
    tolerance = torch.as_tensor(tolerance).expand(want.shape)[want.isfinite()]
    assert (error <= tolerance).all(), f"error {error.max():.3e}, {(error / tolerance).nan_to_num().max():.2f} of the tolerance"


def expected_stats(z: torch.Tensor, outside: torch.Tensor) -> list[torch.Tensor]:
    """m, Σe, Σe·(z−m), Σe² over the columns `outside`, with 0·inf = 0."""
    m = torch.where(outside, z, -INF).amax(1)
    gap = torch.where(outside & (z > -INF), z - torch.where(m > -INF, m, 0)[:, None], -INF)
    e = gap.exp()
    return [m, e.sum(1), (e * torch.where(e > 0, gap, 0)).sum(1), (e * e).sum(1)]


def assert_stats(stats, want, slack, entropy: bool, extras: bool) -> None:
    """Rows 0 to 3; those not asked for must have kept their 0."""
    m, rest, restz, restsq = want
    relative = 4 * slack[:, 0] + 16 * ULP
    near(stats[0], m, slack[:, 0])
    near(stats[1], rest, rest * relative + TINY)
    near(stats[2], restz * entropy, ((restz.abs() + rest) * relative + TINY) * entropy)
    near(stats[3], restsq * extras, (restsq * 2 * relative + TINY) * extras)


def some_slots(cols: int, rows: int, j: int) -> torch.Tensor:
    """Slots with duplicates and empties, over the whole vocabulary."""
    slots = torch.randint(0, cols, (rows, j), dtype=I32)
    slots[:, 1:2], slots[:, 3:4] = slots[:, :1], -1
    return slots


def membership(slots: torch.Tensor, cols: int) -> torch.Tensor:
    inside = torch.zeros(slots.shape[0], cols + 1, dtype=torch.bool)
    return inside.scatter_(1, torch.where(slots < 0, cols, slots).long(), True)[:, :cols]


SLOTS = [(0, True, True), (6, True, True), (6, False, True), (3, True, False), (300, True, True)]
FOLDS = [*zip(TILES, SLOTS, strict=True), *zip(TILES, SLOTS[::-1], strict=True)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("tile", "flags"), FOLDS)
def test_fold(tile, flags, head):
    (cols, width), (j, entropy, extras) = tile, flags
    p = Problem(cols, head)
    slots, stats, slot_logits = some_slots(cols, p.rows, j), fresh_stats(p.rows), torch.full((p.rows, j), 123.0)
    for x, args in p.tiles(width):
        before = x.clone()
        fold_(x, *args, slots, stats, slot_logits, entropy, extras)
        assert torch.equal(x, before)
        assert (slot_logits[(slots < 0) | (slots >= args[0] + width)] == 123).all()
    z, inside = p.z, membership(slots, cols)
    assert_stats(stats, expected_stats(z, ~inside), p.slack, entropy, extras)
    near(stats[4], z.sum(1) * extras if extras else stats[4] * 0, p.slack[:, 0] * cols)
    some = stats[0] > -INF
    near(stats[0][some], (z[torch.arange(p.rows), stats[5].long()] if extras else stats[0])[some], p.slack[some, 0])
    at = slots.clamp(min=0).long()
    near(torch.where(slots < 0, 0, slot_logits), torch.where(slots < 0, 0, z.gather(1, at)), p.slack_each.gather(1, at))


def test_fold_of_nothing_but_minus_infinity():
    stats, slots = fresh_stats(2), torch.tensor([[4], [-1]], dtype=I32)
    for c0 in (0, 9):
        fold_(*plain(torch.full((2, 9), -INF), c0), slots, stats, torch.zeros(2, 1), True, True)
    assert stats.tolist() == [[-INF, -INF], [0, 0], [0, 0], [0, 0], [-INF, -INF], [0, 0]]


def test_fold_keeps_a_small_tail_and_repeats_bit_by_bit():
    x = torch.randn(3, 900) - 300
    x[:, 500] = 0
    runs = [fresh_stats(3), fresh_stats(3)]
    for stats in runs:
        fold_(*plain(x), torch.full((3, 1), 500, dtype=I32), stats, torch.zeros(3, 1), True, False)
    assert torch.equal(*runs)
    want = expected_stats(x.double(), torch.arange(900) != 500)[1]
    assert (want >= 1).all()
    near(runs[0][1], want, want * 64 * ULP)


TOPK = [(6, 1, 1), (6, 1, 6), (17, 7, 5), (17, 7, 17), (130, 64, 1), (130, 64, 130), (2100, 1000, 5), (2100, 2100, 40)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("cols", "width", "k"), [*TOPK, (2100, 2100, 1024)])
def test_fold_topk(cols, width, k, head):
    p = Problem(cols, head)
    p.x[1] /= 10  # 150 under a softcap saturates into ties of float32
    p.x[2] = p.x[2].sort().values  # every tile pushes out the one before
    p.x[3] = (p.x[3] * 1e3).round()  # ties, which a bias would break
    p.bias = None if p.bias is None else torch.zeros(cols)
    slots, stats, slot_logits = some_slots(cols, p.rows, 2), fresh_stats(p.rows), torch.full((p.rows, 2), 123.0)
    top, ids = torch.full((p.rows, k), -INF), torch.full((p.rows, k), -1, dtype=I32)
    for x, args in p.tiles(width):
        fold_topk_(x, *args, slots, stats, slot_logits, top, ids, True)
    z = p.z
    order = z.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(ids.sort(dim=1).values.long(), order[:, :k].sort(dim=1).values)
    near(top, z.gather(1, ids.long()), p.slack_each.gather(1, ids.long()))
    assert_stats(stats, expected_stats(z, ~membership(ids, cols)), p.slack, True, False)
    near(slot_logits, z.gather(1, slots.long()), p.slack_each.gather(1, slots.long()))


TERMS = [(5, True, True), (0, False, True), (5, True, False), (300, False, True), (5, True, True)]  # slots, entropy, tail


def exact_dlogits(p, slots, slot_dz, rows, entropy, tail):
    """The gradient in float64 from the float32 row values, and the size of its terms."""
    z, (lse, w, b, h, t, tail_lse) = p.z, rows.double()[:, :, None]
    dead = z == -INF
    lp = torch.where(dead, 0, z - lse)
    prob, inside = torch.where(dead, 0, lp.exp()), membership(slots, p.cols)
    terms = [prob * w]
    if entropy:
        terms += [-prob * b * lp, -prob * b * h]
    if tail:
        terms.append(torch.where(~inside & ~dead & (tail_lse > -INF), t * torch.where(dead, 0, z - tail_lse).exp(), 0))
    whole = torch.zeros(p.rows, p.cols + 1, dtype=torch.float64)
    whole = whole.scatter_(1, torch.where(slots < 0, p.cols, slots).long(), slot_dz.double())[:, :-1]
    terms = [whole, *(torch.where(inside, 0, term) for term in terms)]
    factor = p.scale * p.inv_temp.double()[:, None]
    if p.softcap:
        factor = factor / torch.cosh(p.raw.clamp(min=-1e4) * p.scale / p.softcap) ** 2
    return sum(terms) * factor, sum(term.abs() for term in terms) * factor


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("where", ["in place", torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tile", "flags"), [*zip(TILES, TERMS, strict=True)])
def test_dlogits(tile, flags, where, head):
    (cols, width), (j, entropy, tail) = tile, flags
    p = Problem(cols, head)
    slots = torch.rand(p.rows, cols).argsort(1)[:, :j].to(I32)
    slots[:, 1:2] = -1
    slot_dz, rows = torch.randn(p.rows, j), torch.randn(6, p.rows)
    rows[0] = p.z.logsumexp(1)
    rows[5] = torch.where(membership(slots, cols), -INF, p.z).logsumexp(1)
    rows[[1, 2, 4], 3] = 0  # a row without cotangents
    slot_dz[3] = 0
    want, size = exact_dlogits(p, slots, slot_dz, rows, entropy, tail)
    target, lost, taken = slots[:, :1] if j else torch.zeros(p.rows, 1, dtype=I32), torch.zeros(p.rows, 1), torch.zeros(p.rows, 1)
    for x, args in p.tiles(width):
        out = x if where == "in place" else torch.empty(p.rows, x.shape[1] + 5, dtype=where)[:, : x.shape[1]]
        dlogits_(out, x, *args, slots, slot_dz, rows, target, lost, entropy, tail)
        part = slice(args[0], args[0] + width)
        budget = size[:, part] * (4 * p.slack + 4 * ULP * rows[0].abs()[:, None] + 32 * ULP)
        near(out, want[:, part], budget + rounding(want[:, part], out.dtype))
        assert (out[3] == 0).all()
        if where == torch.bfloat16:  # rounded to nearest even, as torch does
            wide = torch.empty(x.shape)
            dlogits_(wide, x, *args, slots, slot_dz, rows, target, None, entropy, tail)
            assert torch.equal(out, wide.bfloat16())
            place = (target - args[0]).long()
            here = (slots[:, :1] == target) & (place >= 0) & (place < width) if j else torch.zeros(p.rows, 1, dtype=torch.bool)
            gap = (wide - wide.bfloat16()).gather(1, place.clamp(0, x.shape[1] - 1))
            taken += torch.where(here, gap, 0)
    if where == torch.bfloat16:
        assert torch.equal(lost, taken)
        assert not j or lost.any()


def test_dlogits_with_an_empty_tail():
    x = torch.tensor([[1.0, -INF, 2.0, 0.5]])
    slots = torch.tensor([[2, 0, 3, -1]], dtype=I32)
    rows, out = torch.tensor([[x.logsumexp(1).item()], [0.3], [0.2], [1.0], [0.5], [-INF]]), torch.empty(1, 4)
    dlogits_(out, *plain(x), slots, torch.ones(1, 4), rows, slots[:, :1], None, True, True)
    assert out.isfinite().all()
    assert out[0, 1] == 0


@pytest.mark.parametrize("dtype", HALF_ULP)
@pytest.mark.parametrize("d", [300, 1500])
def test_gather(dtype, d):
    hidden, weight = torch.randn(5, d + 2).to(dtype)[:, :d], torch.randn(11, d + 4).to(dtype)[:, :d]
    grad, ids = torch.randn(5, 7), torch.randint(0, 11, (5, 7), dtype=I32)
    ids[:, 2], ids[:4, 4:] = ids[:, 0], 3  # duplicates, and a run longer than the blocks of gather_dweight_
    ids[0, 1], ids[1, 3], ids[2, 0] = -1, 11, 2**31 - 1
    ids[4] = -1  # a row without ids: what hidden holds there must not matter
    onehot = torch.nn.functional.one_hot(torch.where((ids >= 0) & (ids < 11), ids, 11).long(), 12)[..., :11].double()
    rows = onehot @ weight.double()

    nan = torch.where(torch.arange(5)[:, None] == 4, float("nan"), hidden)
    terms = rows * hidden.double()[:, None]
    near(gather_dot(nan, weight, ids), terms.sum(-1), terms.abs().sum(-1) * 8 * ULP)

    terms = rows * grad.double()[:, :, None]
    want = terms.sum(1)
    for out_dtype in {dtype, torch.float32}:
        out = torch.zeros(5, d + 2, dtype=out_dtype)[:, :d]
        gather_dhidden_(out, grad, weight, ids, False)
        near(out, want, terms.abs().sum(1) * 8 * ULP + rounding(want, out_dtype))
        gather_dhidden_(out.fill_(5), grad, weight, ids, True)
        near(out, want + 5, (terms.abs().sum(1) + 5) * 8 * ULP + rounding(want + 5, out_dtype))

    terms = torch.einsum("nkv,nk,nd->nkvd", onehot, grad.double(), hidden.double()).flatten(0, 1)
    want, size = terms.sum(0), terms.abs().sum(0)
    order, absent = ids.flatten().sort(stable=True), ~onehot.flatten(0, 1).bool().any(0)
    for out_dtype in {dtype, torch.float32}:
        out = torch.zeros(11, d, dtype=out_dtype)
        out[absent] = 5
        gather_dweight_(out, grad, hidden, order.indices, order.values, False)
        near(out, torch.where(absent[:, None], 5, want), size * 8 * ULP + rounding(want, out_dtype))
        gather_dweight_(out.fill_(5), grad, hidden, order.indices, order.values, True)
        near(out, want + 5, (size + 5) * 8 * ULP + rounding(want + 5, out_dtype))
        some = torch.full_like(out[2:7], 5)
        gather_dweight_(some, grad, hidden, order.indices, order.values, True, 2)
        assert torch.equal(some, out[2:7])


def test_every_kernel_runs_is_counted_and_refuses_float64():
    LAUNCHES.clear()
    one, ids, none = torch.ones(1, 1), torch.zeros(1, 1, dtype=I32), torch.zeros(1, 0)
    fold_(*plain(one), ids, fresh_stats(1), one.clone(), True, True)
    fold_topk_(*plain(one), ids, fresh_stats(1), one.clone(), -INF * one, ids - 1, True)
    dlogits_(one.clone(), *plain(one), none.to(I32), none, torch.ones(6, 1), ids, None, True, True)
    gather_dhidden_(one.clone(), one, one, ids, False)
    gather_dweight_(one.clone(), gather_dot(one, one, ids), one, ids[0].long(), ids[0], False)
    clipped_ratio(one[0], one[0], None, one[0], None, numbers(1.0, 0.2, 0.2, INF, 0.0, 0.0), "k3")
    topk_kl(one, ids, one, None, None, "reverse", "both")
    column_stats_(torch.empty(2, 1, 1), one, None, one[0], 1.0, 0.0, one[0], 1)
    side = one, None, one[0], 1.0, 0.0, torch.zeros(2, 1)
    divergence_(one[0].clone(), None, *side, *side, torch.ones(4, 1), "sym", 0.0, 0.0, 0.0, False)
    row_slots(ids[0], None, 1)
    row_outputs(torch.ones(6, 1), one, ids, 1, True, False, False, False)
    row_cotangents(ids, one[0], None, one[0], one[0], one[0], None, None, None, None, None, None)
    dropped_mass(one.bool(), one, None, one[0], 1.0, 0.0, one[0], 1)
    scale_(one.clone(), one[0, 0])
    assert dict(LAUNCHES) == dict.fromkeys(KERNELS, 1)
    gather_dot(one[:0], one, ids[:0])  # no rows: no launch
    assert LAUNCHES["gather_dot_kernel"] == 1
    for launcher in LAUNCHERS.values():
        with pytest.raises(TypeError, match=f"{launcher.__name__}: .*float64"):
            launcher(*[one.double()] * len(signature(launcher).parameters))
