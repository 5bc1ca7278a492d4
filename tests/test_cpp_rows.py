"""The C++ row passes against float64 formulas, on every instruction set this CPU has.

Tolerances are error budgets: ``u`` is half an ulp of 1 in the pass's dtype, a tempered logit carries a few ``u`` of its
magnitude, e^d turns that into a relative error, and a sum in lanes (at least 16 in float32, 2 in float64) adds a random walk
of ``columns / lanes`` roundings.
"""

import math

import pytest
import torch

from rlad_kernels.ops import INTERPRET, has_cpp

if INTERPRET or not has_cpp():
    pytest.skip("the C++ backend is not loaded", allow_module_level=True)

pytestmark = pytest.mark.cpu
rlad = torch.ops.rlad
INF, I32 = torch.inf, torch.int32
ISAS = ("generic", "avx2", "avx512")  # avx512_bf16 and amx_bf16 run the avx512 row passes
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


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("RLAD_CPU_ISA", request.param)
    try:
        assert rlad.cpu_isa() == request.param
    except RuntimeError:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


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
        self.sum_error = self.u * (8 + math.sqrt(vocab / (16 if dtype == torch.float32 else 2)))  # with a few for the terms

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
        stats = torch.zeros(5, self.rows + 3, dtype=self.dtype)[:, 1:-2]  # a slice, as in the driver
        stats[0] = -INF
        return stats

    def fold(self, slots, *, exclude=True, entropy=True, extras=True):
        stats, out = self.new_stats(), torch.full(slots.shape, UNTOUCHED, dtype=self.dtype)
        for tile in self.tiles():
            before = tile[0].clone()
            rlad.fold_(*tile, slots, exclude, stats, out, entropy, extras)
            torch.testing.assert_close(tile[0], before, rtol=0, atol=0, equal_nan=True)
        return stats, out

    def topk(self, slots, k):
        stats, out = self.new_stats(), torch.full(slots.shape, UNTOUCHED, dtype=self.dtype)
        top, ids = torch.full((self.rows, k), -INF, dtype=self.dtype), torch.full((self.rows, k), -1, dtype=I32)
        for tile in self.tiles():
            rlad.fold_topk_(*tile, slots, stats, out, top, ids, True)
        return stats, out, top, ids

    def dlogits(self, slots, slot_grad, slot_tail, rows, *, entropy, tail, out_dtype=None):
        """The gradient of all tiles: in place, or into ``out_dtype``."""
        parts = []
        for tile in self.tiles():
            x = tile[0]
            out = x if out_dtype is None else torch.full((self.rows, x.shape[1] + 3), torch.nan, dtype=out_dtype)[:, 1:-2]
            rlad.dlogits_(out, *tile, slots, slot_grad, slot_tail, rows, entropy, tail)
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
    """Statistics against float64 sums over the columns ``kept``; m and sumz are over all."""
    z, err = head.z, head.z_error()
    d = torch.where(kept & (z > -INF), z - z.amax(1).clamp(min=-1e300)[:, None], -INF)
    e = d.exp()
    # z and m, the exp (1.2 ulps) of a rounded difference, the sum, and three roundings of the rescaling in each tile
    rel = 2 * err + head.sum_error + 3 * head.u * len(head.widths)
    within(stats[0], z.amax(1), err)
    within(stats[1], e.sum(1), rel * e.sum(1) + 1e-30)
    if entropy:
        within(stats[2], (e * finite(d)).sum(1), 2 * rel * (e * (1 + finite(d).abs())).sum(1) + 1e-30)
    if extras:
        within(stats[3], (e * e).sum(1), 2 * rel * (e * e).sum(1) + 1e-30)
        within(stats[4], z.sum(1), z.shape[1] * err + head.sum_error * finite(z).abs().sum(1))


def some_slots(head, count):
    """Ids with duplicates and empty places among them."""
    slots = torch.randint(0, head.raw.shape[1], (head.rows, count), generator=torch.Generator().manual_seed(1), dtype=I32)
    if count > 2:
        slots[:, 1], slots[::2, 2] = slots[:, 0], -1
    return slots


@any_dtype
@any_head
def test_fold_matches_float64(isa, kind, dtype):
    head = Head(5, WIDTHS, dtype, **HEADS[kind])
    head.spoil()
    slots = some_slots(head, 9)
    slots[1, 0], slots[3, 3:5] = 500, 97
    stats, z = head.fold(slots)
    check_stats(head, stats, head.outside(slots))
    check_slots(head, z, slots)
    check_stats(head, head.fold(slots, exclude=False)[0], torch.ones_like(head.raw, dtype=torch.bool))


@pytest.mark.parametrize("entropy, extras", FLAGS)
def test_fold_leaves_unasked_rows_alone(isa, entropy, extras):
    head = Head(3, (70, 33), torch.float32)
    slots = some_slots(head, 1)
    stats, _ = head.fold(slots, entropy=entropy, extras=extras)
    check_stats(head, stats, head.outside(slots), entropy=entropy, extras=extras)
    assert entropy or not stats[2].any()
    assert extras or not stats[3:].any()


def test_long_sums_stay_accurate(isa):
    """200,000 equal terms: a plain float32 sum is off by 1e-3."""
    head = Head(1, (65536,) * 3, torch.float32, spread=0.0)
    head.raw -= 2.3
    head.raw[0, 0] = 0
    slots = torch.zeros(1, 1, dtype=I32)
    check_stats(head, head.fold(slots)[0], head.outside(slots))


@any_dtype
def test_soft_cap_is_accurate_relative_to_small_logits(isa, dtype):
    head = Head(2, (200,), dtype, softcap=1.0)
    head.raw *= torch.logspace(-30, 0, 200).to(dtype)
    z = head.fold(torch.arange(200, dtype=I32).repeat(2, 1))[1]
    within(z, head.z, 9 * head.u * head.z.abs())


@any_dtype
def test_no_slots_no_rows(isa, dtype):
    head, none = Head(3, (50,), dtype), torch.empty(3, 0, dtype=I32)
    check_stats(head, head.fold(none)[0], torch.ones(3, 50, dtype=torch.bool))
    rows = cotangents(head, 1)[3]
    want, budget = dlogits_oracle(head, none, torch.empty(3, 0, dtype=dtype), None, rows, entropy=True, tail=False)
    within(head.dlogits(none, torch.empty(3, 0, dtype=dtype), None, rows, entropy=True, tail=False), want, budget)
    empty = Head(0, (50,), dtype)
    for op in (empty.fold, lambda slots: empty.topk(slots, 4)):
        assert op(torch.empty(0, 2, dtype=I32))[0].shape == (5, 0)
    case = torch.empty(0, 2, dtype=I32), torch.empty(0, 2, dtype=dtype), None, torch.empty(6, 0, dtype=dtype)
    assert empty.dlogits(*case, entropy=True, tail=False).shape == (0, 50)


@any_dtype
def test_rows_without_mass_and_nan(isa, dtype):
    head = Head(3, (40, 40), dtype)
    head.raw[0], head.raw[1], head.raw[2, 3] = -INF, torch.nan, torch.nan
    slots = torch.zeros(3, 1, dtype=I32)
    for stats in (head.fold(slots)[0], head.topk(slots, 4)[0]):
        assert stats[:3, 0].tolist() == [-INF, 0, 0]
        assert stats[1, 1:].isnan().all()


@any_dtype
@any_head
@pytest.mark.parametrize("k", (1, 17, 300))
def test_topk_matches_sort(isa, kind, dtype, k):
    head = Head(4, (64, 7, 1000, 1, 5000), dtype, **HEADS[kind])
    head.raw[:, ::3] = (head.raw[:, ::3] * 2).round() / 2  # ties, also across tiles
    head.raw[0, 20:] = -INF
    if head.bias is None:
        head.raw[1] = 2
    slots = some_slots(head, 3)
    stats, z, top, ids = head.topk(slots, k)
    check_stats(head, stats, head.outside(ids), extras=False)
    check_slots(head, z, slots)
    # which columns win is decided on the pass's own z, which fold_ reads out bit for bit
    own = head.fold(torch.arange(head.raw.shape[1], dtype=I32).repeat(4, 1))[1]
    best = own.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(ids.sort(1).values.long(), best.sort(1).values)
    assert torch.equal(top, own.gather(1, ids.long()))
    assert not stats[3:].any()


def test_topk_of_the_whole_vocabulary_and_empty_places(isa):
    none = torch.empty(2, 0, dtype=I32)
    stats, _, _, ids = Head(2, (30, 10), torch.float32).topk(none, 40)
    assert torch.equal(ids.sort(1).values, torch.arange(40, dtype=I32).repeat(2, 1))
    assert not stats[1:].any()
    head = Head(2, (30,), torch.float32)
    head.raw[:, 5] = -INF  # a real column beats an empty place
    assert torch.equal(head.topk(none, 32)[3].sort(1).values, torch.tensor([-1, -1, *range(30)], dtype=I32).repeat(2, 1))


@any_dtype
def test_tiny_tail_keeps_its_relative_accuracy(isa, dtype):
    """A mass of 1e-7 outside the top-K, some of it pushed out of the heap on the way: never total minus top-K."""
    head = Head(2, (1000, 1000), dtype, spread=0.5)
    head.raw[:, 1500:1510] += 24
    stats, _, _, ids = head.topk(torch.empty(2, 0, dtype=I32), 10)
    assert torch.equal(ids.sort(1).values, torch.arange(1500, 1510, dtype=I32).repeat(2, 1))
    assert stats[1].max() < 1e-6
    check_stats(head, stats, head.outside(ids), extras=False)


def cotangents(head, count):
    """slots, slot_grad, slot_tail and rows with every term present. Slot 0 is a target outside the support."""
    g = torch.Generator().manual_seed(3)
    slots = torch.stack([torch.randperm(head.raw.shape[1], generator=g)[:count] for _ in range(head.rows)]).to(I32)
    if count > 2:
        slots[::2, 1] = -1
    slot_grad = torch.where(slots >= 0, torch.randn(slots.shape, generator=g), 0).to(head.dtype)
    slot_tail = torch.zeros(slots.shape, dtype=torch.bool)
    slot_tail[:, 0] = True
    w, b, t = torch.randn(3, head.rows, generator=g, dtype=torch.float64)
    p = head.z.softmax(1)
    rows = torch.stack([head.z.logsumexp(1), w, b, torch.special.entr(p).sum(1), t, tail_lse(head, slots)])
    return slots, slot_grad, slot_tail, rows.to(head.dtype)


def tail_lse(head, slots):
    return torch.where(head.outside(slots[:, 1:]), head.z, -INF).logsumexp(1)


def dlogits_oracle(head, slots, slot_grad, slot_tail, rows, *, entropy, tail):
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
        in_tail = (z > -INF) & head.outside(torch.where(slot_tail, -1, slots))
        lq = torch.where(in_tail, z - tail_lse, 0)
        q = torch.where(in_tail, lq.exp() * t, 0)
        g, budget = g + q, budget + (err + head.u * (8 + lq.abs())) * q.abs()
    grads = torch.where(slots >= 0, slot_grad, 0).double()
    g.scatter_add_(1, slots.long().clamp(min=0), grads)
    budget.scatter_add_(1, slots.long().clamp(min=0), 4 * head.u * grads.abs())
    # the slope's own relative error; far into the soft cap, that of its argument counts
    bend = torch.where(head.raw > -INF, head.u * (8 + 6 * head.a.abs() / head.softcap) if head.softcap else 3 * head.u, 0)
    # and a probability below the smallest normal number is 0
    return g * head.slope, (budget + bend * g.abs()) * head.slope + 2.0**-118


@any_dtype
@any_head
@pytest.mark.parametrize("entropy, tail", FLAGS)
def test_dlogits_match_float64(isa, kind, dtype, entropy, tail):
    head = Head(4, WIDTHS, dtype, **HEADS[kind])
    head.spoil()
    slots, slot_grad, slot_tail, rows = cotangents(head, 9)
    slots[1, 2], slots[2, 2] = 500, 3000  # the columns with all the mass: their tail term would be huge
    rows[5] = tail_lse(head, slots)
    case, terms = (slots, slot_grad, slot_tail if tail else None, rows), {"entropy": entropy, "tail": tail}
    got = head.dlogits(*case, **terms)
    within(got, *dlogits_oracle(head, *case, **terms))
    for out_dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        rounded = got.to(torch.float32).to(out_dtype) if out_dtype.itemsize == 2 else got.to(out_dtype)
        assert torch.equal(head.dlogits(*case, **terms, out_dtype=out_dtype), rounded)


@any_dtype
@pytest.mark.parametrize("softcap", (0.0, 5.0))
def test_zero_cotangents_give_exact_zeros(isa, dtype, softcap):
    head = Head(3, (100,), dtype, softcap=softcap)
    slots, slot_grad, slot_tail, rows = cotangents(head, 4)
    rows[[1, 2, 4]], rows[0, 1] = 0, torch.nan
    assert not head.dlogits(slots, slot_grad * 0, slot_tail, rows, entropy=True, tail=True).any()
    got = head.dlogits(slots, slot_grad, slot_tail, rows, entropy=True, tail=True)
    assert torch.equal(got != 0, ~head.outside(torch.where(slot_grad != 0, slots, -1)))


@any_dtype
@pytest.mark.parametrize("empty", (-INF, INF))
def test_empty_tail_and_empty_rows_stay_finite(isa, dtype, empty):
    """tail_lse is −inf (or +inf, the driver's choice) when every column is a slot; lse is −inf when every logit is."""
    head = Head(3, (6,), dtype)
    head.raw[2] = -INF
    rows = cotangents(head, 1)[3]
    rows[3, 2], rows[5] = 0, empty
    slots, slot_grad = torch.arange(6, dtype=I32).repeat(3, 1), torch.ones(3, 6, dtype=dtype)
    got = head.dlogits(slots, slot_grad, torch.zeros(3, 6, dtype=torch.bool), rows, entropy=True, tail=True)
    assert torch.equal(got[2], slot_grad[2])
    want, budget = dlogits_oracle(head, slots, slot_grad, None, rows, entropy=True, tail=False)
    within(got[:2], want[:2], budget[:2])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("dim", (1, 37, 640))
def test_gather_ops(isa, dtype, dim):
    n, vocab, k = 9, 50, 5
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    u, g = half_ulp(acc), torch.Generator().manual_seed(4)
    hidden = torch.randn(n, dim + 3, generator=g).to(dtype)[:, :dim]
    weight = torch.randn(vocab, 2 * dim, generator=g).to(dtype)[:, dim:]
    hidden[0, 0], hidden[1, 0] = 6e-8, 3e-5  # subnormal in float16
    ids = torch.randint(0, vocab, (n, k), generator=g, dtype=I32)
    ids[0, 0], ids[1, 1], ids[2:7, 2] = -1, vocab, 11
    valid, index = (ids >= 0) & (ids < vocab), ids.long().clamp(0, vocab - 1)
    grad = torch.randn(n, k, generator=g, dtype=torch.float64).to(acc)
    rows = torch.where(valid[..., None], weight.double()[index], 0)

    products, got = rows * hidden.double()[:, None], rlad.gather_dot(hidden, weight, ids)
    assert got.dtype == acc
    within(got, products.sum(-1), u * (dim / 16 + 4) * products.abs().sum(-1))

    def rounded(got, terms, magnitudes):
        within(got, terms, u * (n * k + 2) * magnitudes + half_ulp(got.dtype) * terms.abs() + 2.0**-25)

    terms, got = torch.where(valid, grad, 0).double()[..., None] * rows, rlad.gather_dhidden(grad, weight, ids)
    assert got.dtype == dtype
    rounded(got, terms.sum(1), terms.abs().sum(1))

    terms = (torch.where(valid, grad, 0).double()[..., None] * hidden.double()[:, None]).view(-1, dim)
    zeros, (sorted_ids, order) = torch.zeros(vocab, dim, dtype=torch.float64), ids.flatten().sort(stable=True)
    for out_dtype in (dtype, acc):
        got = torch.zeros(vocab, dim + 2, dtype=out_dtype)[:, 1:-1]
        rlad.gather_dweight_(got, grad, hidden, order, sorted_ids)
        rounded(got, zeros.index_add(0, index.flatten(), terms), zeros.index_add(0, index.flatten(), terms.abs()))


@any_dtype
def test_bitwise_equal_for_any_thread_count(isa, dtype):
    head = Head(64, (1000, 1500), dtype, bias=True, softcap=20.0)
    case = cotangents(head, 5)
    hidden, grad, weight = (torch.randn(shape).to(dtype) for shape in ((4000, 16), (4000, 2), (3, 16)))
    ids = torch.randint(0, 3, (4000, 2), dtype=I32)  # runs longer than a thread's share
    sorted_ids, order = ids.flatten().sort(stable=True)

    def run(threads):
        torch.set_num_threads(threads)
        d_weight = torch.zeros(3, 16, dtype=dtype)
        rlad.gather_dweight_(d_weight, grad, hidden, order, sorted_ids)
        gathered = rlad.gather_dot(hidden, weight, ids), rlad.gather_dhidden(grad, weight, ids)
        return [*head.fold(case[0]), *head.topk(case[0], 9), head.dlogits(*case, entropy=True, tail=True), d_weight, *gathered]

    before = torch.get_num_threads()
    try:
        first, *others = run(1), run(2), run(3)
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_bad_arguments_name_the_op_and_the_argument(isa):
    x, t, stats, rows = torch.zeros(2, 8), torch.ones(2), torch.zeros(5, 2), torch.zeros(6, 2)
    none, z, top, order = torch.empty(2, 0, dtype=I32), torch.empty(2, 0), torch.empty(2, 1025), torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match=r"fold_: stats must be float32 \(5, 2\).*got float64 \(5, 2\)"):
        rlad.fold_(x, 0, None, t, 1.0, 0.0, none, True, stats.double(), z, False, False)
    with pytest.raises(RuntimeError, match=r"fold_: logits must be .*stride 1.*strides \(1, 2\)"):
        rlad.fold_(x.t().contiguous().t(), 0, None, t, 1.0, 0.0, none, True, stats, z, False, False)
    with pytest.raises(RuntimeError, match=r"fold_topk_: top_logits must be \(R, K\) with K in \[1, 1024\]"):
        rlad.fold_topk_(x, 0, None, t, 1.0, 0.0, none, stats, z, top, top.to(I32), False)
    with pytest.raises(RuntimeError, match=r"dlogits_: bias must be float32 \(8\).*got float32 \(9\)"):
        rlad.dlogits_(x, x, 0, torch.zeros(9), t, 1.0, 0.0, none, z, None, rows, False, False)
    with pytest.raises(RuntimeError, match=r"gather_dweight_: order must be a permutation of \[0, 2\), got 2"):
        rlad.gather_dweight_(torch.zeros(4, 3), torch.zeros(2, 1), torch.zeros(2, 3), order, order.to(I32))


def test_instruction_set_is_chosen_by_name(monkeypatch):
    monkeypatch.delenv("RLAD_CPU_ISA", raising=False)
    assert rlad.cpu_isa() in (*ISAS, "avx512_bf16", "amx_bf16")
    monkeypatch.setenv("RLAD_CPU_ISA", "sse9")
    names = "generic, avx2, avx512, avx512_bf16, amx_bf16"
    with pytest.raises(RuntimeError, match=f"must be one of {names}, got 'sse9'; this CPU has generic"):
        rlad.cpu_isa()
