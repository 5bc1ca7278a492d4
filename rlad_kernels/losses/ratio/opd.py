"""On-policy distillation on sampled tokens, and ExOPD, which goes beyond the teacher (arXiv 2603.25562, 2602.12125)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers, check_positive, check_range
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import ClippedLoss
from rlad_kernels.losses.ratio.sequences import suffix_sums


@dataclass(frozen=True, kw_only=True)
class OPD(ClippedLoss):
    """Sampled-token OPD: −r·A, r = exp(s − o), A = coef·(t − o): a policy gradient with the teacher's log-ratio as reward.

    As published by Thinking Machines: importance-sampled, not clipped, not normalised. On-policy the expected gradient is the
    reverse KL's, and at γ = 0 each token pays for its own divergence only. s − t itself (k1) must never be backpropagated as a
    loss: the teacher drops out of its gradient, whose expectation is 0.

    Args:
        extrapolation: λ: A = coef·(λt + (1 − λ)b − o). The optimum is λ·log π_T + (1 − λ)·log π_b + const (G-OPD, arXiv
            2602.12125): λ > 1 extrapolates (ExOPD; 1.5 can be unstable), λ = 1 is OPD.
        coef: factor on the reward.
        gamma: γ of a discounted sum Σ_{t' ≥ t} γ^{t'−t} of the rewards of the sequence (arXiv 2603.25562); masked tokens add
            nothing and still are a step. Packed tokens then need ``Reduction(seq_ids=…)``.
        reward_clamp: c; the reward, or its discounted sum, is clamped to [−c, c] (it has no gradient that could be lost).
        clip, dual_clip, reference, rollout: as of :class:`GRPO`; by default no clip (the PPO form of arXiv 2603.25562 clips).

    Tensors of a call:
        logp, old_logp, ref_logp, rollout_logp: as of :class:`GRPO`.
        teacher_logp: the teacher's log-probs t of the same tokens (several teachers: ``rk.supports.combine_teachers``). Where the
            reward is not finite it is 0, and counts in ``invalid_teacher``.
        base_logp: b of a reference model, needed for λ ≠ 1.
        advantages: Â of a task reward to add.

    Metrics: those of :class:`GRPO`, kl_teacher (mean of s − t) and invalid_teacher.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp, teacher = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -2.5])
        >>> rk.losses.OPD()(logp, old_logp=logp, teacher_logp=teacher).token_loss
        tensor([-0.5000,  0.5000])
    """

    clip: tuple[float, float] | None = None
    extrapolation: float = 1.0
    coef: float = 1.0
    gamma: float = 0.0
    reward_clamp: float | None = None

    needs = ("old_logp", "teacher_logp")
    takes = (*ClippedLoss.takes, "base_logp", "advantages")

    def check(self) -> None:
        super().check()
        check_numbers(self.name, extrapolation=self.extrapolation, coef=self.coef)
        check_range(self.name, "gamma", self.gamma, 0, 1)
        check_positive(self.name, "reward_clamp", self.reward_clamp)

    def needed(self) -> tuple[str, ...]:
        return (*super().needed(), *(("base_logp",) if self.extrapolation != 1 else ()))

    def reward(self, old_logp: Tensor, teacher_logp: Tensor, base_logp: Tensor | None) -> tuple[Tensor, Tensor]:
        """λt + (1 − λ)b − o, 0 where that is not finite; and where it is not."""
        target = teacher_logp
        if base_logp is not None and self.extrapolation != 1:
            target = self.extrapolation * teacher_logp + (1 - self.extrapolation) * base_logp
        reward = target - old_logp
        invalid = ~reward.isfinite()
        return torch.where(invalid, 0, reward), invalid

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        tensors = super().prepare(batch, tensors)
        if not self.gamma:
            return tensors
        sequence = batch.sequence("gamma")
        reward, _ = self.reward(tensors["old_logp"], tensors["teacher_logp"], tensors.get("base_logp"))
        reward = torch.where(batch.keep, reward, 0)
        return {**tensors, "future": suffix_sums(reward, sequence, self.gamma) - reward}

    def tokens(
        self,
        scores: TokenScores,
        *,
        old_logp: Tensor,
        teacher_logp: Tensor,
        base_logp: Tensor | None = None,
        future: Tensor | None = None,
        advantages: Tensor | None = None,
        **shared: Any,
    ) -> tuple[Tensor, Metrics]:
        reward, invalid = self.reward(old_logp, teacher_logp, base_logp)
        bound = math.inf if self.reward_clamp is None else self.reward_clamp
        total = self.coef * (reward if future is None else reward + future).clamp(-bound, bound)
        total = total if advantages is None else total + advantages
        return self.taught(scores.logp, old_logp, teacher_logp, total, invalid, **shared)


add_method(
    "opd",
    "ratio",
    OPD(),
    formula="−r·A, A = t − o",
    paper="Thinking Machines, On-Policy Distillation",
    confidence="A",
    note="t − o is detached: as a backpropagated loss s − t would have the expected gradient 0.",
    published=(
        "tinker-cookbook: importance_sampling, which sums over tokens (the mean here), o of the sampler, coefficient 1, γ = 0, no "
        "clip, no normalisation; the reward is detached."
    ),
)
add_method(
    "opd_clipped",
    "ratio",
    OPD(clip=(0.2, 0.2), dual_clip=3.0, reward_clamp=5.0),
    formula="−min(rA, clip(r)A) with dual clip 3, A = clamp(Σ_{t' ≥ t} γ^{t'−t}(t − o), ±5)",
    paper="arXiv 2603.25562",
    confidence="A",
    note="γ = 0 is the default; γ > 0 has a variance that grows faster with the length.",
    published=(
        "The code's estimator opd: the mean over tokens, clip 0.2 and dual clip 3 (verl's defaults), γ = 0, no normalisation, the "
        "reward o − t detached; its clamp to ±5 is an option. The same here."
    ),
)
add_method(
    "exopd",
    "ratio",
    OPD(extrapolation=1.25, clip=(0.2, 0.2), dual_clip=3.0),
    formula="−min(rA, clip(r)A) with dual clip 3, A = λt + (1 − λ)b − o, λ = 1.25",
    paper="arXiv 2602.12125",
    confidence="A",
    note=(
        "λ = 1 is opd whatever b; λ = 1.5 can be unstable. The official code calls the teacher ref_log_prob and b base_log_prob."
    ),
    published=(
        "The code: verl's vanilla loss, so token mean, clip 0.2, dual clip 3; λ = 1.25, the reward detached, token weights of the "
        "rollout cut at 5, no KL. The same here, but weights are cut at 2 without rollout=Rollout(high=5.0)."
    ),
)
