"""The three reductions against loops over sequences: padded and packed, masks, denominators, nothing kept, bad seq_ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rlad_kernels as rk
from tests.oracles import gradient, reduced

REDUCTIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
EPS = torch.finfo(torch.float32).eps


def values(a: Tensor, mask: Tensor | None = None, **options: Any) -> rk.LossOutput:
    """A loss whose token losses are −a: at r = 1 the surrogate is −rÂ, and its gradient by the log-prob is −a too."""
    return rk.grpo_loss(torch.zeros_like(a).requires_grad_(), torch.zeros_like(a), a, mask, **options)


def check(a: Tensor, keep: Tensor, reduction: str, mask: Tensor | None, seq_ids: Tensor | None, denominator: Any) -> None:
    """Loss and gradient against Σ weight·(−a) in float64; two divisions and a product round each term, then every sum does."""
    divisor = denominator.item() if isinstance(denominator, Tensor) else denominator
    s = torch.zeros_like(a).requires_grad_()
    out = rk.grpo_loss(s, torch.zeros_like(a), a, mask, reduction=reduction, seq_ids=seq_ids, denominator=denominator)
    terms = -a.double() * gradient(lambda x: reduced(x, keep, reduction, seq_ids, divisor))(a.double())
    exact = reduced(-a.double(), keep, reduction, seq_ids, divisor)
    assert (out.loss.double() - exact).abs() <= (3 + a.numel()) * EPS / 2 * terms.abs().sum()
    assert ((torch.autograd.grad(out.loss, s)[0].double() - terms).abs() <= 4 * EPS / 2 * terms.abs()).all()
    assert torch.equal(out.token_loss, torch.where(keep, -a, 0))


@st.composite
def problems(draw: Any) -> tuple[tuple[int, int], list[bool], int, float | str | None]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    keep = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return (rows, columns), keep, draw(st.integers(0, 2**31)), draw(st.sampled_from([None, 3, 2.5, "tensor"]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(problem=problems())
def test_padded_and_packed_tokens_any_mask_any_denominator(reduction: str, problem: Any) -> None:
    shape, kept, seed, denominator = problem
    a = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(torch.get_default_device())
    keep = torch.tensor(kept).view(shape)
    denominator = torch.tensor(7.0) if denominator == "tensor" else denominator
    check(a, keep, reduction, keep, None, denominator)
    check(a, torch.ones_like(keep), reduction, None, None, denominator)
    rows = torch.arange(shape[0])[:, None].expand(shape) * 3 - 1  # ids may skip numbers and start anywhere
    check(a.flatten(), keep.flatten(), reduction, keep.flatten().float(), rows.flatten(), denominator)
    check(a[keep], keep[keep], reduction, None, rows[keep].int(), denominator)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["grpo", "trrd", "topk_kl"])
def test_packed_equals_padded(name: str, reduction: str) -> None:
    """Dropping the padding changes neither the loss nor the gradient of a kept token, in any loss."""
    shape, keep = (4, 6), torch.rand(4, 6) < 0.6
    keep[2] = False  # a sequence without a kept token does not count
    seq_ids = torch.arange(4)[:, None].expand(shape)[keep]
    s, o, t, a = (-3 * torch.rand(shape) for _ in range(4))
    lq, lp = torch.randn(*shape, 5).log_softmax(2), torch.randn(*shape, 5).log_softmax(2)
    ids = torch.arange(5).expand(*shape, 5)

    def loss(cut: Any, leaf: Tensor, **options: Any) -> rk.LossOutput:
        if name == "topk_kl":
            return rk.topk_kl_loss(leaf, rk.TopK(cut(ids), cut(lp)), **options)
        rest = (cut(o), cut(a)) if name == "grpo" else (cut(o), cut(t), cut(a))
        return (rk.grpo_loss if name == "grpo" else rk.trrd_loss)(leaf, *rest, **options)

    leaf = (lq if name == "topk_kl" else s).requires_grad_()
    packed_leaf = leaf.detach()[keep].requires_grad_()
    padded = loss(lambda x: x, leaf, mask=keep, reduction=reduction)
    packed = loss(lambda x: x[keep], packed_leaf, reduction=reduction, seq_ids=seq_ids)
    assert torch.equal(padded.token_loss[keep], packed.token_loss)
    # the same terms in another order of summation: each partial sum rounds once
    bound = keep.sum() * EPS * packed.token_loss.abs().max()
    assert (padded.loss - packed.loss).abs() <= bound
    padded.loss.backward()
    packed.loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[keep], packed_leaf.grad)
    assert not leaf.grad[~keep].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_global_denominator_adds_up_over_micro_batches(reduction: str) -> None:
    a, keep = torch.randn(6, 5), torch.rand(6, 5) < 0.7
    total = int(keep.sum()) if reduction == "token-mean" else int(keep.any(1).sum())
    whole = values(a, keep, reduction=reduction).loss
    parts = [values(a[i : i + 2], keep[i : i + 2], reduction=reduction, denominator=total).loss for i in (0, 2, 4)]
    assert (whole - sum(parts)).abs() <= 30 * EPS * a.abs().max()  # 30 terms in another order


def test_defaults() -> None:
    a = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0]])
    keep = torch.tensor([[1, 1, 1], [1, 0, 0]])
    zeros, teacher = torch.zeros_like(a), rk.TopK(torch.zeros(2, 3, 1, dtype=torch.int32), torch.zeros(2, 3, 1))
    token_mean, seq_mean = -15 / 4, -(7 / 3 + 8) / 2
    assert rk.grpo_loss(zeros, zeros, a, keep).loss.item() == token_mean
    assert rk.trrd_loss(zeros, zeros, zeros, a, keep).loss.item() == pytest.approx(seq_mean, rel=2 * EPS)
    lq = -torch.where(keep > 0, a, 0)[..., None]
    assert rk.topk_kl_loss(lq, teacher, keep, normalize="none", direction="forward").loss.item() == -token_mean


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
def test_no_tokens(reduction: str, shape: tuple[int, ...]) -> None:
    seq_ids = torch.zeros(0, dtype=torch.int64) if len(shape) == 1 else None
    s, wide = torch.zeros(shape, requires_grad=True), torch.zeros(*shape, 2)
    options: dict[str, Any] = {"reduction": reduction, "seq_ids": seq_ids}
    for out in (
        rk.grpo_loss(s, torch.zeros(shape), torch.zeros(shape), **options),
        rk.topk_kl_loss(wide + s[..., None], rk.TopK(wide.int(), wide), **options),
    ):
        assert out.loss.item() == 0
        assert out.token_loss.shape == shape
        assert torch.autograd.grad(out.loss, s)[0].shape == shape
        assert all(x == 0 for x in out.metrics.values())


@pytest.mark.parametrize("denominator", [None, 5], ids=["default", "denominator_5"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mask", ["bool", "int", "float"])
def test_all_masked_is_zero_and_attached(mask: str, reduction: str, denominator: int | None) -> None:
    s = torch.full((2, 3), torch.nan, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype={"bool": torch.bool, "int": torch.int64, "float": torch.float32}[mask])
    out = rk.grpo_loss(s, s, s, nothing, reduction=reduction, denominator=denominator)
    assert out.loss.item() == 0
    out.loss.backward()
    assert s.grad is not None
    assert not s.grad.any()
    assert not out.token_loss.any()


BAD_SEQ_IDS = {
    "missing": (None, "needs seq_ids"),
    "wrong_shape": ([0, 0, 1], r"\(3,\)"),
    "floats": ([0.0, 0.0, 1.0, 1.0], "float"),
    "decreasing": ([0, 1, 1, 0], "non-decreasing"),
}


@pytest.mark.parametrize("case", BAD_SEQ_IDS)
@pytest.mark.parametrize("reduction", REDUCTIONS[1:])
def test_bad_seq_ids(reduction: str, case: str) -> None:
    ids, wanted = BAD_SEQ_IDS[case]
    with pytest.raises(ValueError, match=rf"^grpo_loss: .*seq_ids.*{wanted}|^grpo_loss: .*{wanted}"), rk.set_checks(True):
        values(torch.zeros(4), reduction=reduction, seq_ids=None if ids is None else torch.tensor(ids))


def test_seq_ids_belong_to_packed_tokens() -> None:
    with pytest.raises(ValueError, match=r"^grpo_loss: seq_ids .*\(2, 2\)"):
        values(torch.zeros(2, 2), reduction="seq-mean-token-mean", seq_ids=torch.zeros(4).int())


def test_the_denominator_receives_no_gradient() -> None:
    denominator = torch.tensor(4.0, requires_grad=True)
    out = values(torch.ones(3), denominator=denominator)
    assert out.loss.item() == -0.75
    out.loss.backward()
    assert denominator.grad is None
