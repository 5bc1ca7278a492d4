"""Confident tokens: where one p is next to 1, dL/dz is a small difference, and must come out to the logits' own rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from tests.conftest import INTERPRET
from tests.sweeps import Own, Problem, leaf, relative, support

N, D, V = 5, 8, 61
RAW = 12.0  # of a row's confident column: z is 20 at a temperature of 0.6
HEADS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "scale": {"temperature": 0.6, "logit_scale": 0.9},
    "softcap": {"temperature": 0.6, "softcap": 30.0},
    "bias": {"temperature": 0.6, "bias": True},
}
DTYPES = [torch.float32] if INTERPRET else [torch.float32, torch.bfloat16]
any_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
any_path = pytest.mark.parametrize("path", ["linear_logp", "frozen", "sparse", "fused", "fused sparse"])
OWN, OTHER = torch.arange(N), N + torch.arange(N)
# whether the target is the confident column, whether the support holds it, the loss
CASES: dict[str, tuple[bool, bool, Callable[[Any], Tensor]]] = {
    "logp": (True, True, lambda s: -s.logp),
    "entropy": (True, True, lambda s: -s.entropy),
    "support": (True, True, lambda s: -s.logp - s.topk_logp[:, 0] / 4),
    "support alone": (False, True, lambda s: -s.topk_logp[:, 0]),
    "teacher's": (True, True, lambda s: -((s.topk_logp - 0.1).detach().exp() * s.topk_logp).sum(-1)),
    "tail of the target": (True, False, lambda s: -s.tail_logp),
    "tail": (False, False, lambda s: -s.tail_logp),
    "tail and entropy": (True, False, lambda s: 0.5 * s.entropy - s.tail_logp - s.topk_logp[:, 0].exp()),
}  # fmt: skip


def confident(dtype: torch.dtype = torch.float32, target: bool = True, held: bool = True, **options: Any) -> Problem:
    """Row i is sure of column i. Every raw logit is a multiple of 1/32: all dtypes and all orders of its sum have it exactly."""
    with_bias = options.pop("bias", False)
    weight = torch.cat([torch.eye(V, N), torch.randint(-4, 5, (V, D)) / 8 * (torch.arange(V) >= N).unsqueeze(1)], 1)
    hidden = torch.cat([RAW * torch.eye(N), torch.randint(-2, 3, (N, D)) / 4], 1)
    bias = leaf((torch.randint(-2, 3, (V,)) / 4 * (torch.arange(V) >= N)).to(dtype)) if with_bias else None
    ids = torch.stack([OWN if held else OTHER + N, OTHER + 2 * N, OTHER + 3 * N, torch.full((N,), -1)], 1)
    where = OWN if target else OTHER
    return Problem(leaf(hidden.to(dtype)), leaf(weight.to(dtype)), bias, where, ids, None, options)


def gradients(
    p: Problem, loss: Callable[[Any], Tensor], path: str, *, entropy: bool = False, on_ids: bool = False, eps: float = 1e-30
) -> list[Tensor]:
    """d_hidden, d_weight and d_bias of Σ loss, which may read the entropy and the support."""
    eps = eps if "sparse" in path else 0.0
    if path == "frozen":
        p = Problem(p.hidden, p.weight.detach(), None if p.bias is None else p.bias.detach(), p.target, p.ids, None, p.options)
    if "fused" in path:
        reads = ("logp", "entropy", *(("topk_logp", "tail_logp") if on_ids else ()))
        given = {"teacher": support(p.ids)} if on_ids else {}
        reduction = rk.Reduction("token-mean", denominator=1.0)
        total = rk.linear_loss(
            p.hidden, p.head, p.target, Own(loss, scores=reads), filter_eps=eps, reduction=reduction, **given
        ).loss  # fmt: skip
    else:
        ids = p.ids if on_ids else None
        total = loss(rk.linear_logp(p.hidden, p.head, p.target, topk_ids=ids, entropy=entropy, tail=on_ids, filter_eps=eps)).sum()
    return list(torch.autograd.grad(total, [x for x in p.leaves if x.requires_grad]))


def check(dtype: torch.dtype, head: str, case: str, path: str) -> None:
    target, held, loss = CASES[case]
    p = confident(dtype, target, held, **HEADS[head])
    found = gradients(p, loss, path, entropy="entropy" in case, on_ids=case not in ("logp", "entropy"))
    twin = p.twin()
    z = twin.logits()
    exact = torch.autograd.grad(loss(twin.expected()).sum(), twin.leaves)
    # z has up to 3 roundings, 10 with a softcap, and its error is p's relative one; then a few of p, lse and the sums
    bound = 2.0**-24 * (2 * z.max().item() * (10 if "softcap" in HEADS[head] else 3) + 32)
    if dtype == torch.bfloat16:
        bound = 2.0**-7  # half an ulp of dlogits and half an ulp of the gradient; equal logits are all rounded alike
    for g, e in zip(found, exact, strict=False):
        assert relative(g, e) <= bound, f"{relative(g, e):.2e} > {bound:.2e}"


@any_dtype
@any_path
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head", ["softcap"] if INTERPRET else HEADS)
def test_gradients_to_the_rounding_of_the_logits(head: str, case: str, path: str, dtype: torch.dtype) -> None:
    check(dtype, head, case, path)


@pytest.mark.cpu
@any_path
@pytest.mark.parametrize("case", ["logp", "entropy", "tail of the target"])
@pytest.mark.parametrize("head", ["temperature", "softcap"])
def test_on_every_instruction_set(isa: str, head: str, case: str, path: str) -> None:
    check(torch.float32, head, case, path)
    check(torch.bfloat16, head, case, path)


@any_path
def test_columns_left_out_by_filter_eps_take_what_the_targets_leave(path: str) -> None:
    """All other columns are alike, so that the mean which stands for the dropped ones is exact."""
    p = confident(temperature=0.6)
    with torch.no_grad():
        p.weight[N:] = p.weight[N]
        p.weight[:N, N:] = p.weight[N, N:]
    (found, *_) = gradients(p, CASES["logp"][2], path, eps=1e-3)
    twin = p.twin()
    (exact,) = torch.autograd.grad(-twin.expected().logp.sum(), twin.hidden)
    assert relative(found, exact) <= 2.0**-24 * 200


@any_dtype
@any_path
@pytest.mark.parametrize("softcap", [None, 400.0])
@pytest.mark.parametrize("v", [1, 40])
def test_certain_tokens_have_no_gradient(v: int, softcap: float | None, path: str, dtype: torch.dtype) -> None:
    """Logits of 250 in a vocabulary of one token, or 150 above the others: 1 − p is 0, whatever way the logits are rounded."""
    hidden, weight = torch.randn(20, 16), torch.randn(v, 16)
    with torch.no_grad():
        hidden *= 250 / (hidden @ weight[0]).unsqueeze(1)
        weight[1:] *= 0.01 / hidden.abs().max()
    target = torch.zeros(20, dtype=torch.long)
    p = Problem(leaf(hidden.to(dtype)), leaf(weight.to(dtype)), None, target, target[:, None], None, {"softcap": softcap})
    with rk.set_tile(*((None, None) if INTERPRET else (12, 16))):
        assert not any(g.any() for g in gradients(p, lambda s: -s.logp, path))


@pytest.mark.parametrize("v", [1, 40])
def test_the_gradient_of_lse_is_that_of_the_certain_token(v: int) -> None:
    """Σ_v dL/dz_v = l exactly: ∂lse/∂h is the target's row of W."""
    hidden, weight = leaf(torch.full((3, 1), 30.0)), leaf(torch.zeros(v, 1))
    with torch.no_grad():
        weight[0] = 5
    lse = rk.linear_logp(hidden, rk.LMHead(weight), torch.zeros(3, dtype=torch.long)).lse
    assert torch.equal(torch.autograd.grad(lse.sum(), hidden)[0], torch.full((3, 1), 5.0))
