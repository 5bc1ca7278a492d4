"""GMPO and PSPO: where they are another method, which tokens keep their gradient, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.losses import GMPO, GRPO, GSPO, PSPO

B, T = 3, 5


def batch() -> dict[str, torch.Tensor]:
    old = -torch.rand(B, T) - 1
    mask = torch.arange(T) < torch.tensor([5, 2, 4])[:, None]
    return {"old_logp": old, "advantages": torch.tensor([1.0, -2.0, 0.5]), "mask": mask}


def test_gmpo_without_a_clip_is_gspo_without_one() -> None:
    given = batch()
    logp = (given["old_logp"] + torch.randn(B, T)).requires_grad_()
    found = [loss(logp, **given) for loss in (GMPO(log_clip=None), GSPO(clip=None))]
    assert torch.equal(found[0].token_loss, found[1].token_loss)
    slopes = [torch.autograd.grad(x.loss, logp)[0] for x in found]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-8)


def test_a_clipped_token_of_gmpo_leaves_the_others_their_gradient() -> None:
    """And by one side only: a ratio that has moved against Â's sign is not clipped."""
    gaps = torch.tensor([[1.0, -1.0, 0.1], [1.0, -1.0, 0.1]])
    logp = torch.full((2, 3), -2.0).requires_grad_()
    out = GMPO(log_clip=(0.4, 0.3))(logp, old_logp=-2.0 - gaps, advantages=torch.tensor([1.0, -1.0]))
    r = torch.tensor([(0.3 - 1.0 + 0.1) / 3, (1.0 - 0.4 + 0.1) / 3]).exp()
    torch.testing.assert_close(out.token_loss, torch.stack([-r[0], r[1]])[:, None].expand(2, 3))
    slope = torch.autograd.grad(out.loss, logp)[0] * 6
    torch.testing.assert_close(slope, torch.tensor([[0, -1, -1], [1, 0, 1]]) * r[:, None])
    assert out.metrics["clip_frac_high"] == out.metrics["clip_frac_low"] == pytest.approx(1 / 6)


def test_gmpo_packed_is_gmpo_padded() -> None:
    given = batch()
    logp, mask = given["old_logp"] + torch.randn(B, T), given["mask"]
    want = GMPO()(logp, **given)
    ids = torch.arange(B)[:, None].expand(B, T)[mask]
    wide = given["advantages"][:, None].expand(B, T)[mask]
    got = GMPO()(logp[mask], old_logp=given["old_logp"][mask], advantages=wide, reduction=rk.Reduction(seq_ids=ids))
    torch.testing.assert_close(got.token_loss, want.token_loss[mask])
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize("a", [0.0, 0.1, 0.9])
def test_pspos_gradient_is_a_share_of_the_unclipped_surrogates(a: float) -> None:
    given = batch()
    logp = (given["old_logp"] + torch.randn(B, T)).requires_grad_()
    smooth, plain = PSPO(smoothing=a)(logp, **given), GRPO(clip=None, reduction="seq-mean-token-mean")(logp, **given)
    slopes = [torch.autograd.grad(x.loss, logp)[0] for x in (smooth, plain)]
    torch.testing.assert_close(slopes[0], (1 - a) * slopes[1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        PSPO(smoothing=a)(given["old_logp"], **given).loss, GRPO(reduction="seq-mean-token-mean")(given["old_logp"], **given).loss
    )


def test_a_sampler_weighs_the_smoothed_ratio() -> None:
    zero, loss = torch.zeros(1), PSPO(smoothing=0.5, reduction="token-mean")
    out = loss(zero + math.log(3), old_logp=zero, advantages=zero + 1, rollout_logp=zero - math.log(1.5))
    assert out.loss == pytest.approx(-1.5 * (0.5 * 3 + 0.5))


def test_the_reference_is_not_smoothed() -> None:
    zero = torch.zeros(1)
    loss = PSPO(smoothing=0.5, reduction="token-mean", reference=rk.losses.Reference(1.0, "k2"))
    assert loss(zero, old_logp=zero, advantages=zero, ref_logp=zero - 2).loss == 2


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PSPO: smoothing must be in \[0, 1\), got 1\.0"):
        PSPO(smoothing=1.0)
    with pytest.raises(ValueError, match=r"GMPO: log_clip must be \(low, high\), both at least 0, or None, got \(-0\.4, 0\.4\)"):
        GMPO(log_clip=(-0.4, 0.4))
