"""VESPO's kernel of the sequence's ratio: where it is 1, where it peaks, and what a sampler's weights do to it."""

from __future__ import annotations

import math

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.losses import VESPO, Rollout
from rlad_kernels.losses.ratio.vespo import gamma_weights

PAIRS = ((2.0, 3.0), (3.0, 2.0))


def weights(log_w: list[float], sign: float, **options: object) -> list[float]:
    """φ of sequences of two tokens, from the gradient."""
    old = torch.full((len(log_w), 2), -3.0)
    logp = (old + torch.tensor(log_w)[:, None] / 2).requires_grad_()
    out = VESPO(**options)(logp, old_logp=old, advantages=torch.full((len(log_w),), sign), reduction=rk.Reduction(denominator=1.0))
    slope = torch.autograd.grad(out.loss, logp)[0]
    assert torch.equal(slope[:, 0], slope[:, 1])
    return (-slope[:, 0] / sign).tolist()


@pytest.mark.parametrize(("sign", "pair"), [(1.0, PAIRS[0]), (-1.0, PAIRS[1])])
def test_the_kernel_by_hand(sign: float, pair: tuple[float, float]) -> None:
    k, rate = pair
    logs = [0.0, math.log(k / rate), -1.0, 1.0]
    assert weights(logs, sign) == pytest.approx([math.exp(k * x + rate * (1 - math.exp(x))) for x in logs], rel=1e-5)
    assert weights([0.0], sign) == [1.0]
    peak = math.log(k / rate)  # d/dw = 0 at k/λ
    low, top, high = weights([peak - 0.1, peak, peak + 0.1], sign)
    assert low < top > high


def test_far_sequences_fade_out_either_way() -> None:
    assert weights([-30.0, 30.0, 400.0], 1.0) == pytest.approx([1e-16 * math.exp(3), 0, 0], rel=1e-4)


def test_with_nothing_to_reshape_it_is_reinforce() -> None:
    logp = torch.randn(3, 4, requires_grad=True)
    given = {"advantages": torch.tensor([1.0, -2.0, 0.0]), "reduction": "token-mean"}
    flat = VESPO(positive=(0.0, 0.0), negative=(0.0, 0.0))(logp, old_logp=torch.randn(3, 4), **given)
    assert torch.equal(flat.token_loss, rk.losses.REINFORCE()(logp, **given).token_loss)


def test_the_samplers_weights_multiply_the_ratio() -> None:
    """w = Π r·Π min(π_old/μ, 2): the same as from an old policy that is that much lower."""
    torch.manual_seed(0)
    old, a = -torch.rand(3, 4) - 1, torch.tensor([1.0, -1.0, 2.0])
    logp, mu = old + 0.1 * torch.randn(3, 4), old - torch.randn(3, 4)
    out = VESPO()(logp, old_logp=old, advantages=a, rollout_logp=mu)
    same = VESPO()(logp, old_logp=old - (old - mu).clamp(max=math.log(2)), advantages=a)
    torch.testing.assert_close(out.token_loss, same.token_loss, rtol=1e-5, atol=1e-8)


def test_rejected_and_missing_samplers_leave_the_floor() -> None:
    old, nan = torch.full((1, 2), -1.0), torch.full((1, 2), math.nan)
    out = VESPO(rollout=Rollout("mask", 0.5, 2.0))(old, old_logp=old, advantages=torch.ones(1), rollout_logp=nan)
    assert out.token_loss[0].tolist() == pytest.approx([1e-16 * math.exp(3)] * 2, rel=1e-4)
    assert out.metrics["rollout_clip_frac"] == 1


def test_an_infinite_kernel_is_0() -> None:
    assert gamma_weights(torch.tensor([19.0]), torch.tensor([True]), (400.0, 0.0), (1.0, 1.0)).tolist() == [0]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"VESPO: positive must be \(k, λ\), both at least 0 and finite, got \(2\.0, -1\.0\)"):
        VESPO(positive=(2.0, -1.0))
    with pytest.raises(ValueError, match=r"VESPO: rollout\.level must be 'token'"):
        VESPO(rollout=Rollout(level="sequence"))
