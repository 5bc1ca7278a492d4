"""How large a call may be: element offsets beyond 2³¹, a million tokens, a million ids, supports of 1,024, width 16,384.

A tensor whose rows lie 2³⁰ elements apart has offsets that no int32 holds, and takes a few pages of memory: its storage is a file
with holes. Each row op must do the same on it as on a dense copy, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.backends.contract import ROW_OPS
from tests.conftest import DEVICE
from tests.oracles import EPS, within
from tests.sweeps import Problem, problem

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="a file with holes; the interpreter has the kernels' own index arithmetic"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
APART = 2**30 + 64  # elements between rows: the third lies beyond 2³¹ of them, and so is twice the stride
ROWS, COLS, J, K, D = 5, 37, 3, 4, 8
Far = Callable[[Tensor], Tensor]


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Far]:
    """Copies with rows ``APART`` elements apart."""
    count = 0

    def copy(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        size = (x.shape[0] - 1) * APART + x.shape[1]
        storage = torch.from_file(str(tmp_path / str(count)), shared=True, size=size, dtype=x.dtype)
        return storage.as_strided(x.shape, (APART, 1)).copy_(x)

    yield copy
    for file in tmp_path.iterdir():
        file.unlink()


def tempering(softcap: float = 0.0) -> tuple[Any, ...]:
    return torch.randn(COLS), torch.rand(ROWS) + 0.5, 1.3, softcap


def stats() -> Tensor:
    x = torch.zeros(6, ROWS)
    x[0] = -torch.inf
    return x


def slots() -> Tensor:
    return torch.stack([torch.randperm(COLS, dtype=torch.int32)[:J] for _ in range(ROWS)])


def _sides() -> list[Any]:
    norm = torch.stack([torch.full((ROWS,), 9.0), torch.rand(ROWS)])
    return [torch.randn(ROWS, COLS), *tempering(), norm, torch.randn(ROWS, COLS), *tempering(), norm.clone(), torch.rand(4, ROWS)]


def _gathered(ids: Tensor) -> tuple[Tensor, Tensor]:
    order = ids.flatten().sort(stable=True)
    return order.indices, order.values


# op → its arguments; matrices of them are put far apart, one set after the other of those named by place
CALLS: dict[str, tuple[Callable[[], list[Any]], list[tuple[int, ...]]]] = {
    "fold_": (
        lambda: [torch.randn(ROWS, COLS), 0, *tempering(), slots(), stats(), torch.zeros(ROWS, J), True, True], [(0,), (7,)],
    ),
    "fold_topk_": (
        lambda: [
            torch.randn(ROWS, COLS), 0, *tempering(), slots(), stats(), torch.zeros(ROWS, J), torch.full((ROWS, K), -torch.inf),
            torch.full((ROWS, K), -1, dtype=torch.int32), True,
        ],
        [(0,), (7,)],
    ),
    "dlogits_": (
        lambda: [
            torch.zeros(ROWS, COLS), torch.randn(ROWS, COLS), 0, *tempering(5.0), slots(), torch.randn(ROWS, J),
            torch.rand(6, ROWS), slots()[:, :1].contiguous(), None, True, True,
        ],
        [(0,), (1,), (9,)],
    ),
    "column_stats_": (
        lambda: [torch.zeros(3, ROWS, COLS), torch.randn(ROWS, COLS), *tempering(5.0), torch.rand(ROWS) + 4, 1], [(1,)],
    ),
    "divergence_": (
        lambda: [torch.zeros(ROWS), torch.zeros(ROWS, COLS), *_sides(), "sym", 0.0, 0.0, 0.0, False], [(1,), (2,), (8,), (14,)],
    ),
    "gather_dot": (lambda: [torch.randn(ROWS, D), torch.randn(ROWS, D), slots() % ROWS], [(0,), (1,)]),
    "gather_dhidden_": (
        lambda: [torch.zeros(ROWS, D), torch.randn(ROWS, J), torch.randn(ROWS, D), slots() % ROWS, True], [(0,), (2,)],
    ),
    "gather_dweight_": (
        lambda: [torch.zeros(ROWS, D), torch.randn(ROWS, J), torch.randn(ROWS, D), *_gathered(slots() % ROWS), True], [(0,), (2,)],
    ),
    "row_outputs": (
        lambda: [torch.rand(6, ROWS) + 1, torch.randn(ROWS, J), slots(), COLS, True, True, True, True], [(0,)],
    ),
    "dropped_mass": (
        lambda: [torch.rand(ROWS, COLS) > 0.5, torch.randn(ROWS, COLS), *tempering(), torch.rand(ROWS) + 4, 1], [(1,)],
    ),
}  # fmt: skip
CONTIGUOUS = {"row_slots", "row_cotangents", "scale_", "clipped_ratio", "topk_kl"}  # take and make dense tensors of few values


@pytest.mark.parametrize("op, places", [(op, p) for op, (_, sets) in CALLS.items() for p in sets], ids=str)
def test_a_row_op_on_rows_far_apart(op: str, places: tuple[int, ...], far: Far) -> None:
    torch.manual_seed(0)
    near = CALLS[op][0]()
    torch.manual_seed(0)
    apart = CALLS[op][0]()
    for i in places:
        apart[i] = far(apart[i])
        assert (apart[i].shape[0] - 1) * apart[i].stride(0) >= 2**31
    results = [getattr(torch.ops.rlad, op)(*args) for args in (near, apart)]
    for a, b in zip(*([x, *args] for x, args in zip(results, (near, apart), strict=True)), strict=True):
        pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (a, b)), strict=True)
        assert all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.mark.interpreted
def test_every_kernel_is_seen_far_apart() -> None:
    from rlad_kernels.backends.triton import LAUNCHERS

    assert set(LAUNCHERS) == set(CALLS) | CONTIGUOUS
    assert set(ROW_OPS) <= set(CALLS)


@pytest.mark.cpu
def test_bf16_product_on_rows_far_apart(far: Far) -> None:
    if not torch.ops.rlad.has_bf16_mm():
        pytest.skip("this CPU has no bfloat16 instructions")
    a, b = torch.randn(ROWS, 40).bfloat16(), torch.randn(ROWS, 40).bfloat16()
    for i in range(3):
        args = [torch.zeros(ROWS, ROWS), a, b.T]
        torch.ops.rlad.bf16_mm_(*args, False)
        apart = [torch.zeros(ROWS, ROWS), a, b.T]
        apart[i] = far(apart[i].T).T if i == 2 else far(apart[i])
        torch.ops.rlad.bf16_mm_(*apart, False)
        assert torch.equal(args[0], apart[0])


def public(hidden: Tensor, weight: Tensor, target: Tensor, ids: Tensor) -> list[Tensor]:
    """Every public op's results and gradients."""
    head = rk.LMHead(weight, temperature=0.7)
    s = rk.linear_logp(hidden, head, target, topk_ids=ids, entropy=True, tail=True)
    t = rk.linear_topk(hidden, head, 3, target=target)
    g = rk.linear_gather(hidden, head, ids)
    l = rk.linear_loss(hidden, head, target, rk.losses.CrossEntropy())
    d = rk.linear_divergence_loss(hidden, head, hidden.detach() + 1, head, rk.losses.JSD(0.5))
    total = s.logp.sum() + s.entropy.sum() + s.topk_logp.sum() + s.tail_logp.sum() + g.square().sum() + l.loss + d.loss
    return [s.logp, s.entropy, s.topk_logp, s.tail_logp, t.logp, g, l.loss, d.loss, *torch.autograd.grad(total, (hidden, weight))]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.cpu)], ids=["float32", "bfloat16"])
def test_public_ops_on_rows_far_apart(dtype: torch.dtype, far: Far) -> None:
    hidden, weight = torch.randn(ROWS, D).to(dtype), torch.randn(7, D).to(dtype)
    args = torch.tensor([6, 0, 5, 4, 6]), torch.stack([torch.randperm(7)[:3] for _ in range(ROWS)])
    near = public(hidden.clone().requires_grad_(), weight.clone().requires_grad_(), *args)
    apart = public(far(hidden).requires_grad_(), far(weight).requires_grad_(), *args)
    for a, b in zip(near, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if dtype == torch.bfloat16 else 4 * EPS, atol=16 * EPS)


def hold(p: Problem, logp: Tensor, grads: tuple[Tensor, ...], g: Tensor) -> tuple[Tensor, float]:
    """Log-probs, and the gradients of Σ g·logp, within a few roundings of the largest logit, and of sums that may be made one
    term after the other, whose errors then walk; gives the exact log-probs (N, V), and what they may be off by."""
    q = p.twin()
    z = q.logits().detach().requires_grad_()
    exact = z.log_softmax(-1)
    own = exact.gather(1, p.target[:, None])[:, 0]
    (dz,) = torch.autograd.grad((own * g.double()).sum(), z)
    off = EPS * (16 + (4 + p.hidden.shape[1] ** 0.5 / 2) * z.abs().max().item())  # √D half ulps of a logit's partial sums
    within(logp, own, off, "logp")
    hidden, weight, g = q.hidden.detach(), q.weight.detach(), g.double().abs()[:, None]
    part = g * exact.detach().exp() + dz.abs()  # of what each dlogit is the difference
    for name, x, a, b, size in (("d_hidden", grads[0], dz, weight, part), ("d_weight", grads[1], dz.T, hidden, part.T)):
        walk = 8 * EPS * b.shape[0] ** 0.5
        assert ((x.double() - a @ b).abs() <= (off + walk) * (size @ b.abs())).all(), name
    return exact.detach(), off


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("n, d, v, k", [(2, 3, 1_000_000, 1024), (3, 16_384, 40, 7)], ids=["a million ids", "16,384 wide"])
def test_vocabularies_and_widths(n: int, d: int, v: int, k: int) -> None:
    p, g = problem(n=n, d=d, v=v, k=k, sigma=2.0, bias=False), torch.randn(n)
    out = rk.linear_logp(p.hidden, p.head, p.target).logp
    exact, off = hold(p, out, torch.autograd.grad((out * g).sum(), p.leaves), g)
    top = rk.linear_topk(p.hidden, p.head, k)
    assert (top.ids.long().sort(1).values.diff() > 0).all()
    within(top.logp, exact.topk(k).values, off, "top-K")


@pytest.mark.slow_interpreted
def test_a_million_tokens() -> None:
    """N = 1,000,003, all of them computed."""
    p = problem(n=1_000_003, d=1, v=2, k=1, bias=False)
    g = torch.randn(1_000_003)
    out = rk.linear_logp(p.hidden, p.head, p.target).logp
    hold(p, out, torch.autograd.grad((out * g).sum(), p.leaves), g)
    loss = rk.linear_loss(p.hidden, p.head, p.target, rk.losses.CrossEntropy(), reduction=rk.Reduction(denominator=1.0)).loss
    hold(p, out, torch.autograd.grad(-loss, p.leaves), torch.ones_like(g))


def test_more_logits_than_int32_holds() -> None:
    """N·V > 2³¹: 1,100,000 tokens on 2,000 ids, of which the last few count; no row of the others is computed."""
    n, v = 1_100_000, 2_000
    few = problem(n=3, d=2, v=v, k=1, bias=False)
    assert n * v > 2**31
    hidden = few.hidden.detach()[:1].expand(n, 2).contiguous()
    hidden[-3:] = few.hidden.detach()
    hidden.requires_grad_()
    target, mask = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.bool)
    target[-3:], mask[-3:] = few.target, True
    out = rk.linear_logp(hidden, few.head, target, mask=mask).logp
    want = rk.linear_logp(few.hidden, few.head, few.target).logp
    assert torch.equal(out[-3:], want)
    assert (out[:-3] == 0).all()
    got, exact = (torch.autograd.grad(x.sum(), leaves) for x, leaves in ((out, (hidden, few.weight)), (want, few.leaves)))
    assert torch.equal(got[0][-3:], exact[0]) and torch.equal(got[1], exact[1])
