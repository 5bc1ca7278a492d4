"""linear_topk and linear_gather against the float64 oracle."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlad_kernels as rk
from rlad_kernels.backends import reference
from tests.oracles import budgets, within
from tests.sweeps import Problem, leaf, problem, relative

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def check_topk(p: Problem, k: int, top: rk.TopK) -> None:
    """Ids by value (backends may order logits closer than 1e-5 differently), everything else within the float32 budget."""
    z = p.twin().logits()
    ids, _, tail = reference.topk(z, k)
    assert top.ids.dtype == torch.int32
    assert all(len(set(row.tolist())) == k for row in top.ids.reshape(-1, k))
    mine = z.gather(-1, top.ids.long())
    assert (mine - z.gather(-1, ids)).abs().max() <= 1e-5
    assert (top.logp.diff(dim=-1) <= 0).all()
    assert ((top.tail_logp.exp().double() / tail.exp() - 1).abs().nan_to_num() <= 1e-3).all()

    def formula() -> list[torch.Tensor]:
        z = p.twin().logits()
        scores = reference.token_scores(z, p.target)
        return [z.log_softmax(-1).gather(-1, ids), scores.lse, scores.logp, scores.entropy]

    fields = ("logp", "lse", "target_logp", "entropy")
    for field, bounded in zip(fields, budgets(formula), strict=True):
        within(getattr(top, field), *bounded, field)


@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("tile", [None, (5, 33)], ids=["one_tile", "tiles"])
def test_topk(k: int, tile: tuple[int, int] | None) -> None:
    n = 8 if INTERPRET else 24
    p = problem(n=n, v=203, softcap=8.0, logit_scale=1.2, vocab_size=190, temperature=torch.rand(n) + 0.5)
    with rk.set_tile(*(tile or (None, None))):
        check_topk(p, k, rk.linear_topk(p.hidden, p.head, k, target=p.target, entropy=True))


@pytest.mark.cpu
def test_topk_1024_of_a_large_vocabulary() -> None:
    p = problem(n=9, v=30_000, sigma=2.0)
    with rk.set_tile(4, 4096):
        check_topk(p, 1024, rk.linear_topk(p.hidden, p.head, 1024, target=p.target, entropy=True))


def test_topk_of_the_whole_vocabulary_has_no_tail() -> None:
    p = problem(n=3, v=16)
    top = rk.linear_topk(p.hidden, p.head, 16)
    assert (top.tail_logp == -torch.inf).all()
    assert (top.logp.exp().sum(-1) - 1).abs().max() < 1e-6
    assert top.target_logp is None
    assert top.entropy is None


def test_the_lower_id_wins_among_equal_logits() -> None:
    hidden, weight = torch.ones(4, 3), torch.zeros(50, 3)
    weight[[7, 20, 21, 40]] = 1.0
    for cols in (50, 8, 21):
        with rk.set_tile(2, cols):
            top = rk.linear_topk(hidden, rk.LMHead(weight), 6)
        assert top.ids.tolist() == [[7, 20, 21, 40, 0, 1]] * 4


def test_tail_mass_to_one_part_in_a_thousand_down_to_1e_minus_7() -> None:
    n, v = 12, 1000
    weight = torch.zeros(v, n)
    for i in range(n):
        weight[500, i] = 7.0 + 1.5 * i
    top = rk.linear_topk(torch.eye(n), rk.LMHead(weight), 1)
    tail = torch.log(torch.tensor(v - 1.0).double()) - torch.logsumexp(torch.eye(n).double() @ weight.double().T, -1)
    assert tail.exp().min() < 2e-7
    assert ((top.tail_logp.exp().double() / tail.exp() - 1).abs() <= 1e-3).all()


def test_topk_with_minus_infinity_columns() -> None:
    p = problem(n=4, v=12)
    with torch.no_grad():
        p.bias[3:] = -torch.inf
    with rk.set_tile(2, 5):
        top = rk.linear_topk(p.hidden, p.head, 6)
    assert (top.ids[:, :3].sort(-1).values == torch.arange(3)).all()
    assert (top.logp[:, 3:] == -torch.inf).all()
    assert (top.ids >= 0).all()
    assert top.lse.isfinite().all()


@pytest.mark.parametrize("compaction", [True, False], ids=["dropped", "computed"])
def test_topk_masks(compaction: bool) -> None:
    p = problem(shape=(2, 6))
    mask = torch.rand(2, 6) > 0.5
    hidden = torch.where(mask[..., None], p.hidden.detach(), torch.nan)
    want = rk.linear_topk(p.hidden, p.head, 3, target=p.target, entropy=True)
    with rk.set_compaction(compaction):
        top = rk.linear_topk(hidden, p.head, 3, target=torch.where(mask, p.target, 10**6), entropy=True, mask=mask)
    for a, b in zip(top, want, strict=True):
        assert (a[~mask] == 0).all()
        assert torch.allclose(a[mask].float(), b[mask].float(), rtol=1e-6, atol=1e-6)
    assert not any(x.requires_grad for x in top)


@given(st.integers(0, 6), st.integers(1, 60), st.integers(1, 20), st.integers(1, 7), st.integers(1, 60), st.integers(0, 2**31))
def test_topk_any_shape(n: int, v: int, k: int, rows: int, cols: int, seed: int) -> None:
    torch.manual_seed(seed)
    k = min(k, v)
    p = problem(n=n, v=v, k=1, sigma=1.0)
    with rk.set_tile(rows, cols):
        top = rk.linear_topk(p.hidden, p.head, k)
    z = p.twin().logits()
    ids, logp, tail = reference.topk(z, k)
    assert top.ids.shape == (n, k)
    assert torch.allclose(z.gather(-1, top.ids.long()), z.gather(-1, ids), rtol=0, atol=1e-5)
    assert torch.allclose(top.logp.double(), logp, rtol=1e-5, atol=1e-5)
    assert torch.allclose(top.tail_logp.double().exp(), tail.exp(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_gather_value_and_gradient(dtype: torch.dtype) -> None:
    p = problem(shape=(4, 7), d=40, v=61, k=9, dtype=dtype, softcap=6.0, logit_scale=0.7, vocab_size=55)
    p.ids[..., 3] = p.ids[..., 0]
    p.ids[0, :, 1] = -1
    mask = torch.rand(4, 7) > 0.3
    with torch.no_grad():
        p.hidden[~mask] = torch.nan
    z = rk.linear_gather(p.hidden, p.head, p.ids, mask=mask)
    p.mask = mask
    want = p.twin()
    keep = mask[..., None]
    expected = torch.where(keep, reference.gather(want.logits(), p.ids), 0)
    assert z.dtype == torch.float32
    assert torch.equal(z.isinf(), expected.isinf())
    finite = z.isfinite()
    assert (z.double() - expected)[finite].abs().max() <= 1e-5
    c = torch.where(finite & keep, torch.randn_like(z), 0)
    grads = torch.autograd.grad(torch.where(finite, z, 0), p.leaves, c)
    exact = torch.autograd.grad(torch.where(finite, expected, 0), want.leaves, c.double())
    for g, e, x in zip(grads, exact, p.leaves, strict=True):
        assert g.dtype == x.dtype
        assert relative(g, e) <= (1e-6 if dtype == torch.float32 else 3e-3)
    untouched = torch.ones(61, dtype=torch.bool)
    untouched[p.ids[mask][p.ids[mask] >= 0]] = False
    assert (grads[1][untouched] == 0).all()
    assert (grads[0][~mask] == 0).all()


def test_gather_budget_float32() -> None:
    p = problem(n=16 if INTERPRET else 64, d=48, v=301, k=16)
    z = rk.linear_gather(p.hidden, p.head, p.ids)
    c = torch.randn_like(z)

    def formula() -> list[torch.Tensor]:
        want = p.twin()
        truth = reference.gather(want.logits(), p.ids)
        return [truth, *torch.autograd.grad(truth, want.leaves, c.double())]

    found = (z, *torch.autograd.grad(z, p.leaves, c))
    for name, actual, bounded in zip(("logits", "d_hidden", "d_weight", "d_bias"), found, budgets(formula), strict=True):
        within(actual, *bounded, name)


def test_gather_is_reproducible_with_many_duplicates() -> None:
    p = problem(n=50, v=7, k=6)
    grads = []
    for _ in range(2):
        z = rk.linear_gather(p.hidden, p.head, p.ids)
        grads.append(torch.autograd.grad(z.sin().sum(), p.leaves))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.cpu
def test_gather_gradcheck() -> None:
    p = problem(n=3, d=4, v=9, k=3, dtype=torch.float64, softcap=3.0)
    p.ids[0, 1] = p.ids[0, 0]
    assert torch.autograd.gradcheck(
        lambda h, w, b: rk.linear_gather(h, rk.LMHead(w, b, softcap=3.0), p.ids), (p.hidden, p.weight, p.bias)
    )
    z = rk.linear_gather(p.hidden, p.head, p.ids)
    (g,) = torch.autograd.grad(z.sum(), p.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_gather_empty() -> None:
    weight = leaf(torch.randn(5, 3))
    z = rk.linear_gather(torch.zeros(0, 3), rk.LMHead(weight), torch.zeros(0, 2, dtype=torch.int64))
    assert z.shape == (0, 2)
    z.sum().backward()
    assert (weight.grad == 0).all()
