"""Spans and one number a sequence, against loops; a span mean in any loss, padded and packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rlad_kernels as rk
from tests.sweeps import problem

STATS = {"mean": Tensor.mean, "min": Tensor.min, "max": Tensor.max, "sum": Tensor.sum}


def spans_of(spans: list[int], keep: list[bool]) -> list[list[int]]:
    """Positions of the kept tokens of each run of equal numbers ≥ 0."""
    found: list[list[int]] = []
    for i, (span, kept) in enumerate(zip(spans, keep, strict=True)):
        if span >= 0:
            if i == 0 or spans[i - 1] != span:
                found.append([])
            found[-1] += [i] if kept else []
    return found


@st.composite
def rows(draw: Any) -> tuple[list[list[int]], list[list[bool]]]:
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    cells = [st.lists(x, min_size=shape[1], max_size=shape[1]) for x in (st.integers(-1, 2), st.booleans())]
    return tuple(draw(st.lists(c, min_size=shape[0], max_size=shape[0])) for c in cells)  # type: ignore[return-value]


def grpo(logp: Tensor, advantages: Tensor, mask: Tensor, reduction: rk.Reduction) -> rk.losses.LossOutput:
    """On policy: the ratio is 1, each token's loss −Â."""
    return rk.losses.GRPO()(logp, old_logp=logp, advantages=advantages, mask=mask, reduction=reduction)


@given(case=rows())
def test_span_means_in_a_loss(case: Any) -> None:
    spans, keep = torch.tensor(case[0]), torch.tensor(case[1])
    a = torch.arange(1.0, spans.numel() + 1).view(spans.shape) ** 2
    found = [[row[i] for i in span] for row, *c in zip(a, *case, strict=True) for span in spans_of(*c)]
    kept = [torch.stack(x) for x in found if x]
    zero, split = torch.zeros_like(a), [torch.tensor(i) for i, row in enumerate(a) for _ in row]
    sequence = torch.stack(split)
    for reduction, of in (("seq-mean-token-mean", Tensor.mean), ("seq-mean-token-sum", Tensor.sum)):
        want = -torch.stack([of(x) for x in kept]).mean() if kept else torch.tensor(0.0)
        seq_ids, mask = rk.spans.span_ids(spans, keep)
        padded = grpo(zero, a, mask, rk.Reduction(reduction, seq_ids=seq_ids))
        assert torch.allclose(padded.loss, want, rtol=1e-6)
        seq_ids, mask = rk.spans.span_ids(spans.flatten(), keep.flatten(), seq_ids=sequence)
        packed = grpo(zero.flatten(), a.flatten(), mask, rk.Reduction(reduction, seq_ids=seq_ids))
        assert torch.allclose(packed.loss, want, rtol=1e-6)
    if found:
        sums = rk.spans.sequence_stat(a.flatten(), mask, how="sum", seq_ids=seq_ids)
        assert sums.tolist() == [sum(x) for x in found]  # small integers: exact in any order


def test_spans_reduce_a_loss_inside_the_sweep() -> None:
    p = problem(shape=(2, 6), v=31)
    spans = torch.tensor([[-1, 0, 0, 1, 1, 1], [0, 0, -1, 0, 2, 2]])
    seq_ids, mask = rk.spans.span_ids(spans)
    assert seq_ids.tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 4, 4]]
    reduction = rk.Reduction("seq-mean-token-mean", seq_ids=seq_ids)
    out = rk.linear_loss(p.hidden, p.head, p.target, rk.losses.CrossEntropy(), mask=mask, reduction=reduction)
    nll = -rk.linear_logp(p.hidden, p.head, p.target).logp
    want = sum(nll[spans_of_row].mean() for spans_of_row in _cells(spans)) / 5
    assert torch.allclose(out.loss, want, rtol=1e-6)
    got = torch.autograd.grad(out.loss, p.hidden)[0]
    assert torch.allclose(got, torch.autograd.grad(want, p.hidden)[0], rtol=1e-4, atol=1e-7)
    assert not got[spans < 0].any()


def _cells(spans: Tensor) -> list[tuple[Tensor, Tensor]]:
    everything = [True] * spans.shape[1]
    found = [(i, x) for i, row in enumerate(spans.tolist()) for x in spans_of(row, everything)]
    return [(torch.full((len(x),), i), torch.tensor(x)) for i, x in found]


@pytest.mark.parametrize("how", STATS)
@given(case=rows())
def test_sequence_stat_padded_and_packed(how: str, case: Any) -> None:
    keep = torch.tensor(case[1])
    x = torch.where(keep, torch.arange(keep.numel()).view(keep.shape).sin() - 2, torch.nan)  # below 0: a stray 0 would show
    weight = torch.arange(1.0, len(keep) + 1)
    want = torch.stack([STATS[how](row[kept]) if kept.any() else row.new_zeros(()) for row, kept in zip(x, keep, strict=True)])
    leaf = x.clone().requires_grad_()
    packed = x.flatten().clone().requires_grad_()
    sequence = (torch.arange(len(keep))[:, None] * 3 - 1).expand(keep.shape).flatten()
    results = {leaf: rk.spans.sequence_stat(leaf, keep, how=how)}
    results[packed] = rk.spans.sequence_stat(packed, keep.flatten(), how=how, seq_ids=sequence)
    for tensor, got in results.items():
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)
        (got * weight).sum().backward()
        assert tensor.grad is not None
        slope = tensor.grad.view(keep.shape)
        assert not slope[~keep].any()
        total = {"sum": keep.sum(1), "mean": keep.any(1), "min": keep.any(1), "max": keep.any(1)}[how]
        assert torch.allclose(slope.sum(1), weight * total, rtol=1e-6)


def test_ties_share_the_gradient_and_lengths_may_differ() -> None:
    x = torch.tensor([1.0, 1.0, 2.0, 5.0, 4.0, 4.0], requires_grad=True)
    got = rk.spans.sequence_stat(x, how="min", seq_ids=torch.tensor([0, 0, 0, 4, 9, 9]))
    assert got.tolist() == [1, 5, 4]
    got.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, 0.5, 0, 1, 0.5, 0.5]


@pytest.mark.parametrize("how", STATS)
def test_nothing_at_all(how: str) -> None:
    assert rk.spans.sequence_stat(torch.zeros(3, 0), how=how).tolist() == [0, 0, 0]
    assert rk.spans.sequence_stat(torch.zeros(0), how=how, seq_ids=torch.zeros(0).int()).shape == (0,)
    ids, mask = rk.spans.span_ids(torch.full((2, 3), -1))
    assert not mask.any()
    assert (ids == 0).all()
    assert rk.spans.span_ids(torch.zeros(0).long())[0].shape == (0,)


WRONG = {
    "how": (lambda: rk.spans.sequence_stat(torch.zeros(2, 2), how="median"), r"sequence_stat: how must be one of .*'median'"),
    "x_ints": (lambda: rk.spans.sequence_stat(torch.zeros(2, 2).int()), r"sequence_stat: x must be floats .*int32 \(2, 2\)"),
    "x_3d": (lambda: rk.spans.sequence_stat(torch.zeros(2, 2, 2)), r"sequence_stat: x must be .*\(2, 2, 2\)"),
    "packed": (lambda: rk.spans.sequence_stat(torch.zeros(4)), r"sequence_stat: seq_ids .*\(4,\), seq_ids is None"),
    "padded": (
        lambda: rk.spans.sequence_stat(torch.zeros(2, 2), seq_ids=torch.zeros(4).int()),
        r"sequence_stat: seq_ids .*shape \(4,\)",
    ),
    "shape": (
        lambda: rk.spans.sequence_stat(torch.zeros(4), seq_ids=torch.zeros(3).int()),
        r"sequence_stat: seq_ids .*\(4,\).*\(3,\)",
    ),
    "falling": (
        lambda: rk.spans.sequence_stat(torch.zeros(2), seq_ids=torch.tensor([1, 0])),
        r"sequence_stat: seq_ids .*non-decreasing",
    ),
    "mask": (lambda: rk.spans.sequence_stat(torch.zeros(2, 2), torch.ones(2)), r"sequence_stat: mask .*\(2,\).*\(2, 2\)"),
    "spans": (lambda: rk.spans.span_ids(torch.zeros(2, 2)), r"span_ids: spans must be integers, got torch.float32"),
    "span_mask": (
        lambda: rk.spans.span_ids(torch.zeros(3).int(), torch.full((3,), 2)),
        r"span_ids: mask .*equal to 0 or 1, got 2",
    ),
    "span_seq": (
        lambda: rk.spans.span_ids(torch.zeros(3).int(), seq_ids=torch.zeros(2).int()),
        r"span_ids: seq_ids .*\(3,\).*\(2,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_message(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message), rk.set_checks(True):
        call()
