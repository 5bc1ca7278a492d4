"""What losses on sampled tokens share: a reference, the sampler's mismatch, a clip; and the terms that several are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rlad_kernels.core.token_loss import Batch, Metrics, Tensors, TokenLoss
from rlad_kernels.losses.ratio.kl import NO_KL, Reference
from rlad_kernels.losses.ratio.rollout import TIS, Rollout
from rlad_kernels.losses.ratio.surrogate import Anchor, check_clip, clipped_surrogate


@dataclass(frozen=True, kw_only=True)
class SampledLoss(TokenLoss):
    """A loss on sampled tokens.

    Attributes:
        reference: a KL to ``ref_logp``, by default a metric where that is given.
        rollout: how ``rollout_logp``, the log-probs μ of the engine that sampled, weighs tokens; where it is given and this is
            None, by min(π_old/μ, 2) (TIS).
        reads_sequences: whether :meth:`tokens` has whole sequences before it, so that ``rollout`` may weigh the current policy's.
    """

    reference: Reference = field(default_factory=lambda: NO_KL)  # a function: torch.compile traces no object among defaults
    rollout: Rollout | None = None

    takes = ("ref_logp", "rollout_logp")
    reads_sequences: ClassVar[bool] = False

    def check(self) -> None:
        if not isinstance(self.reference, Reference):
            raise ValueError(f"{self.name}: reference must be a Reference(coef, estimator), got {self.reference!r}")
        if not isinstance(self.rollout, Rollout | None):
            raise ValueError(
                f"{self.name}: rollout must be a Rollout(form, low, high, policy, level) or None, got {self.rollout!r}"
            )
        self.reference.check(self.name)
        if self.reference.weighted and "old_logp" not in self.needs:
            raise ValueError(f"{self.name}: reference must not be weighted, this loss has no old policy; got {self.reference!r}")
        if self.rollout is not None:
            self.rollout.check(self.name)
            if self.rollout.policy == "current" and self.rollout.level != "token" and not self.reads_sequences:
                raise ValueError(
                    f"{self.name}: rollout.level must be 'token' for the current policy, whose other tokens this loss does not "
                    f"read, or rollout.policy 'old'; got {self.rollout!r}"
                )

    def needed(self) -> tuple[str, ...]:
        asked = {"ref_logp": self.reference.coef != 0, "rollout_logp": self.rollout is not None}
        return (*self.needs, *(k for k, needed in asked.items() if needed and k not in self.needs))

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        """With the old policy's sequences in ``rollout`` log x takes the place of ``rollout_logp``: it is given as a whole."""
        rollout, mu = self.rollout, tensors.get("rollout_logp")
        if mu is None or rollout is None or rollout.level == "token" or rollout.policy == "current":
            return tensors
        log_x = rollout.log_ratio(tensors["old_logp"] - mu, batch.keep, batch.sequence("rollout.level"))
        return {**tensors, "rollout_logp": log_x}

    def weighed(
        self,
        advantages: Tensor,
        logp: Tensor,
        old_logp: Tensor,
        rollout_logp: Tensor | None,
        among: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Advantages times the weights of ``rollout``, and its metrics; ``among``: kept tokens and sequences of a whole batch."""
        if rollout_logp is None:
            return advantages, {}
        rollout = self.rollout or TIS
        if rollout.level != "token" and rollout.policy == "old":
            return rollout.weigh(advantages, rollout_logp)
        log_x = (old_logp if rollout.policy == "old" else logp) - rollout_logp
        if rollout.level != "token":
            assert among is not None
            log_x = rollout.log_ratio(log_x, *among)
        return rollout.weigh(advantages, log_x)


@dataclass(frozen=True, kw_only=True)
class ClippedLoss(SampledLoss):
    """A loss whose ratio is clipped.

    Attributes:
        clip: (ε_low, ε_high); None never clips.
        dual_clip: c > 1; for Â < 0 the token loss is min(PPO loss, −c·Â).
    """

    clip: tuple[float, float] | None = (0.2, 0.2)
    dual_clip: float | None = None

    def check(self) -> None:
        super().check()
        check_clip(self.name, self.clip, self.dual_clip)

    def surrogate(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        *,
        anchor: Anchor | None = None,
        ref_logp: Tensor | None = None,
        rollout_logp: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """−min(rA, clip(r)A) + coef·KL with these options, and the metrics; all tensors ``(N,)``."""
        advantages, found = self.weighed(advantages, logp, old_logp, rollout_logp)
        loss, metrics = clipped_surrogate(
            logp, old_logp, advantages, self.clip, self.dual_clip, anchor=anchor, ref_logp=ref_logp, reference=self.reference
        )
        return loss, {**metrics, **found}

    def taught(
        self, logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, invalid: Tensor, **shared: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        """:meth:`surrogate` of advantages that a teacher made, with its metrics; ``invalid`` where it said nothing."""
        loss, metrics = self.surrogate(logp, old_logp, advantages, **shared)  # pyright: ignore[reportArgumentType]
        _, found = teacher_gap(logp, teacher_logp)
        return loss, {**metrics, **found, "invalid_teacher": invalid.to(loss.dtype)}


def reinforced(logp: Tensor, weight: Tensor) -> Tensor:
    """−sg[w]·s: REINFORCE; 0 where the weight is 0, whatever the log-prob. An infinite weight is the largest number."""
    largest = torch.finfo(weight.dtype).max
    weight = weight.detach().clamp(-largest, largest)
    return torch.where(weight == 0, 0, -weight * torch.where(weight == 0, 0, logp))


def ratio_metrics(logp: Tensor, old_logp: Tensor) -> dict[str, Tensor]:
    """ratio_mean, ratio_max and kl_old of a token loss that does not go through ``rlad::clipped_ratio``."""
    gap = (logp - old_logp).detach()
    r = gap.exp()
    return {"ratio_mean": r, "ratio_max": r, "kl_old": gap}


def teacher_gap(logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """d = sg[t − s], 0 where that is not finite, and the metrics kl_teacher (mean of s − t) and invalid_teacher."""
    gap = teacher_logp - logp.detach()
    gap = torch.where(gap.isfinite(), gap, 0)
    return gap, {"kl_teacher": -gap, "invalid_teacher": (~teacher_logp.isfinite()).to(gap.dtype)}
