"""The C++ backward row passes and gathers against float64 formulas."""

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
    cotangents,
    dlogits_oracle,
    half_ulp,
    rlad,
    tail_lse,
    within,
)  # fmt: skip

pytestmark = pytest.mark.cpu


@any_dtype
@any_head
@pytest.mark.parametrize("entropy, tail", FLAGS)
def test_dlogits_match_float64(isa, kind, dtype, entropy, tail):
    head = Head(4, WIDTHS, dtype, **HEADS[kind])
    head.spoil()
    slots, slot_dz, rows = cotangents(head, 9)
    slots[1, 2], slots[2, 2] = 500, 3000  # the columns with all the mass: their tail term would be huge
    rows[5] = tail_lse(head, slots)
    case, terms = (slots, slot_dz, rows), {"entropy": entropy, "tail": tail}
    got = head.dlogits(*case, **terms)
    within(got, *dlogits_oracle(head, *case, **terms))
    for out_dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        rounded = got.to(torch.float32).to(out_dtype) if out_dtype.itemsize == 2 else got.to(out_dtype)
        lost = torch.zeros(4, 2, dtype=dtype)[:, :1]
        assert torch.equal(head.dlogits(*case, **terms, out_dtype=out_dtype, target=slots[:, 4:5], lost=lost), rounded)
        at, live = slots[:, 4:5].clamp(min=0).long(), slots[:, 4:5] >= 0
        assert torch.equal(lost, torch.where(live, (got - rounded.to(dtype)).gather(1, at), 0))


@any_dtype
@any_head
def test_every_pass_sees_the_logits_of_the_fold(isa, kind, dtype):
    """lse = the z that the fold read out: p is 1 to the last bit, unless the product is contracted into its use."""
    head = Head(1, (201,), dtype, **HEADS[kind])
    head.raw = head.raw.T.contiguous()  # a column each row
    head.rows, head.widths, head.inv_temp = 201, (1,), (torch.rand(201) + 0.5).to(dtype)
    head.bias = None if head.bias is None else head.bias[:1]
    slots, one = torch.zeros(201, 1, dtype=I32), torch.ones(201, 1, dtype=dtype)
    z = head.fold(slots)[1]
    rows = torch.cat([z, one, *[0 * one] * 4], 1).T.contiguous()
    got = head.dlogits(slots[:, :0], one[:, :0], rows, entropy=False, tail=False)
    assert torch.equal(got, head.dlogits(slots, one, rows, entropy=False, tail=False))
    tile = next(head.tiles())
    stats = z.new_empty(3 if head.softcap else 2, 201, 1)
    rlad.column_stats_(stats, tile[0], *tile[2:], rows[0], 1)
    assert (stats[0] == 1).all()


@any_dtype
@pytest.mark.parametrize("softcap", (0.0, 5.0))
def test_zero_cotangents_give_exact_zeros(isa, dtype, softcap):
    head = Head(3, (100,), dtype, softcap=softcap)
    slots, slot_dz, rows = cotangents(head, 4)
    rows[[1, 2, 4]], rows[0, 1] = 0, torch.nan
    assert not head.dlogits(slots, slot_dz * 0, rows, entropy=True, tail=True).any()
    got = head.dlogits(slots, slot_dz, rows, entropy=True, tail=True)
    assert torch.equal(got != 0, ~head.outside(torch.where(slot_dz != 0, slots, -1)))


@any_dtype
@pytest.mark.parametrize("empty", (-INF, INF))
def test_empty_tail_and_empty_rows_stay_finite(isa, dtype, empty):
    """tail_lse is −inf (or +inf, the driver's choice) when every column is a slot; lse is −inf when every logit is."""
    head = Head(3, (6,), dtype)
    head.raw[2] = -INF
    rows = cotangents(head, 1)[2]
    rows[3, 2], rows[5] = 0, empty
    slots, slot_dz = torch.arange(3, dtype=I32).repeat(3, 1), torch.ones(3, 3, dtype=dtype)
    got = head.dlogits(slots, slot_dz, rows, entropy=True, tail=True)
    assert torch.equal(got[:, :3], slot_dz)
    assert not got[2, 3:].any()
    want, budget = dlogits_oracle(head, slots, slot_dz, rows, entropy=True, tail=False)
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

    terms = torch.where(valid, grad, 0).double()[..., None] * rows
    for out_dtype in (dtype, acc):
        got = torch.zeros(n, dim + 2, dtype=out_dtype)[:, 1:-1]
        rlad.gather_dhidden_(got, grad, weight, ids, False)
        rounded(got, terms.sum(1), terms.abs().sum(1))
        rlad.gather_dhidden_(got.fill_(3), grad, weight, ids, True)
        rounded(got, terms.sum(1) + 3, terms.abs().sum(1) + 3)

    terms = (torch.where(valid, grad, 0).double()[..., None] * hidden.double()[:, None]).view(-1, dim)
    zeros, (sorted_ids, order) = torch.zeros(vocab, dim, dtype=torch.float64), ids.flatten().sort(stable=True)
    want, size = zeros.index_add(0, index.flatten(), terms), zeros.index_add(0, index.flatten(), terms.abs())
    for out_dtype in (dtype, acc):
        got = torch.zeros(vocab, dim + 2, dtype=out_dtype)[:, 1:-1]
        rlad.gather_dweight_(got, grad, hidden, order, sorted_ids, False)
        rounded(got, want, size)
        rlad.gather_dweight_(got.fill_(3), grad, hidden, order, sorted_ids, True)
        rounded(got, want + 3, size + 3)
        some = torch.full_like(got[5:12], 3)
        rlad.gather_dweight_(some, grad, hidden, order, sorted_ids, True, 5)
        assert torch.equal(some, got[5:12])
