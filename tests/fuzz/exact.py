"""What float64 says of a case, and how far rounding may take a result from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fuzz.draws import Case
from tests.roundings import EPS, largest, spread

COUNTS: Counter[tuple[str, str]] = Counter()  # (op, outcome) → cases


@dataclass
class Twin:
    """The case in float64: leaves, raw logits and tempered logits ``(…, V)``, rows that do not count at 0."""

    leaves: list[Tensor]
    raw: Tensor
    z: Tensor


def twin(case: Case) -> Twin:
    v, options = case.vocab, case.options
    hidden = case.clean(case.hidden.detach()).double().requires_grad_()
    weight = case.weight.detach()[:v].double().requires_grad_()
    bias = None if case.bias is None else case.bias.detach()[:v].double().requires_grad_()
    raw = hidden.unsqueeze(-2) @ weight.T if hidden.dim() == 1 else hidden @ weight.T
    raw = raw.view(*case.shape, v)
    raw = raw if bias is None else raw + bias
    z, cap, t = options["logit_scale"] * raw, options["softcap"], options["temperature"]
    z = z if cap is None else cap * torch.tanh(z / cap)
    if isinstance(t, Tensor):  # the library multiplies by the inverse in the dtype of its sums
        dtype = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
        t = (case.clean(t, 1.0).unsqueeze(-1) if t.dim() and t.shape == case.shape else t).to(dtype)
        z = z * (1 / t).double()
    else:
        z = z / t
    pairs = zip((hidden, weight, bias), case.needs, strict=True)
    return Twin([x for x, need in pairs if x is not None and need], raw, z)


def finite_sum(outputs: list[Tensor], cotangents: list[Tensor]) -> Tensor:
    """Σ cotangent·output over the finite outputs."""
    total = outputs[0].new_zeros(())
    for x, c in zip(outputs, cotangents, strict=True):
        finite = x.isfinite()
        total = total + (torch.where(finite, x, 0) * torch.where(finite, c.to(x.dtype), 0)).sum()
    return total


def agree(actual: Tensor, exact: Tensor, bound: float | Tensor, what: str) -> None:
    """Each element within its bound; infinities and NaNs are equal."""
    assert actual.shape == exact.shape, f"{what}: {tuple(actual.shape)} for {tuple(exact.shape)}"
    found = actual.detach().double()
    same = (found == exact) | (found.isnan() & exact.isnan())
    off = (found - exact).abs().masked_fill(same, 0)
    assert (off <= bound).all(), f"{what}: error {off.max().item():.3g} exceeds {torch.as_tensor(bound).max().item():.3g}"


Formula = Callable[[Twin], tuple[list[Tensor], Tensor]]


def hold(
    case: Case, names: tuple[str, ...], outputs: list[Tensor], total: Tensor | None, formula: Formula, others: Sequence[Case] = ()
) -> None:
    """Outputs, and the gradients of ``total``, against ``formula``, which gives both from the case's twin and those of others."""
    eps = max(EPS if c.hidden.dtype != torch.float64 else torch.finfo(torch.float64).eps for c in (case, *others))
    differentiable = total is not None and bool(case.leaves) and total.requires_grad

    def run() -> list[Tensor]:
        t = twin(case)
        out, value = formula(t)
        if not differentiable:
            return out
        slopes = torch.autograd.grad(value, [*t.leaves, t.raw], allow_unused=True, materialize_grads=True)
        return [*out, *slopes]

    if case.target.numel():
        exact, errors = spread(run, eps, trials=16)  # with 8 the errors of a few numbers cancel in all, once in thousands of cases
    else:
        exact = [x.detach() for x in run()]
        errors = [0.0] * len(exact)
    times = 2  # the signs of the roundings are a sample, and of float64 the oracle's own are no finer
    # of a divergence's minimum only the square of a few roundings is left
    square = max(min(8 * eps * largest(twin(c).z.detach()), 1.0) ** 2 for c in (case, *others))
    bounds = [times * (e + eps * largest(x)) + square for x, e in zip(exact, errors, strict=True)]
    for name, x, want, bound in zip(names, outputs, exact, bounds, strict=False):
        assert x.dtype == (torch.float64 if case.hidden.dtype == torch.float64 else torch.float32), name
        agree(x, want, bound, name)
    if not differentiable:
        return
    assert total is not None
    found = torch.autograd.grad(total, case.leaves, allow_unused=True, materialize_grads=True)
    slopes = zip(_roles(case), found, exact[len(outputs) :], bounds[len(outputs) :], strict=False)
    for (role, leaf), g, want, bound in slopes:
        assert g.dtype == leaf.dtype
        if role != "d_hidden":
            assert (g[case.vocab :] == 0).all(), f"{role}: not 0 beyond the vocabulary"
            g = g[: case.vocab]
        bound = bound + low_precision(case, role, exact[-1], want)
        beyond = (want.abs() + bound > torch.finfo(g.dtype).max) & g.isinf() & (g.sign() == want.sign())
        agree(g, torch.where(beyond, g.double(), want), bound, role)


def _roles(case: Case) -> list[tuple[str, Tensor]]:
    pairs = zip(("d_hidden", "d_weight", "d_bias"), (case.hidden, case.weight, case.bias), strict=True)
    return [(role, x) for role, x in pairs if x is not None and x.requires_grad]


def low_precision(case: Case, role: str, dlogits: Tensor, exact: Tensor) -> Tensor | float:
    """What rounding dlogits, and then the gradient, to 16 bits may cost each of its elements."""
    info = torch.finfo(case.hidden.dtype)
    if info.eps <= EPS:
        return 0.0
    g = dlogits.reshape(-1, case.vocab).abs()
    if (
        case.hidden.dtype == torch.float16
    ):  # brought into range by one power of two: the smallest of them are lost beside the largest
        g = g + 2.0**-24 * largest(g)
    hidden, weight = case.clean(case.hidden.detach()).double().abs(), case.weight.detach()[: case.vocab].double().abs()
    moved = {
        "d_hidden": lambda: (g @ weight).view(exact.shape),
        "d_weight": lambda: g.T @ hidden.reshape(-1, hidden.shape[-1]),
        "d_bias": lambda: g.sum(0),
    }[role]()
    return info.eps * (moved + exact.abs()) + info.tiny
