"""Every divergence over log-ratios from 1e-6 to 200 between student and teacher, either sign, against 150 decimal digits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.backends import reference
from rlad_kernels.core.divergence import Kind
from rlad_kernels.losses.vocab.weighed import AKL
from tests.conftest import INTERPRET
from tests.exact_divergences import Rows, bounds, exact, rounded_log_probs, shares
from tests.methods.divergence import DIVERGENCES as METHODS
from tests.test_divergence_rows import isa  # noqa: F401  (a fixture)

RATIOS = (1e-6, 1.0, 12.0, 60.0, 200.0) if INTERPRET else (1e-6, 1e-3, 0.1, 1.0, 3.0, 12.0, 30.0, 60.0, 100.0, 200.0)
DIVERGENCES = {**METHODS, "akl": AKL(0.37)}
DTYPES = [pytest.param(torch.float32, id="f32"), pytest.param(torch.float64, id="f64", marks=pytest.mark.cpu)]


def kind_of(name: str) -> Kind:
    kind = DIVERGENCES[name].kind()
    assert kind is not None
    return kind


@cache
def logits(v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Raw logits (R, V) of student and teacher: opposed, either one flat, agreed on a token; for each ratio."""
    torch.manual_seed(v)
    base = torch.zeros(v) if v == 2 else torch.randn(v) * 1.5
    first, second = torch.arange(v) == 0, torch.arange(v) == 1
    wave = torch.where(torch.arange(v) % 2 == 0, 0.5, -0.5)
    rows = []
    for g in RATIOS if v < 100 else (1e-3, 12.0, 200.0):
        rows.append((base + g * first, base + g * second))
        rows.append((base, base + g * wave))
        if v < 100 and not INTERPRET:
            rows.append((base + g * wave, base))
            rows.append((base + g * first, base + 2 * g * first))
    student, teacher = zip(*rows, strict=True)
    return torch.stack(student).to(dtype), torch.stack(teacher).to(dtype)


@cache
def wanted(name: str, v: int, dtype: torch.dtype) -> tuple[Rows, Rows]:
    zq, zp = (z.double() for z in logits(v, dtype))
    return exact(kind_of(name), zq, zp), bounds(kind_of(name), zq, zp, torch.finfo(dtype).eps)


def hold(found: Tensor, want: Tensor, bound: Tensor, what: str) -> None:
    worst = ((found.double() - want).abs() / bound).max()
    assert worst <= 1, f"{what}: {worst:.3g} times the bound, at {int(((found.double() - want).abs() / bound).argmax())}"


def check(
    value: Tensor, grads: tuple[Tensor, Tensor], want: Rows, bound: Rows, weight: Tensor, slope: Tensor | float, eps: float
) -> None:  # fmt: skip
    """Value, d_weight (V, R) and d_hidden (R, R) of hidden states that are unit vectors, so that row r of logits is weight[:, r].

    A row whose value float32 cannot hold is inf and has no gradient.
    """
    finite = want.value <= torch.finfo(value.dtype).max
    assert torch.equal(value.isinf(), ~finite)
    hold(value[finite], want.value[finite], bound.value[finite], "value")
    live = finite.unsqueeze(1)
    grad, off = (torch.where(live, x, 0) * slope for x in (want.grad, bound.grad))
    off = off + 8 * eps * grad.abs()
    tiny = 1e-35 if eps > 1e-10 else 1e-300
    hold(grads[1].t(), grad, off + tiny, "d_weight")
    known = weight.double().nan_to_num(neginf=0.0)
    hold(grads[0], grad @ known, (off + 16 * eps * grad.abs()) @ known.abs() + tiny, "d_hidden")


def run(name: str, head: rk.LMHead, teachers: Any, teacher_heads: Any, **options: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    rows = head.weight.shape[1]
    hidden = torch.eye(rows, dtype=head.weight.dtype).requires_grad_()
    value = rk.linear_divergence(hidden, head, teachers, teacher_heads, DIVERGENCES[name], **options)
    return value.detach(), torch.autograd.grad(value.sum(), (hidden, head.weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [2, 7, 211])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradients(isa: str, name: str, v: int, dtype: torch.dtype) -> None:  # noqa: F811
    zq, zp = logits(v, dtype)
    want, bound = wanted(name, v, dtype)
    student = zq.t().contiguous().requires_grad_()
    value, grads = run(name, rk.LMHead(student), torch.eye(len(zp), dtype=dtype), rk.LMHead(zp.t().contiguous()))
    check(value, grads, want, bound, student.detach(), 1.0, torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_reference_does_not_cancel(name: str) -> None:
    """``reference.divergence`` in float64, from log-probs of 150 digits rounded once."""
    zq, zp = (z.double() for z in logits(7, torch.float32))
    lq, lp = rounded_log_probs(zq), rounded_log_probs(zp)
    kind, (want, bound) = kind_of(name), (exact(kind_of(name), zq, zp), bounds(kind_of(name), zq, zp, 2.0**-52))
    leaf = lq.detach().requires_grad_()
    found = kind.factor * reference.divergence(leaf, lp, kind.family, kind.numbers, *shares(kind, zq, zp))
    (u,) = torch.autograd.grad(found.sum(), leaf)
    hold(found.detach(), want.value, bound.value, "value")
    q = lq.exp()
    pairs = (u.unsqueeze(2) * q.unsqueeze(1) - q.unsqueeze(2) * u.unsqueeze(1)).sum(2)  # u − q·Σu without the entry's own part
    hold(pairs, want.grad, bound.grad, "gradient")


HEADS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "softcaps": ({"softcap": 260.0, "logit_scale": 1.3, "temperature": 0.8}, {"softcap": 300.0, "temperature": 1.4}),
    "forbidden": ({"temperature": 0.9}, {"logit_scale": 0.7}),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["gkd_jsd", "taid"] if INTERPRET else sorted({*DIVERGENCES} - {"power_divergence"}))
def test_heads_and_several_teachers(name: str, head: str) -> None:
    """Both heads' softcaps, scales and temperatures, or a column that is −inf in both; two teachers weighted by token."""
    own, theirs = HEADS[head]
    raw, first = logits(7, torch.float32)
    rows, second = len(raw), first.roll(1, 1)
    bias = torch.randn(7)
    if head == "forbidden":
        bias[5] = -torch.inf
    weights = torch.rand(2, rows)
    student = raw.t().contiguous().requires_grad_()
    sides = [rk.LMHead(x.t().contiguous(), bias, **theirs) for x in (first, second)]
    value, grads = run(name, rk.LMHead(student, bias, **own), [torch.eye(rows)] * 2, sides, teacher_weights=[*weights])

    def tempered(x: Tensor, options: dict[str, float]) -> Tensor:
        return reference.logits(x, torch.eye(7, dtype=torch.float64), bias.double(), **options)  # type: ignore[arg-type]

    free = raw.double().requires_grad_()
    zq = tempered(free, own)
    (slope,) = torch.autograd.grad(zq[zq > -torch.inf].sum(), free)
    parts = [(kind_of(name), zq.detach(), tempered(x.double(), theirs)) for x in (first, second)]
    found = [(exact(*part), bounds(*part, 2.0**-23)) for part in parts]
    w = weights.double()
    want, bound = (
        Rows(sum(w[i] * found[i][k].value for i in (0, 1)), sum(w[i].unsqueeze(1) * found[i][k].grad for i in (0, 1)))  # type: ignore[arg-type]
        for k in (0, 1)
    )
    check(value, grads, want, bound, student.detach(), slope, 2.0**-23)
