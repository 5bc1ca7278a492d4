"""The C++ forward row passes against float64 formulas, and what holds for all passes."""

import pytest
import torch

from tests.cpp_rows import (
    FLAGS,
    HEADS,
    I32,
    INF,
    WIDTHS,
    Head,
    any_dtype,
    any_head,
    check_slots,
    check_stats,
    cotangents,
    dlogits_oracle,
    rlad,
    some_slots,
    within,
)  # fmt: skip

pytestmark = pytest.mark.cpu


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
    check_stats(head, head.fold(slots[:, :0])[0], torch.ones_like(head.raw, dtype=torch.bool))


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
    rows = cotangents(head, 1)[2]
    want, budget = dlogits_oracle(head, none, torch.empty(3, 0, dtype=dtype), rows, entropy=True, tail=False)
    within(head.dlogits(none, torch.empty(3, 0, dtype=dtype), rows, entropy=True, tail=False), want, budget)
    empty = Head(0, (50,), dtype)
    for op in (empty.fold, lambda slots: empty.topk(slots, 4)):
        assert op(torch.empty(0, 2, dtype=I32))[0].shape == (6, 0)
    case = torch.empty(0, 2, dtype=I32), torch.empty(0, 2, dtype=dtype), torch.empty(6, 0, dtype=dtype)
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
    """A mass of e^-300 outside the top-K, some of it pushed out of the heap on the way: never total minus top-K."""
    head = Head(2, (1000, 1000), dtype, spread=0.5)
    head.raw[:, 1500:1510] += 300
    stats, _, _, ids = head.topk(torch.empty(2, 0, dtype=I32), 10)
    assert torch.equal(ids.sort(1).values, torch.arange(1500, 1510, dtype=I32).repeat(2, 1))
    assert (stats[1] >= 1).all()
    check_stats(head, stats, head.outside(ids), extras=False)


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
        rlad.gather_dweight_(d_weight, grad, hidden, order, sorted_ids, False)
        rlad.gather_dhidden_(rows := torch.zeros_like(hidden), grad, weight, ids, False)
        gathered = rlad.gather_dot(hidden, weight, ids), rows
        return [*head.fold(case[0]), *head.topk(case[0], 9), head.dlogits(*case, entropy=True, tail=True), d_weight, *gathered]

    before = torch.get_num_threads()
    try:
        first, *others = run(1), run(2), run(3)
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_bad_arguments_name_the_op_and_the_argument(isa):
    x, t, stats, rows = torch.zeros(2, 8), torch.ones(2), torch.zeros(6, 2), torch.zeros(6, 2)
    none, z, top, order = torch.empty(2, 0, dtype=I32), torch.empty(2, 0), torch.empty(2, 1025), torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match=r"fold_: stats must be float32 \(6, 2\).*got float64 \(6, 2\)"):
        rlad.fold_(x, 0, None, t, 1.0, 0.0, none, stats.double(), z, False, False)
    with pytest.raises(RuntimeError, match=r"fold_: logits must be .*stride 1.*strides \(1, 2\)"):
        rlad.fold_(x.t().contiguous().t(), 0, None, t, 1.0, 0.0, none, stats, z, False, False)
    with pytest.raises(RuntimeError, match=r"fold_topk_: top_logits must be \(R, K\) with K in \[1, 1024\]"):
        rlad.fold_topk_(x, 0, None, t, 1.0, 0.0, none, stats, z, top, top.to(I32), False)
    with pytest.raises(RuntimeError, match=r"dlogits_: bias must be float32 \(8\).*got float32 \(9\)"):
        rlad.dlogits_(x, x, 0, torch.zeros(9), t, 1.0, 0.0, none, z, rows, top[:, :1].to(I32), None, False, False)
    with pytest.raises(RuntimeError, match=r"gather_dweight_: order must be a permutation of \[0, 2\), got 2"):
        rlad.gather_dweight_(torch.zeros(4, 3), torch.zeros(2, 1), torch.zeros(2, 3), order, order.to(I32), False)


def test_instruction_set_is_chosen_by_name(monkeypatch):
    monkeypatch.delenv("RLAD_CPU_ISA", raising=False)
    assert rlad.cpu_isa() in ("generic", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    monkeypatch.setenv("RLAD_CPU_ISA", "sse9")
    names = "generic, avx2, avx512, avx512_bf16, amx_bf16"
    with pytest.raises(RuntimeError, match=f"must be one of {names}, got 'sse9'; this CPU has generic"):
        rlad.cpu_isa()
