"""filter_eps and the frozen head's forward-made gradient, against float64 and against the exact path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.engine import sparse
from tests.conftest import DEVICE
from tests.oracles import budgets, within
from tests.sweeps import Own, Problem, leaf, problem, relative, weighted_sum

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {"temperature": 0.6, "logit_scale": 1.3},
    "softcap": {"softcap": 4.0, "temperature": 0.8},
    "softcap below one": {"softcap": 0.8, "temperature": 0.16},
    "padded": {"vocab_size": 211},
}
EPS = 2.0**-7
N = 45
LOGP = Own(lambda s: s.logp)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sparse.BLOCK, DEVICE, 16)  # three blocks of a few tokens, so that the interpreter can follow
    monkeypatch.setattr(sparse, "EXACT_ABOVE", dict.fromkeys(sparse.EXACT_ABOVE, 1.0))


def peaked(n: int = N, v: int = 229, **options: Any) -> Problem:
    """More than two blocks of tokens, most columns below EPS."""
    p = problem(n=n, v=v, d=24, sigma=4.0, **options)
    p.mask = torch.rand(n, device=p.hidden.device) > 0.2
    return p


def cotangents(p: Problem, *shapes: tuple[int, ...]) -> list[Tensor]:
    drawn = [torch.randn(s, device=p.hidden.device) for s in shapes]
    drawn[0][::3] = 0  # rows without gradient
    return drawn


def dense_sparse(p: Problem, dlogits: Tensor, prob: Tensor, slope: Tensor, slots: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The definition in float64: what each block keeps of dL/dz, the rest through the mean dropped row; hidden, weight, dropped."""
    hidden, weight = p.hidden.detach().double(), p.weight.detach().double()[: dlogits.shape[1]]
    kept = torch.arange(len(hidden), device=hidden.device) if p.mask is None else p.mask.nonzero().squeeze(1)
    d_hidden, d_weight, dropped = (
        torch.zeros_like(hidden),
        torch.zeros_like(p.weight, dtype=torch.float64),
        hidden.new_zeros(len(hidden)),
    )
    for rows in kept.split(sparse.BLOCK[DEVICE]):
        keep = (prob[rows] > eps).any(0)
        keep[slots[rows].flatten()] = True
        g, out = dlogits[rows], ~keep
        q, mass = (prob * slope)[rows][:, out].sum(0), prob[rows][:, out].sum()
        mean = q @ weight[out] / mass.clamp_min(1e-300)
        factor = p.head.logit_scale / p.head.temperature
        d_hidden[rows] = (g * slope[rows])[:, keep] @ weight[keep] * factor + torch.outer(g[:, out].sum(1) * factor, mean)
        d_weight[keep.nonzero().squeeze(1)] += ((g * slope[rows])[:, keep] * factor).T @ hidden[rows]
        dropped[rows] = prob[rows][:, out].sum(1)
    return d_hidden, d_weight, dropped


def exact_dlogits(p: Problem, loss: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dz, p and the softcap's slope in float64; ``loss(log_softmax)`` is the objective."""
    twin = p.twin()
    z = twin.logits().detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(z.log_softmax(-1)), z)
    cap, temperature = p.options.get("softcap"), p.options.get("temperature", 1.0)
    slope = torch.ones_like(z) if cap is None else 1 - (z.detach() * temperature / cap).square()
    return g, z.detach().softmax(-1), slope


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("path", ["linear_logp", "fused"])
def test_gradients_are_those_of_the_definition(head: str, path: str) -> None:
    p = peaked(bias=head != "padded", **HEADS[head])
    (a,) = cotangents(p, (N,))
    keep = p.mask.double()

    def loss(logp: Tensor) -> Tensor:
        return (logp.gather(1, p.target[:, None])[:, 0] * a.double() * keep).sum()

    d_hidden, d_weight, dropped = dense_sparse(p, *exact_dlogits(p, loss), p.target[:, None], EPS)
    if path == "linear_logp":
        scores = rk.linear_logp(p.hidden, p.head, p.target, mask=p.mask, filter_eps=EPS)
        (scores.logp * a).sum().backward()
        assert torch.allclose(
            scores.extras["dropped_mass"].double(), dropped, rtol=1e-3, atol=1e-5 * max(1, scores.lse.max().item() / 16)
        )
    else:
        reduction = rk.Reduction("token-mean", denominator=1.0)
        out = rk.linear_loss(p.hidden, p.head, p.target, LOGP, w=a, mask=p.mask, filter_eps=EPS, reduction=reduction)
        out.loss.backward()
        assert out.metrics["dropped_mass_max"].item() == pytest.approx(dropped.max().item(), rel=1e-3)
        assert out.metrics["dropped_mass_mean"].item() == pytest.approx(dropped.sum().item() / keep.sum().item(), rel=1e-3)
    assert dropped.max() > 1e-3, "nothing was dropped: the test would prove nothing"
    assert relative(p.hidden.grad, d_hidden) < 1e-5
    assert relative(p.weight.grad, d_weight) < 1e-5


@pytest.mark.parametrize("head", HEADS)
def test_entropy_support_and_tail_terms(head: str) -> None:
    p = peaked(v=701, k=1, **{**HEADS[head], **({"vocab_size": 690} if head == "padded" else {})})
    k = p.ids.shape[1]
    a, b, c, t, l = cotangents(p, (N,), (N,), (N, k), (N,), (N,))
    names = ("logp", "entropy", "topk_logp", "tail_logp", "lse")
    scores = rk.linear_logp(p.hidden, p.head, p.target, topk_ids=p.ids, entropy=True, tail=True, mask=p.mask, filter_eps=EPS)
    weighted_sum(tuple(getattr(scores, n) for n in names), [a, b, c, t, l]).backward()
    twin = p.twin()
    z = twin.logits().detach().requires_grad_()
    logp = z.log_softmax(-1)
    outside = torch.ones_like(z, dtype=torch.bool).scatter_(1, p.ids, False)
    values = (
        logp.gather(1, p.target[:, None])[:, 0], -(logp.exp() * logp).sum(-1), logp.gather(1, p.ids),
        torch.where(outside, logp, -torch.inf).logsumexp(-1), z.logsumexp(-1),
    )  # fmt: skip
    keep = p.mask.double()
    total = sum(
        (v * w.double() * (keep if v.dim() == 1 else keep[:, None])).sum() for v, w in zip(values, (a, b, c, t, l), strict=True)
    )
    (g,) = torch.autograd.grad(total, z)
    cap, temperature = p.options.get("softcap"), p.options.get("temperature", 1.0)
    slope = torch.ones_like(z) if cap is None else 1 - (z.detach() * temperature / cap).square()
    slots = torch.cat([p.target[:, None], p.ids], 1)
    d_hidden, d_weight, dropped = dense_sparse(p, g, z.detach().softmax(-1), slope, slots, EPS)
    assert dropped.max() > 1e-3
    assert relative(p.hidden.grad, d_hidden) < 1e-5
    assert relative(p.weight.grad, d_weight) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dropped_mass_bounds_the_error(dtype: torch.dtype) -> None:
    p = peaked(dtype=dtype)
    a = cotangents(p, (N,))[0]
    scores = rk.linear_logp(p.hidden, p.head, p.target, mask=p.mask, filter_eps=EPS)
    (scores.logp * a).sum().backward()
    twin = p.twin()
    logp = torch.where(p.mask, twin.logits().log_softmax(-1).gather(1, p.target[:, None])[:, 0], 0)
    (logp * a.double()).sum().backward()
    error = (p.hidden.grad.double() - twin.hidden.grad).norm(dim=1)
    spread = 2 * twin.weight.detach().norm(dim=1).max()
    rounding = 0.01 if dtype == torch.bfloat16 else 1e-5
    bound = a.abs().double() * scores.extras["dropped_mass"].double() * spread
    assert (error <= bound + rounding * twin.hidden.grad.norm(dim=1).max()).all()
    assert (error > 1e-4).any() and relative(p.hidden.grad, twin.hidden.grad) < 0.05


@pytest.mark.cpu
def test_the_real_block_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    p, a = peaked(n=300, v=2000, dtype=torch.bfloat16), torch.randn(300)
    (rk.linear_logp(p.hidden, p.head, p.target, mask=p.mask, filter_eps=2.0**-14).logp * a).sum().backward()
    twin = p.twin()
    (torch.where(p.mask, twin.logits().log_softmax(-1).gather(1, p.target[:, None])[:, 0], 0) * a.double()).sum().backward()
    assert relative(p.hidden.grad, twin.hidden.grad) < 5e-3
    assert relative(p.weight.grad, twin.weight.grad) < 5e-3


@pytest.mark.parametrize("path", ["linear_logp", "fused"])
def test_a_tiny_eps_is_the_exact_backward(path: str) -> None:
    p, a = peaked(), torch.randn(N, device=DEVICE)
    grads = []
    for eps in (0.0, 1e-30):
        hidden, weight = leaf(p.hidden), leaf(p.weight)
        head = rk.LMHead(weight, p.bias)
        if path == "linear_logp":
            loss = (rk.linear_logp(hidden, head, p.target, mask=p.mask, filter_eps=eps).logp * a).sum()
        else:
            loss = rk.linear_loss(hidden, head, p.target, LOGP, w=a, mask=p.mask, filter_eps=eps).loss
        loss.backward()
        grads.append((hidden.grad, weight.grad))
    for exact, filtered in zip(*grads, strict=True):
        assert relative(filtered, exact) < 1e-6


@pytest.mark.parametrize("rows", ("all rows", pytest.param("rows without gradient", marks=pytest.mark.slow_interpreted)))
@pytest.mark.parametrize("blocks", ("one", pytest.param("all", marks=pytest.mark.slow_interpreted)))
@pytest.mark.parametrize("path", ["linear_logp", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow_interpreted)], ids=str)
def test_blocks_that_would_keep_most_columns_are_exact(
    path: str, blocks: str, rows: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the blocks are flat: they keep every column, drop nothing, and their gradient is the exact one."""
    monkeypatch.setattr(sparse, "EXACT_ABOVE", dict.fromkeys(sparse.EXACT_ABOVE, 0.5))
    p = problem(n=N, v=229, d=24, sigma=12.0, dtype=dtype)
    a, size = torch.randn(N), sparse.BLOCK[DEVICE]
    if rows == "rows without gradient":
        a[::3] = 0
    flat = torch.ones(N, dtype=torch.bool) if blocks == "all" else (torch.arange(N) // size) == 1
    p.hidden = leaf(torch.where(flat[:, None], p.hidden.detach() / 120, p.hidden.detach()))
    found = []
    for eps in (0.0, EPS / 4):
        hidden, weight, bias = leaf(p.hidden), leaf(p.weight), leaf(p.bias)
        head = rk.LMHead(weight, bias)
        if path == "linear_logp":
            scores = rk.linear_logp(hidden, head, p.target, filter_eps=eps)
            dropped = scores.extras.get("dropped_mass")
            (scores.logp * a).sum().backward()
        else:
            out = rk.linear_loss(
                hidden, head, p.target, LOGP, w=a, filter_eps=eps, reduction=rk.Reduction("token-mean", denominator=1.0)
            )
            dropped = out.metrics.get("dropped_mass_max")
            out.loss.backward()
        found.append([x.grad.double() for x in (hidden, weight, bias)])
    rounding = 1e-6 if dtype == torch.float32 else 4e-3
    assert relative(found[1][0][flat], found[0][0][flat]) < rounding
    if blocks == "all":
        assert dropped.max() == 0
        assert all(relative(mine, exact) < rounding for mine, exact in zip(found[1], found[0], strict=True))
    else:
        assert dropped.max() > 0
        assert 1e-6 < relative(found[1][0][~flat], found[0][0][~flat]) < 0.1
        assert relative(found[1][1], found[0][1]) < 0.1


@pytest.mark.cpu
@pytest.mark.parametrize("path", ["linear_logp", "fused"])
def test_on_cuda_the_host_reads_twice(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many columns the blocks keep, and which: tensors that say that they are on CUDA, and what asks them for a value."""
    p, reads = peaked(softcap=None), []
    p.mask = None
    for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *args, n=name, f=real, **kw: (reads.append(n), f(self, *args, **kw))[1])
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("dropped_mass", "scale_"):  # kernels there, which read nothing; here their twins do
        monkeypatch.setattr(torch.ops.rlad, name, lambda x, *args: torch.zeros(args[0].shape[:1]))
    with rk.set_compaction(False):  # dropping masked rows would be a read more
        if path == "linear_logp":
            logp = rk.linear_logp(p.hidden, p.head, p.target, filter_eps=EPS).logp
            assert reads == []
            logp.sum().backward()
        else:
            rk.linear_loss(p.hidden, p.head, p.target, LOGP, w=torch.ones(N), filter_eps=EPS).loss.backward()
    assert reads == ["tolist", "nonzero"]


@pytest.mark.cpu
def test_set_tile_and_dropped_rows_do_not_change_the_choice() -> None:
    p, a = peaked(), torch.randn(N, device=DEVICE)
    found = []
    for rows, compaction in ((None, True), (40, True), (None, False)):
        q = p.twin(torch.float32)
        with rk.set_tile(rows, 50), rk.set_compaction(compaction):
            mask = p.mask if compaction else None
            weight = a if compaction else torch.where(p.mask, a, 0)
            (rk.linear_logp(q.hidden, q.head, q.target, mask=mask, filter_eps=EPS).logp * weight).sum().backward()
        found.append(q.weight.grad)
    assert relative(found[1], found[0]) < 1e-6
    assert relative(found[2], found[0]) < 0.05  # other blocks, another choice, the same gradient within what was dropped


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("cotangent", ["logp", "logp and lse"])
def test_frozen_head(head: str, cotangent: str) -> None:
    p = peaked(n=70, **HEADS[head])
    a, l = cotangents(p, (70,), (70,))
    frozen = rk.LMHead(p.weight.detach(), p.bias.detach(), **p.options)
    scores = rk.linear_logp(p.hidden, frozen, p.target, mask=p.mask)
    ((scores.logp * a).sum() + ((scores.lse * l).sum() if "lse" in cotangent else 0)).backward()

    def formula() -> tuple[torch.Tensor, ...]:
        twin = p.twin()
        z = twin.logits()
        logp = torch.where(p.mask, z.log_softmax(-1).gather(1, p.target[:, None])[:, 0], 0)
        lse = torch.where(p.mask, z.logsumexp(-1), 0)
        total = (logp * a.double()).sum() + ((lse * l.double()).sum() if "lse" in cotangent else 0)
        return torch.autograd.grad(total, twin.hidden)

    within(p.hidden.grad, *budgets(formula)[0], "d_hidden")
    assert torch.equal(p.hidden.grad[~p.mask], torch.zeros_like(p.hidden.grad[~p.mask]))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "sparse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, frozen: bool) -> None:
    """With small gradients and many small probabilities, which float16 alone would lose."""
    p = problem(n=20, v=900, d=24, sigma=0.5 if frozen else 2.0, dtype=dtype, bias=False)
    a = torch.randn(20) * 1e-4
    head = rk.LMHead(p.weight.detach()) if frozen else p.head
    (rk.linear_logp(p.hidden, head, p.target, filter_eps=0.0 if frozen else 2.0**-12).logp * a).sum().backward()
    twin = p.twin()
    (twin.logits().log_softmax(-1).gather(1, p.target[:, None])[:, 0] * a.double()).sum().backward()
    assert relative(p.hidden.grad, twin.hidden.grad) < (3e-3 if frozen else 2e-2)


@pytest.mark.cpu
def test_frozen_head_gradcheck() -> None:
    p = problem(n=5, v=23, d=4, dtype=torch.float64, softcap=3.0)
    head = rk.LMHead(p.weight.detach(), p.bias.detach(), softcap=3.0)

    def f(hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = rk.linear_logp(hidden, head, p.target)
        return scores.logp, scores.lse

    assert torch.autograd.gradcheck(f, (p.hidden,))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_row_of_nan_that_nothing_is_sent_back_to_has_no_gradient(frozen: bool) -> None:
    """With a frozen head the gradient is made in the forward, and 0·NaN is NaN."""
    hidden, bad = torch.randn(3, 4), torch.tensor([True, False, False])
    hidden[0] = torch.nan
    hidden.requires_grad_()
    weight = torch.randn(7, 4).requires_grad_(not frozen)
    scores = rk.linear_logp(hidden, rk.LMHead(weight), torch.tensor([1, 2, 3]))
    (torch.where(bad, 0, scores.logp) + torch.where(bad, 0, scores.lse)).sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad[0] == 0).all() and hidden.grad[1:].isfinite().all() and (hidden.grad[1:] != 0).all()
