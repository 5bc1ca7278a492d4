"""Both bounds of Rollout's two forms, in every loss that weighs tokens, on log-probs and inside the sweep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import rlad_kernels as rk

LOG_X = (-3.0, -0.5, 0.0, 0.5, 3.0, 200.0)
LOSSES = ("grpo_loss", "trrd_loss", "cispo_loss", "sapo_loss", "kdrl_loss", "opd_loss", "srpo_loss", "rlsd_loss", "sdar_loss")


def weights_of(loss: str, rollout: rk.Rollout) -> tuple[list[float], float]:
    """The weight of each token, as the ratio of its loss to that without a sampler, and the fraction that the bounds changed."""
    o = torch.full((len(LOG_X),), -1.0)
    given: dict[str, Any] = {"logp": o, "old_logp": o, "advantages": torch.ones_like(o), "reduction": "token-mean"}
    if loss in ("trrd_loss", "opd_loss", "srpo_loss", "rlsd_loss", "sdar_loss", "kdrl_loss"):
        given["teacher_logp"] = o if loss in ("kdrl_loss", "sdar_loss") else o + 0.1
    if loss == "srpo_loss":
        given["correct"] = torch.ones_like(o)
    call = getattr(rk, loss)
    plain = call(**given).token_loss
    out = call(**given, rollout_logp=o - torch.tensor(LOG_X), rollout=rollout)
    return (out.token_loss / plain).tolist(), out.metrics["rollout_clip_frac"].item()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("low", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("form", ["truncate", "mask"])
def test_bounds(form: str, low: float, loss: str) -> None:
    """The issue's input: e^-3 with bounds [0.5, 2] was weighed 0.0498, not 0.5."""
    x = [math.exp(v) for v in LOG_X]
    inside = [low <= v <= 2 for v in x]
    outside = [0.0 if form == "mask" else min(max(v, low), 2.0) for v in x]
    want = [v if keep else other for v, keep, other in zip(x, inside, outside, strict=True)]
    weights, changed = weights_of(loss, rk.Rollout(form, low=low, high=2.0))
    assert weights == pytest.approx(want, rel=1e-5)
    assert changed == pytest.approx(1 - sum(inside) / len(x))


def test_bounds_inside_the_sweep() -> None:
    hidden, head, target = torch.randn(4, 8), rk.LMHead(torch.randn(9, 8)), torch.arange(4)
    logp = rk.linear_logp(hidden, head, target).logp
    inputs = {"old_logp": logp, "advantages": torch.ones(4), "rollout_logp": logp + 3, "rollout_low": 0.5}
    out = rk.fused_linear_loss(hidden, head, target, rk.TOKEN_LOSSES["grpo"], inputs=inputs)
    torch.testing.assert_close(out.token_loss, torch.full((4,), -0.5))
    assert out.metrics["rollout_clip_frac"] == 1
