"""Sampler mismatch: token weights from the log-probs μ of the engine that sampled, for any loss on sampled tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlad_kernels.core.check import is_number

FORMS = ("truncate", "mask")
POLICIES = ("old", "current")


class Rollout(NamedTuple):
    """How a token is weighed by x = sg[π/μ], π the ``policy`` named, μ the sampling engine's probability.

    ``truncate``: x clamped to [low, high] (TIS: low 0). ``mask``: x inside [low, high], 0 outside (IcePop with π_old, MOPD with
    π_θ). The weight multiplies Â, which is the same as multiplying the clipped loss; KL terms are not weighed. A μ that is not
    finite gives the weight 0. A weight of 0 takes the token's loss, not its place in the reduction.
    """

    form: str = "truncate"
    low: float = 0.0
    high: float = 2.0
    policy: str = "old"


TIS = Rollout("truncate", high=2.0)
ICEPOP = Rollout("mask", 0.5, 5.0)


def check_rollout(name: str, rollout: Rollout | None, rollout_logp: Tensor | None) -> None:
    """Raise a ValueError that names the field, what came and what was wanted."""
    if rollout is None:
        return
    if rollout_logp is None:
        raise ValueError(f"{name}: rollout={rollout!r} needs rollout_logp, got None")
    if not isinstance(rollout, Rollout):
        raise ValueError(f"{name}: rollout must be a Rollout(form, low, high, policy), got {rollout!r}")
    if rollout.form not in FORMS:
        raise ValueError(f"{name}: rollout.form must be one of {FORMS}, got {rollout.form!r}")
    if rollout.policy not in POLICIES:
        raise ValueError(f"{name}: rollout.policy must be one of {POLICIES}, got {rollout.policy!r}")
    if not (is_number(rollout.low) and is_number(rollout.high) and 0 <= rollout.low <= rollout.high):
        raise ValueError(f"{name}: rollout must have 0 <= low <= high, got low={rollout.low!r}, high={rollout.high!r}")


def rollout_weights(log_x: Tensor, form: str, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Weights from log x, without gradient, and where the bounds changed them."""
    log_x = log_x.detach()
    x = log_x.exp()
    inside = (x <= high) & (x >= low)
    outside = torch.zeros_like(x) if form == "mask" else x.clamp(low, high)
    return torch.where(log_x.isfinite(), torch.where(inside, x, outside), 0), ~(inside & log_x.isfinite())


def weigh(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, rollout_logp: Tensor | None = None, rollout_form: str = "truncate",
    rollout_low: float = 0.0, rollout_high: float = 2.0, rollout_policy: str = "old",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Advantages times the weights of :class:`Rollout`, and the metrics rollout_weight_mean and rollout_clip_frac."""
    if rollout_logp is None:
        return advantages, {}
    policy = old_logp if rollout_policy == "old" else logp
    weights, changed = rollout_weights(policy - rollout_logp, rollout_form, rollout_low, rollout_high)
    metrics = {"rollout_weight_mean": weights, "rollout_clip_frac": changed.to(weights.dtype)}
    return torch.where(weights == 0, 0, weights * advantages), metrics
