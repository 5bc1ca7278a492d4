"""What values put in front of a head and behind it say about the model: the mathematics of probe.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = (0.1, 1.0, 30.0, 1000.0)  # of the logits that the chosen hidden states give, a row each
GRID = 64  # values from −1000 to 1000 put into the head's output; four rows of them tell 64⁴ columns apart
FIX = "if you know what it does make the head by hand, LMHead(weight, bias, logit_scale=…, softcap=…): docs/wiring.md"


class HeadMap(NamedTuple):
    """logits_v = softcap·tanh(scale·(factor·h·W_v + b_v)/softcap) for v < columns; without softcap, without the tanh."""

    factor: float
    scale: float
    softcap: float | None
    columns: int


def refused(model: Any, why: str, fix: str = FIX) -> ValueError:
    """The error that names a model, why no LMHead is its head, and what to do."""
    return ValueError(f"LMHead.from_model: {type(model).__name__} {why}; {fix}")


def chosen(linear: Any) -> tuple[Tensor, Tensor]:
    """Hidden states ``(4, D)`` whose logits have the sizes of SIZES, and values ``(4, V)`` no two columns of which are equal."""
    weight: Tensor = linear.weight
    (rows, width), n, device = weight.shape, len(SIZES), weight.device
    hidden = torch.sin(torch.arange(1, n * width + 1, device=device).view(n, width) * 1.7)
    largest = F.linear(hidden.to(weight.dtype), weight).float().abs().amax(1, keepdim=True)
    hidden = hidden * (torch.tensor(SIZES, device=device).unsqueeze(1) / largest.clamp_min(1e-6)).clamp(1e-3, 1e4)
    half = torch.logspace(-2, 3, GRID // 2, device=device)
    grid = torch.cat([-half.flip(0), half])[torch.arange(GRID, device=device) * 27 % GRID]  # few columns see all sizes
    column, row = torch.arange(rows, device=device), torch.arange(n, device=device).unsqueeze(1)
    digit = column // GRID**row  # row r tells the r-th digit, given those before it; each column sees large and small values
    return hidden, grid[(digit + (2 * column + 16) * row) % GRID]


def factor_of(model: Any, hidden: Tensor, given: Tensor) -> float:
    """f of given = f·hidden."""
    if given.shape[-1] != hidden.shape[-1] or given.numel() != hidden.numel():
        raise refused(model, f"gives its head other than one hidden state a token: {tuple(given.shape)} for {len(SIZES)} tokens")
    eps = max(torch.finfo(x.dtype).eps for x in (hidden, given))
    x, h = (t.detach().cpu().double().flatten() for t in (given, hidden))
    factor = float((x @ h) / (h @ h))
    if not bool(((x - factor * h).abs() <= eps * x.abs() + torch.finfo(given.dtype).smallest_normal).all()) or factor == 0:
        raise refused(model, "has a layer between its last hidden state and its head")
    return _shortest(factor)


def check_product(model: Any, linear: Any, given: Tensor, output: Tensor) -> None:
    """Raise unless the head's output is given·Wᵀ + b, to the rounding of both: adapters, hooks and layers of one's own."""
    weight, bias = linear.weight, getattr(linear, "bias", None)
    want = F.linear(given.to(weight.device, weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    if output.shape == want.shape:
        eps = 4 * max(torch.finfo(x.dtype).eps for x in (want, output, given)) + 2**-24 * weight.shape[1]
        want, output = (x.float().reshape(len(SIZES), -1) for x in (want, output.to(want.device)))
        row = want.square().mean(1, keepdim=True).sqrt()
        column = (want / row.clamp_min(1e-30)).abs().amax(0)
        if bool(((output - want).abs() <= eps * row * (1 + column)).all()):
            return
    raise refused(
        model,
        f"has a head ({type(linear).__name__}) whose output is not hidden·weightᵀ + bias",
        "merge or remove what was put on it (an adapter, a hook, a parametrisation, quantised weights), or train on the logits",
    )


def fit(model: Any, values: Tensor, logits: Tensor) -> tuple[float, float | None, int]:
    """scale, softcap and columns of logits = softcap·tanh(scale·values/softcap), which must hold for every value."""
    if logits.shape[-1] > values.shape[1] or logits.numel() != len(values) * logits.shape[-1]:
        raise refused(model, f"makes logits {tuple(logits.shape)} of a head's output {tuple(values.shape)}")
    eps, y = 8 * max(torch.finfo(logits.dtype).eps, 2**-23), logits.detach().cpu().double().reshape(len(values), -1)
    z = values.cpu().double()[:, : y.shape[1]]

    def misses(scale: float, softcap: float | None) -> Tensor:
        fitted = softcap * torch.tanh(scale * z / softcap) if softcap else scale * z
        return ~((y - fitted).abs() <= eps * fitted.abs())

    scale, softcap = float((y / z)[z.abs() == z.abs().min()].median()), None
    bad = misses(scale, None)
    if not bad.any():
        scale = _shortest(float((y / z).mean()))
    elif scale and y.isfinite().all():
        capped = _capped(scale, z, y)
        if int((less := misses(*capped)).sum()) < int(bad.sum()):
            (scale, softcap), bad = capped, less
    if bad.any() or not scale:
        at = tuple((bad if bad.any() else y == 0).nonzero()[0].tolist())
        raise refused(
            model,
            "makes other logits of its head's output than a scale and a softcap do: "
            f"{float(y[at]):.6g} of {float(z[at]):.6g} at id {at[1]}, and more at {int(bad.any(0).sum())} of {y.shape[1]} ids",
        )
    return scale, softcap, y.shape[1]


def _capped(scale: float, z: Tensor, y: Tensor) -> tuple[float, float]:
    """scale and softcap of y = softcap·tanh(scale·z/softcap), in turn: large values give the cap, small ones the scale."""
    top, softcap = float(y.abs().max()), 0.0
    for _ in range(4):
        low, high = top / 2, 1e6 * top
        for _ in range(100):  # bisection: c·tanh(x/c) grows with c
            softcap = math.sqrt(low * high)
            short = softcap * math.tanh(abs(scale) * float(z.abs().max()) / softcap) < top
            low, high = (softcap, high) if short else (low, softcap)
        small = y.abs() < softcap / 2
        scale = float((softcap * torch.atanh(y / softcap) / z)[small].mean())
    return _shortest(scale), _shortest(softcap)


def _shortest(x: float) -> float:
    """The shortest decimal that float32 does not tell from x."""
    return next((y for digits in range(1, 18) if abs((y := float(f"{x:.{digits}g}")) - x) <= 2**-24 * abs(x)), x)
