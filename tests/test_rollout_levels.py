"""Rollout by sequences: the product of π/μ over a sequence, or its geometric mean, in every loss that weighs tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import GMPO, GRPO, GSPO, MOPD, VESPO, ClipCov, Rollout
from rlad_kernels.losses.ratio.sampled import SampledLoss
from tests.test_both_roads import World

LENGTHS, T = (3, 1, 4, 0), 4
FORMS, LEVELS = ("truncate", "mask", "reject"), ("sequence", "geometric")


def packed(x: Tensor) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(x, LENGTHS, strict=True)])


def case() -> dict[str, Tensor]:
    """Sequences whose x is far below, near and far above 1, in their first tokens; what is masked must not matter."""
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    old = -torch.rand(4, T) - 0.5
    mu = old - torch.tensor([-0.7, 0.2, 0.4, 0.0])[:, None] - 0.1 * torch.randn(4, T)
    a = torch.randn(4, T)
    return {"old_logp": old, "advantages": a, "rollout_logp": torch.where(mask, mu, math.nan), "mask": mask}


def expected(given: dict[str, Tensor], rollout: Rollout) -> Tensor:
    """The weight of each token, sequence by sequence."""
    rows = []
    for o, m, keep in zip(given["old_logp"].double(), given["rollout_logp"].double(), given["mask"], strict=True):
        total = (o - m)[keep].sum()
        x = (total if rollout.level == "sequence" else total / keep.sum().clamp(min=1)).exp()
        inside = bool((x >= rollout.low) & (x <= rollout.high))
        kept = torch.ones_like(x) if rollout.form == "reject" else x
        outside = x.clamp(rollout.low, rollout.high) if rollout.form == "truncate" else torch.zeros_like(x)
        rows.append((kept if inside else outside).expand(T))
    return torch.where(given["mask"], torch.stack(rows), 0).float()


@pytest.mark.parametrize("bounds", [(0.0, 2.0), (0.5, 1.5), (0.5, math.inf)])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", FORMS)
def test_weights_of_sequences_padded_and_packed(form: str, level: str, bounds: tuple[float, float]) -> None:
    given, rollout = case(), Rollout(form, *bounds, level=level)
    logp = given["old_logp"] + 0.1
    plain = GRPO(clip=None)(logp, **{k: x for k, x in given.items() if k != "rollout_logp"}).token_loss
    out = GRPO(clip=None, rollout=rollout)(logp, **given)
    want = expected(given, rollout)
    torch.testing.assert_close(out.token_loss, want * plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.metrics["rollout_weight_mean"], want.sum() / sum(LENGTHS), rtol=1e-5, atol=1e-6)
    flat = {k: packed(x) for k, x in given.items() if k != "mask"}
    ids = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    same = GRPO(clip=None, rollout=rollout)(packed(logp), **flat, reduction=rk.Reduction(seq_ids=ids))
    torch.testing.assert_close(same.token_loss, packed(out.token_loss), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(same.loss, out.loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", [GSPO(clip=None), GMPO(log_clip=None)])
@pytest.mark.parametrize("policy", ["old", "current"])
@pytest.mark.parametrize("level", LEVELS)
def test_losses_of_sequences_weigh_by_either_policys(level: str, policy: str, loss: GSPO | GMPO) -> None:
    given, rollout = case(), Rollout("truncate", 0.5, 2.0, policy, level)
    logp = (given["old_logp"] + 0.3).requires_grad_()
    plain = loss(logp, **{k: x for k, x in given.items() if k != "rollout_logp"}).token_loss
    out = replace(loss, rollout=rollout)(logp, **given)
    of = given if policy == "old" else {**given, "old_logp": logp.detach()}
    torch.testing.assert_close(out.token_loss, expected(of, rollout) * plain, rtol=1e-5, atol=1e-6)
    scaled = loss(logp, **{k: x for k, x in given.items() if k not in ("rollout_logp", "advantages")},
                             advantages=given["advantages"] * expected(of, rollout))  # fmt: skip
    got, want = (torch.autograd.grad(x.loss, logp, retain_graph=True)[0] for x in (out, scaled))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)  # nothing flows through the weight


def test_an_invalid_mu_takes_its_sequence_alone() -> None:
    given = case()
    for bad in (math.nan, -math.inf, math.inf):
        mu = given["rollout_logp"].clone()
        mu[0, 1] = bad
        out = GRPO(clip=None, rollout=Rollout(level="sequence"))(given["old_logp"], **{**given, "rollout_logp": mu})
        assert not out.token_loss[0].any() and out.token_loss[1:3].any()
        assert out.loss.isfinite()


@pytest.mark.parametrize("level", LEVELS)
def test_sequences_of_one_token_are_tokens(level: str) -> None:
    given = {k: x.reshape(-1, 1) for k, x in case().items()}
    losses = [GRPO(rollout=Rollout(high=1.5, level=x))(given["old_logp"], **given).token_loss for x in (level, "token")]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


SAMPLED = {k: m.loss for k, m in rk.METHODS.items() if isinstance(m.loss, SampledLoss) and not isinstance(m.loss, MOPD | VESPO)}


@pytest.mark.parametrize("name", SAMPLED)
def test_every_loss_has_the_levels_on_both_roads(name: str) -> None:
    """μ that is below π_old by log 8/n in n tokens: x = 8 is cut to 2, whatever the loss makes of the given tensors."""
    world = World()
    loss = replace(SAMPLED[name], rollout=Rollout("truncate", high=2.0, level="sequence"))
    keep = torch.ones(world.target.shape, dtype=torch.bool)
    given: dict[str, Any] = {k: x for k, x in world.given(loss).items() if k not in ("rollout_logp", "ref_logp")}
    head, names = world.head, {"mask": keep, "reduction": rk.Reduction(denominator=1.0)}
    ids = given["teacher"].ids if "topk_logp" in loss.read() else None
    scores = rk.linear_logp(world.hidden, head, world.target, topk_ids=ids, entropy=True, tail=ids is not None)
    mu = world.tensors["old_logp"] - math.log(8) / keep.shape[1]
    out = loss(scores, **given, rollout_logp=mu, **names)
    swept = rk.linear_loss(world.hidden, head, world.target, loss, **given, rollout_logp=mu, **names)
    assert out.metrics["rollout_weight_mean"] == 2 and out.metrics["rollout_clip_frac"] == 1
    torch.testing.assert_close(swept.token_loss, out.token_loss, rtol=1e-5, atol=2e-6)
    assert swept.metrics["rollout_weight_mean"] == 2


def test_what_is_refused() -> None:
    zero = torch.zeros(3)
    with pytest.raises(ValueError, match="GRPO: rollout\\.level must be 'token' for the current policy"):
        GRPO(rollout=Rollout(policy="current", level="sequence"))
    with pytest.raises(ValueError, match="ClipCov: rollout\\.level must be 'token'"):  # it reads tokens, but no sequences
        ClipCov(rollout=Rollout(policy="current", level="sequence"))
    with pytest.raises(ValueError, match="MOPD: rollout\\.level must be 'token'"):
        MOPD(rollout=Rollout("mask", 0.5, 5.0, "current", "geometric"))
    with pytest.raises(ValueError, match="GRPO: rollout\\.level must be one of"):
        GRPO(rollout=Rollout(level="word"))
    with pytest.raises(ValueError, match=r"GRPO: rollout\.level of packed \(N,\) tokens needs Reduction\(seq_ids=…\)"):
        GRPO(rollout=Rollout(level="sequence"))(zero, old_logp=zero, advantages=zero, rollout_logp=zero)
