"""DPPO's mask: the paper's numbers, both divergences by hand, and tokens at the ends of the probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.losses import DPPO
from rlad_kernels.losses.ratio.dppo import binary_divergence

SUM = rk.Reduction(denominator=1.0)


def weight(new: float, old: float, sign: float, **options: Any) -> float:
    """−∂loss/∂s of one token of these probabilities."""
    logp = torch.tensor([new], dtype=torch.float64).log().requires_grad_()
    given = {"old_logp": torch.tensor([old], dtype=torch.float64).log(), "advantages": torch.tensor([sign])}
    return -torch.autograd.grad(DPPO(**options)(logp, **given, reduction=SUM).loss, logp)[0].item()


def test_the_papers_two_tokens() -> None:
    """1e-4 → 1e-2 is a ratio of 100 and moves 0.0099; 0.99 → 0.8 is one of 0.81, inside PPO's clip, and moves 0.19."""
    assert weight(1e-2, 1e-4, 1.0) == pytest.approx(100)
    assert weight(0.80, 0.99, -1.0) == 0
    clipped = rk.losses.GRPO()
    for new, old, sign, live in ((1e-2, 1e-4, 1.0, False), (0.80, 0.99, -1.0, True)):
        logp = torch.tensor([new]).log().requires_grad_()
        out = clipped(logp, old_logp=torch.tensor([old]).log(), advantages=torch.tensor([sign]))
        assert torch.autograd.grad(out.loss, logp)[0].any().item() == live


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_a_step_back_is_never_stopped(divergence: str) -> None:
    assert weight(0.9, 0.1, -1.0, divergence=divergence) == pytest.approx(-9)
    assert weight(0.1, 0.9, 1.0, divergence=divergence) == pytest.approx(1 / 9)
    assert weight(0.9, 0.1, 1.0, divergence=divergence) == weight(0.1, 0.9, -1.0, divergence=divergence) == 0


@pytest.mark.parametrize(("new", "old"), [(0.3, 0.5), (0.5, 0.3), (1e-6, 0.2), (0.999, 0.2), (0.2, 0.2)])
def test_divergences_are_those_of_two_coins(new: float, old: float) -> None:
    s, o = (torch.tensor([x], dtype=torch.float64).log() for x in (new, old))
    kl = old * math.log(old / new) + (1 - old) * math.log((1 - old) / (1 - new))
    assert binary_divergence(s, o, "kl").item() == pytest.approx(kl, rel=1e-9, abs=1e-15)
    assert binary_divergence(s, o, "tv").item() == pytest.approx(abs(new - old))


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_at_the_ends_of_the_probabilities(divergence: str) -> None:
    inf = math.inf
    logp, old = torch.tensor([0.0, 0.0, -1.0, -inf, -3.0]), torch.tensor([0.0, -1.0, 0.0, -3.0, -inf])
    apart = binary_divergence(logp, old, divergence)
    assert not apart.isnan().any() and apart[0] == 0 and (apart[1:4] > 0.04).all()
    assert binary_divergence(torch.tensor([1e-7]), torch.tensor([0.0]), "kl").abs() < 1e-6
    assert binary_divergence(torch.tensor([1e-7]), torch.tensor([-1.0]), "kl") == inf
    for sign in (1.0, -1.0):
        s = logp.clone().requires_grad_()
        out = DPPO(divergence=divergence)(s, old_logp=old, advantages=torch.full((5,), sign), reduction=SUM)
        assert not torch.autograd.grad(out.loss, s)[0].isnan().any()


def test_bounds_of_either_sign_and_of_the_ratio() -> None:
    assert weight(0.35, 0.3, 1.0, delta=(0.0, 0.1)) > 0 and weight(0.25, 0.3, -1.0, delta=(0.0, 0.1)) == 0
    assert weight(0.25, 0.3, -1.0, delta=(0.1, 0.0)) < 0 and weight(0.35, 0.3, 1.0, delta=(0.1, 0.0)) == 0
    assert weight(0.05, 0.001, 1.0, ratio_max=20.0) == pytest.approx(20)
    out = DPPO()(torch.tensor([0.5, 0.2]).log(), old_logp=torch.tensor([0.2, 0.5]).log(), advantages=torch.tensor([1.0, -1.0]))
    assert out.metrics["clip_frac_high"] == out.metrics["clip_frac_low"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "js"}, "divergence must be one of"),
        ({"delta": (-0.1, 0.1)}, r"delta must be \(low, high\), both at least 0"),
        ({"delta": 0.15}, "delta must be"),
        ({"ratio_max": 0.0}, "ratio_max must be positive or None"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DPPO: {message}"):
        DPPO(**options)
