"""What the tests of the C++ row passes share: heads with their float64 truth, on every instruction set this CPU has.

Tolerances are error budgets: ``u`` is half an ulp of 1 in the pass's dtype, a tempered logit carries a few ``u`` of its
magnitude, e^d turns that into a relative error, and a sum in lanes (at least 16 in float32, 2 in float64) adds a random walk
of ``columns / lanes`` roundings. Equal terms are all rounded alike: they drift, within a stretch of 4,096 columns.
"""

import math

import pytest
import torch

from rlad_kernels.backends.contract import INTERPRET, has_cpp

if INTERPRET or not has_cpp():
    pytest.skip("the C++ backend is not loaded", allow_module_level=True)

rlad = torch.ops.rlad
INF, I32 = torch.inf, torch.int32
FLAGS = [(False, False), (True, False), (False, True), (True, True)]
WIDTHS = (1, 7, 64, 1000, 5000)  # odd ones, one block, more than one stretch of a row
UNTOUCHED = 77.0
HEADS = {
    "plain": {},
    "bias-temps": {"bias": True, "scale": 0.37, "temps": True},
    "softcap": {"softcap": 3.0, "scale": 1.7, "temps": True},
    "softcap-bias": {"softcap": 30.0, "bias": True, "spread": 20.0},
    "wide": {"spread": 40.0},
}
any_head = pytest.mark.parametrize("kind", HEADS)
any_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("f32", "f64"))


def half_ulp(dtype):
    return torch.finfo(dtype).eps / 2


def finite(x):
    return torch.where(x.isfinite(), x, 0)


def within(got, want, budget):
    """Every finite element within its budget, every other one equal."""
    want, budget = torch.broadcast_tensors(want, budget)
    inside = want.isfinite()
    torch.testing.assert_close(got.double()[~inside], want[~inside], rtol=0, atol=0, equal_nan=True)
    over = ((got.double() - want).abs() - budget)[inside]
    assert (over <= 0).all(), f"over budget by {over.max():.3g} of {budget[inside].max():.3g}"


class Head:
    """Raw logits and what tempers them, with z and its slope in float64."""

    def __init__(self, rows, widths, dtype, *, spread=4.0, bias=False, scale=1.0, softcap=0.0, temps=False):
        g = torch.Generator().manual_seed(0)
        vocab = sum(widths)
        self.rows, self.widths, self.dtype, self.scale, self.softcap = rows, widths, dtype, scale, softcap
        self.raw = (torch.randn(rows, vocab, generator=g, dtype=torch.float64) * spread).to(dtype)
        self.bias = torch.randn(vocab, generator=g, dtype=torch.float64).to(dtype) if bias else None
        self.inv_temp = (torch.rand(rows, generator=g) * 1.5 + 0.5 if temps else torch.ones(rows)).to(dtype)
        self.u = half_ulp(dtype)
        self.lanes = 16 if dtype == torch.float32 else 2
        self.sum_error = self.u * (8 + math.sqrt(vocab / self.lanes))  # with a few for the terms

    @property
    def a(self):
        return (self.raw.double() + (0 if self.bias is None else self.bias.double())) * self.scale

    @property
    def z(self):
        a = self.softcap * torch.tanh(self.a / self.softcap) if self.softcap else self.a
        return a * self.inv_temp.double()[:, None]

    @property
    def slope(self):
        s = (self.scale * self.inv_temp.double())[:, None].expand_as(self.raw)
        return s / torch.cosh(self.a / self.softcap) ** 2 if self.softcap else s

    def z_error(self):
        """Budget of |z − z64|, per row: 2 roundings, 1 of the bias, and 7 of the soft cap, whose tanh is good to 2.5 ulps."""
        z = finite(self.z).abs()
        if self.bias is not None:
            z = torch.maximum(z, finite(self.raw.double()).abs() * self.scale * self.inv_temp.double()[:, None])
        return (2 + (self.bias is not None) + 7 * (self.softcap > 0)) * self.u * z.amax(1)

    def tiles(self):
        """The leading arguments (logits, col0, bias …) of each tile; the logits are a view with a wider row stride."""
        c0 = 0
        for w in self.widths:
            x = torch.full((self.rows, w + 5), torch.nan, dtype=self.dtype)[:, 2 : 2 + w]
            x.copy_(self.raw[:, c0 : c0 + w])
            yield x, c0, None if self.bias is None else self.bias[c0 : c0 + w], self.inv_temp, self.scale, self.softcap
            c0 += w

    def new_stats(self):
        stats = torch.zeros(6, self.rows + 3, dtype=self.dtype)[:, 1:-2]  # a slice, as in the driver
        stats[0] = -INF
        return stats

    def fold(self, slots, *, entropy=True, extras=True):
        stats, out = self.new_stats(), torch.full(slots.shape, UNTOUCHED, dtype=self.dtype)
        for tile in self.tiles():
            before = tile[0].clone()
            rlad.fold_(*tile, slots, stats, out, entropy, extras)
            torch.testing.assert_close(tile[0], before, rtol=0, atol=0, equal_nan=True)
        return stats, out

    def topk(self, slots, k):
        stats, out = self.new_stats(), torch.full(slots.shape, UNTOUCHED, dtype=self.dtype)
        top, ids = torch.full((self.rows, k), -INF, dtype=self.dtype), torch.full((self.rows, k), -1, dtype=I32)
        for tile in self.tiles():
            rlad.fold_topk_(*tile, slots, stats, out, top, ids, True)
        return stats, out, top, ids

    def dlogits(self, slots, slot_dz, rows, *, entropy, tail, out_dtype=None, target=None, lost=None):
        """The gradient of all tiles: in place, or into ``out_dtype``."""
        parts, target = [], torch.zeros(self.rows, 1, dtype=I32) if target is None else target
        for tile in self.tiles():
            x = tile[0]
            out = x if out_dtype is None else torch.full((self.rows, x.shape[1] + 3), torch.nan, dtype=out_dtype)[:, 1:-2]
            rlad.dlogits_(out, *tile, slots, slot_dz, rows, target, lost, entropy, tail)
            parts.append(out)
        return torch.cat(parts, 1)

    def outside(self, slots):
        """Columns that are in no slot of their row."""
        vocab = self.raw.shape[1]
        kept = torch.ones(self.rows, vocab + 1, dtype=torch.bool)
        return kept.scatter_(1, torch.where(slots < 0, vocab, slots).long(), False)[:, :vocab]

    def spoil(self):
        """Masked columns, an almost empty start, and logits of ±150."""
        self.raw[:, ::97] = -INF
        self.raw[0, :72] = -INF  # the first three tiles
        self.raw[1, 500], self.raw[2, 40:60], self.raw[2, 3000] = 150, -150, 150


def check_slots(head, z, slots):
    want = head.z.gather(1, slots.long().clamp(min=0))
    within(z, torch.where(slots < 0, UNTOUCHED, want), head.z_error()[:, None])


def check_stats(head, stats, kept, *, entropy=True, extras=True):
    """Statistics against float64 sums over the columns ``kept``; sumz is over all."""
    z, err = head.z, head.z_error()
    m = torch.where(kept, z, -INF).amax(1)
    d = torch.where(kept & (z > -INF), z - m.clamp(min=-1e300)[:, None], -INF)
    e = d.exp()
    # z and m, the exp (1.2 ulps) of a rounded difference, the sum, and three roundings of the rescaling in each tile
    rows = zip(z, kept, strict=True)
    equal = torch.stack([row[k].unique(return_counts=True)[1].max() if k.any() else k.sum() for row, k in rows])
    rel = 2 * err + head.sum_error + head.u * (equal.clamp(max=4096) // head.lanes + 3 * len(head.widths))
    within(stats[0], m, err)
    within(stats[1], e.sum(1), rel * e.sum(1) + 1e-30)
    if entropy:
        within(stats[2], (e * finite(d)).sum(1), 2 * rel * (e * (1 + finite(d).abs())).sum(1) + 1e-30)
    if extras:
        within(stats[3], (e * e).sum(1), 2 * rel * (e * e).sum(1) + 1e-30)
        within(stats[4], z.sum(1), z.shape[1] * err + head.sum_error * finite(z).abs().sum(1))
        some = stats[0] > -INF
        within(z[torch.arange(head.rows), stats[5].long()][some], m[some], err[some])


def some_slots(head, count):
    """Ids with duplicates and empty places among them."""
    slots = torch.randint(0, head.raw.shape[1], (head.rows, count), generator=torch.Generator().manual_seed(1), dtype=I32)
    if count > 2:
        slots[:, 1], slots[::2, 2] = slots[:, 0], -1
    return slots


def cotangents(head, count):
    """slots, slot_dz and rows with every term present."""
    g = torch.Generator().manual_seed(3)
    slots = torch.stack([torch.randperm(head.raw.shape[1], generator=g)[:count] for _ in range(head.rows)]).to(I32)
    if count > 2:
        slots[::2, 1] = -1
    slot_dz = torch.where(slots >= 0, torch.randn(slots.shape, generator=g), 0).to(head.dtype)
    w, b, t = torch.randn(3, head.rows, generator=g, dtype=torch.float64)
    p = head.z.softmax(1)
    rows = torch.stack([head.z.logsumexp(1), w, b, torch.special.entr(p).sum(1), t, tail_lse(head, slots)])
    return slots, slot_dz, rows.to(head.dtype)


def tail_lse(head, slots):
    return torch.where(head.outside(slots), head.z, -INF).logsumexp(1)


def dlogits_oracle(head, slots, slot_dz, rows, *, entropy, tail):
    """The gradient in float64, and the budget of a pass's error."""
    z, err = head.z, head.z_error()[:, None]
    lse, w, b, h, t, tail_lse = rows.double()[:, :, None]
    lp = torch.where(z > -INF, z - lse, 0)
    p = torch.where(z > -INF, lp.exp(), 0)
    rel = err + head.u * (8 + lp.abs())
    g, budget = p * w, rel * p * w.abs()
    if entropy:
        g, budget = g - p * b * (lp + h), budget + rel * p * b.abs() * (lp.abs() + h.abs() + 1)
    if tail:
        in_tail = (z > -INF) & head.outside(slots)
        lq = torch.where(in_tail, z - tail_lse, 0)
        q = torch.where(in_tail, lq.exp() * t, 0)
        g, budget = g + q, budget + (err + head.u * (8 + lq.abs())) * q.abs()
    outside, at = head.outside(slots), slots.long().clamp(min=0)
    values = torch.where(slots >= 0, slot_dz, 0).double()
    g = torch.where(outside, g, 0).scatter_add_(1, at, values)
    budget = torch.where(outside, budget, 0).scatter_add_(1, at, 4 * head.u * values.abs())
    # the slope's own relative error; far into the soft cap, that of its argument counts
    bend = torch.where(head.raw > -INF, head.u * (8 + 6 * head.a.abs() / head.softcap) if head.softcap else 3 * head.u, 0)
    # and a probability below the smallest normal number is 0
    return g * head.slope, (budget + bend * g.abs()) * head.slope + 2.0**-118
