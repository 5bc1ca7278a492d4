"""Both bounds of Rollout's two forms, in every loss that weighs tokens, on log-probs and inside the sweep."""

from __future__ import annotations

import math

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.losses import GRPO, Rollout
from rlad_kernels.losses.ratio.cispo import CISPO
from rlad_kernels.losses.ratio.kdrl import KDRL
from rlad_kernels.losses.ratio.opd import OPD
from rlad_kernels.losses.ratio.rlsd import RLSD
from rlad_kernels.losses.ratio.sapo import SAPO
from rlad_kernels.losses.ratio.sdar import SDAR
from rlad_kernels.losses.ratio.srpo import SRPO
from rlad_kernels.losses.ratio.trrd import TRRD

LOG_X = (-3.0, -0.5, 0.0, 0.5, 3.0, 200.0)
LOSSES = (GRPO, TRRD, CISPO, SAPO, KDRL, OPD, SRPO, RLSD, SDAR)


def weights_of(loss: type, rollout: Rollout) -> tuple[list[float], float]:
    """The weight of each token, as the ratio of its loss to that without a sampler, and the fraction that the bounds changed."""
    o = torch.full((len(LOG_X),), -1.0)
    pool = {
        "old_logp": o, "advantages": torch.ones_like(o), "correct": torch.ones_like(o),
        "teacher_logp": o if loss in (KDRL, SDAR) else o + 0.1,
    }  # fmt: skip
    given = {k: pool[k] for k in loss.needs} | ({"advantages": pool["advantages"]} if loss is OPD else {})
    plain = loss()(o, **given, reduction="token-mean").token_loss
    out = loss(rollout=rollout)(o, **given, rollout_logp=o - torch.tensor(LOG_X), reduction="token-mean")
    return (out.token_loss / plain).tolist(), out.metrics["rollout_clip_frac"].item()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("low", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("form", ["truncate", "mask"])
def test_bounds(form: str, low: float, loss: type) -> None:
    """The issue's input: e^-3 with bounds [0.5, 2] was weighed 0.0498, not 0.5."""
    x = [math.exp(v) for v in LOG_X]
    inside = [low <= v <= 2 for v in x]
    outside = [0.0 if form == "mask" else min(max(v, low), 2.0) for v in x]
    want = [v if keep else other for v, keep, other in zip(x, inside, outside, strict=True)]
    weights, changed = weights_of(loss, Rollout(form, low=low, high=2.0))
    assert weights == pytest.approx(want, rel=1e-5)
    assert changed == pytest.approx(1 - sum(inside) / len(x))


def test_bounds_inside_the_sweep() -> None:
    hidden, head, target = torch.randn(4, 8), rk.LMHead(torch.randn(9, 8)), torch.arange(4)
    logp = rk.linear_logp(hidden, head, target).logp
    given = {"old_logp": logp, "advantages": torch.ones(4), "rollout_logp": logp + 3}
    out = rk.linear_loss(hidden, head, target, GRPO(rollout=Rollout(low=0.5)), **given)
    torch.testing.assert_close(out.token_loss, torch.full((4,), -0.5))
    assert out.metrics["rollout_clip_frac"] == 1


def test_the_bounds_that_a_rollout_has_by_itself() -> None:
    """TIS's: no lower one, and 2."""
    weights, _ = weights_of(GRPO, Rollout("truncate"))
    assert weights == pytest.approx([math.exp(-3.0), math.exp(-0.5), 1.0, math.exp(0.5), 2.0, 2.0])
