"""Sampler mismatch: token weights from the log-probs μ of the engine that sampled, for any loss on sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.check import check_choice, is_number
from rlad_kernels.losses.ratio.sequences import sequence_mean, totals

FORMS = ("truncate", "mask", "reject")
POLICIES = ("old", "current")
LEVELS = ("token", "sequence", "geometric")


@dataclass(frozen=True)
class Rollout:
    """How a token is weighed by x = sg[π/μ], π the ``policy`` named, μ of ``rollout_logp``.

    ``truncate``: x clamped to [low, high] (TIS: low 0). ``mask``: x inside [low, high], 0 outside (IcePop with π_old, MOPD with
    π_θ). ``reject``: 1 inside, 0 outside. The weight multiplies Â, which is the same as multiplying the clipped loss; KL terms are
    not weighed. A μ that is not finite gives the weight 0, and so does a weight that underflows (log x < −103 in float32). A
    weight of 0 takes the token's loss, not its place in the reduction.

    ``level``: x of the ``token``; of its ``sequence``, exp(Σ_t(log π − log μ)) over the kept tokens, which is unbiased and spreads
    with the length; or ``geometric``, exp of their mean. All tokens of a sequence then have one weight, 0 where any of its μ is not
    finite, and packed tokens need ``Reduction(seq_ids=…)``. The current policy's sequences are for losses that read them (GSPO).

    Example:
        >>> import torch, rlad_kernels as rk
        >>> zero, loss = torch.zeros(1), rk.losses.GRPO(rollout=rk.losses.Rollout("truncate", high=2.0))
        >>> loss(zero, old_logp=zero, advantages=zero + 1, rollout_logp=zero - 3).loss
        tensor(-2.)
    """

    form: str = "truncate"
    low: float = 0.0
    high: float = 2.0
    policy: str = "old"
    level: str = "token"

    def check(self, name: str) -> None:
        """Raise a ValueError that names the field, what came and what was wanted."""
        check_choice(name, "rollout.form", self.form, FORMS)
        check_choice(name, "rollout.policy", self.policy, POLICIES)
        check_choice(name, "rollout.level", self.level, LEVELS)
        if not (is_number(self.low) and is_number(self.high) and 0 <= self.low <= self.high):
            raise ValueError(f"{name}: rollout must have 0 <= low <= high, got low={self.low!r}, high={self.high!r}")

    def log_ratio(self, log_x: Tensor, keep: Tensor, sequence: Tensor) -> Tensor:
        """log x of each token's sequence from those of the tokens; all ``(N,)``."""
        log_x = log_x.detach()
        return totals(torch.where(keep, log_x, 0), sequence) if self.level == "sequence" else sequence_mean(log_x, keep, sequence)

    def weights(self, log_x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights from log x, without gradient, and where the bounds changed them."""
        log_x = log_x.detach()
        x = log_x.exp()
        inside = (x <= self.high) & (x >= self.low)
        outside = x.clamp(self.low, self.high) if self.form == "truncate" else torch.zeros_like(x)
        x = torch.ones_like(x) if self.form == "reject" else x
        return torch.where(log_x.isfinite(), torch.where(inside, x, outside), 0), ~(inside & log_x.isfinite())

    def weigh(self, advantages: Tensor, log_x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages times the weights, and the metrics rollout_weight_mean and rollout_clip_frac."""
        weights, changed = self.weights(log_x)
        metrics = {"rollout_weight_mean": weights, "rollout_clip_frac": changed.to(weights.dtype)}
        return torch.where(weights == 0, 0, weights * advantages), metrics


TIS = Rollout("truncate", high=2.0)
ICEPOP = Rollout("mask", 0.5, 5.0)
