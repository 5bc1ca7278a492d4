"""The three reductions against loops over sequences: padded and packed, masks, denominators, nothing kept, bad seq_ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import GRPO, LossOutput
from rlad_kernels.losses.ratio.trrd import TRRD
from rlad_kernels.losses.support.topk_kl import TopKKL
from tests.oracles import gradient, reduced

REDUCTIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
EPS = torch.finfo(torch.float32).eps


def values(a: Tensor, mask: Tensor | None = None, **options: Any) -> LossOutput:
    """A loss whose token losses are −a: at r = 1 the surrogate is −rÂ, and its gradient by the log-prob is −a too."""
    s, reduction = torch.zeros_like(a).requires_grad_(), rk.Reduction(**options)
    return GRPO()(s, old_logp=torch.zeros_like(a), advantages=a, mask=mask, reduction=reduction)


def check(a: Tensor, keep: Tensor, reduction: str, mask: Tensor | None, seq_ids: Tensor | None, denominator: Any) -> None:
    """Loss and gradient against Σ weight·(−a) in float64; two divisions and a product round each term, then every sum does."""
    divisor = denominator.item() if isinstance(denominator, Tensor) else denominator
    s = torch.zeros_like(a).requires_grad_()
    chosen = rk.Reduction(reduction, seq_ids=seq_ids, denominator=denominator)
    out = GRPO()(s, old_logp=torch.zeros_like(a), advantages=a, mask=mask, reduction=chosen)
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

    def loss(cut: Any, leaf: Tensor, reduction: Any, mask: Tensor | None = None) -> LossOutput:
        if name == "topk_kl":
            return TopKKL()(leaf, teacher=rk.TopK(cut(ids), cut(lp)), mask=mask, reduction=reduction)
        rest = {"old_logp": cut(o), "advantages": cut(a)} | ({"teacher_logp": cut(t)} if name == "trrd" else {})
        return (GRPO() if name == "grpo" else TRRD())(leaf, **rest, mask=mask, reduction=reduction)

    leaf = (lq if name == "topk_kl" else s).requires_grad_()
    packed_leaf = leaf.detach()[keep].requires_grad_()
    padded = loss(lambda x: x, leaf, reduction, keep)
    packed = loss(lambda x: x[keep], packed_leaf, rk.Reduction(reduction, seq_ids=seq_ids))
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
    whole = values(a, keep, kind=reduction).loss
    parts = [values(a[i : i + 2], keep[i : i + 2], kind=reduction, denominator=total).loss for i in (0, 2, 4)]
    assert (whole - sum(parts)).abs() <= 30 * EPS * a.abs().max()  # 30 terms in another order


def test_defaults() -> None:
    a = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0]])
    keep = torch.tensor([[1, 1, 1], [1, 0, 0]])
    zeros, teacher = torch.zeros_like(a), rk.TopK(torch.zeros(2, 3, 1, dtype=torch.int32), torch.zeros(2, 3, 1))
    token_mean, seq_mean = -15 / 4, -(7 / 3 + 8) / 2
    rest = {"old_logp": zeros, "advantages": a, "mask": keep}
    assert GRPO()(zeros, **rest).loss.item() == token_mean
    assert TRRD()(zeros, **rest, teacher_logp=zeros).loss.item() == pytest.approx(seq_mean, rel=2 * EPS)
    lq = -torch.where(keep > 0, a, 0)[..., None]
    assert TopKKL("forward", normalize="none")(lq, teacher=teacher, mask=keep).loss.item() == -token_mean


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
def test_no_tokens(reduction: str, shape: tuple[int, ...]) -> None:
    seq_ids = torch.zeros(0, dtype=torch.int64) if len(shape) == 1 else None
    s, wide = torch.zeros(shape, requires_grad=True), torch.zeros(*shape, 2)
    chosen = rk.Reduction(reduction, seq_ids=seq_ids)
    for out in (
        GRPO()(s, old_logp=torch.zeros(shape), advantages=torch.zeros(shape), reduction=chosen),
        TopKKL()(wide + s[..., None], teacher=rk.TopK(wide.int(), wide), reduction=chosen),
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
    chosen = rk.Reduction(reduction, denominator=denominator)
    out = GRPO()(s, old_logp=s, advantages=s, mask=nothing, reduction=chosen)
    assert out.loss.item() == 0
    out.loss.backward()
    assert s.grad is not None
    assert not s.grad.any()
    assert not out.token_loss.any()


BAD_SEQ_IDS = {
    "missing": (None, r"needs Reduction\(seq_ids=…\)"),
    "wrong_shape": ([0, 0, 1], r"\(3,\)"),
    "floats": ([0.0, 0.0, 1.0, 1.0], "float"),
    "decreasing": ([0, 1, 1, 0], "non-decreasing"),
}


@pytest.mark.parametrize("case", BAD_SEQ_IDS)
@pytest.mark.parametrize("reduction", REDUCTIONS[1:])
def test_bad_seq_ids(reduction: str, case: str) -> None:
    ids, wanted = BAD_SEQ_IDS[case]
    with pytest.raises(ValueError, match=rf"^GRPO: .*seq_ids.*{wanted}|^GRPO: .*{wanted}"), rk.set_checks(True):
        values(torch.zeros(4), kind=reduction, seq_ids=None if ids is None else torch.tensor(ids))


def test_seq_ids_belong_to_packed_tokens() -> None:
    with pytest.raises(ValueError, match=r"^GRPO: seq_ids .*\(2, 2\)"):
        values(torch.zeros(2, 2), kind="seq-mean-token-mean", seq_ids=torch.zeros(4).int())


def test_the_denominator_receives_no_gradient() -> None:
    denominator = torch.tensor(4.0, requires_grad=True)
    out = values(torch.ones(3), denominator=denominator)
    assert out.loss.item() == -0.75
    out.loss.backward()
    assert denominator.grad is None


@pytest.mark.parametrize("options", [{"group": "world"}, {"group": object(), "denominator": 3.0}])
def test_a_group_is_a_process_group_and_alone(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"GRPO: group must be a torch.distributed.ProcessGroup, without a denominator, got "):
        values(torch.ones(2, 3), kind="token-mean", **options)
