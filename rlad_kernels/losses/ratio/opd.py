"""On-policy distillation on sampled tokens, and ExOPD, which goes beyond the teacher (arXiv 2603.25562, 2602.12125)."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers, is_number, needs
from rlad_kernels.core.reduction import keep_mask, sequence_index
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.sampled import ClippedOptions, accumulated, clipped_loss, on_sampled, teacher_gap
from rlad_kernels.losses.ratio.sequences import suffix_sums
from rlad_kernels.losses.ratio.surrogate import per_token, ratio_loss_tokens


def opd_reward(old_logp: Tensor, teacher_logp: Tensor, base_logp: Tensor | None, extrapolation: float) -> tuple[Tensor, Tensor]:
    """λt + (1 − λ)b − o, 0 where that is not finite; and where it is not."""
    target = teacher_logp
    if base_logp is not None and extrapolation != 1:
        target = extrapolation * teacher_logp + (1 - extrapolation) * base_logp
    reward = target - old_logp
    invalid = ~reward.isfinite()
    return torch.where(invalid, 0, reward), invalid


@on_sampled("opd")
def opd_tokens(
    logp: Tensor, *, old_logp: Tensor, teacher_logp: Tensor, base_logp: Tensor | None = None, future: Tensor | None = None,
    advantages: Tensor | None = None, extrapolation: float = 1.0, coef: float = 1.0, reward_clamp: float = math.inf,
    clip_low: float = 1.0, clip_high: float = math.inf, **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped surrogate with A = coef·clamp(λt + (1 − λ)b − o + future) + Â, and its metrics; all tensors ``(N,)``."""
    reward, invalid = opd_reward(old_logp, teacher_logp, base_logp, extrapolation)
    total = coef * (reward if future is None else reward + future).clamp(-reward_clamp, reward_clamp)
    total = total if advantages is None else total + advantages
    loss, metrics = ratio_loss_tokens(logp, old_logp=old_logp, advantages=total, clip_low=clip_low, clip_high=clip_high, **options)
    _, found = teacher_gap(logp, teacher_logp)
    return loss, {**metrics, **found, "invalid_teacher": invalid.to(loss.dtype)}


def opd_loss(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, mask: Tensor | None = None, *, base_logp: Tensor | None = None,
    extrapolation: float = 1.0, coef: float = 1.0, gamma: float = 0.0, reward_clamp: float | None = None,
    advantages: Tensor | None = None, **options: Unpack[ClippedOptions],
) -> LossOutput:  # fmt: skip
    """Sampled-token OPD: −r·A, r = exp(s − o), A = coef·(t − o): a policy gradient with the teacher's log-ratio as reward.

    As published by Thinking Machines: importance-sampled, not clipped, not normalised. On-policy the expected gradient is the
    reverse KL's, and at γ = 0 each token pays for its own divergence only. s − t itself (k1) must never be backpropagated as a
    loss: the teacher drops out of its gradient, whose expectation is 0.

    Args:
        logp, old_logp, mask: as in :func:`grpo_loss`.
        teacher_logp: the teacher's log-probs t of the same tokens (several teachers: :func:`combine_teachers`). Where the reward
            is not finite it is 0, and counts in ``invalid_teacher``.
        base_logp, extrapolation: b of a reference model and λ: A = coef·(λt + (1 − λ)b − o). The optimum is λ·log π_T +
            (1 − λ)·log π_b + const (G-OPD, arXiv 2602.12125): λ > 1 extrapolates (ExOPD; 1.5 can be unstable), λ = 1 is OPD.
        coef: factor on the reward.
        gamma: γ of a discounted sum Σ_{t' ≥ t} γ^{t'−t} of the rewards of the sequence (arXiv 2603.25562); masked tokens add
            nothing and still are a step. In a fused sweep pass it as ``future``, the sum without its first term.
        reward_clamp: c; the reward, or its discounted sum, is clamped to [−c, c] (it has no gradient that could be lost).
        advantages: Â of a task reward to add.
        options: those of :func:`grpo_loss`; ``clip`` is None, no clip, unless given (the PPO form of arXiv 2603.25562 clips).
            Packed tokens need ``seq_ids`` with ``gamma``.

    Returns:
        LossOutput. Metrics: those of :func:`grpo_loss`, kl_teacher (mean of s − t) and invalid_teacher.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "opd_loss"
    needs(name, old_logp=old_logp, teacher_logp=teacher_logp)
    check_numbers(name, extrapolation=extrapolation, coef=coef)
    if extrapolation != 1 and base_logp is None:
        raise ValueError(f"{name}: extrapolation={extrapolation!r} needs base_logp, got None")
    if not (is_number(gamma) and 0 <= gamma <= 1):
        raise ValueError(f"{name}: gamma must be in [0, 1], got {gamma!r}")
    if reward_clamp is not None and not (is_number(reward_clamp) and reward_clamp > 0):
        raise ValueError(f"{name}: reward_clamp must be positive or None, got {reward_clamp!r}")
    tensors: dict[str, Tensor | None] = {"old_logp": old_logp, "teacher_logp": teacher_logp, "base_logp": base_logp}
    tensors["advantages"] = advantages
    if gamma:
        like = accumulated(name, logp).detach()
        keep = keep_mask(name, mask, like)
        sequence = sequence_index(name, keep, "gamma", options.get("seq_ids"))
        given = {k: per_token(name, k, x, like) for k, x in tensors.items() if x is not None and k != "advantages"}
        reward, _ = opd_reward(given["old_logp"], given["teacher_logp"], given.get("base_logp"), extrapolation)
        reward = torch.where(keep, reward, 0).flatten()
        tensors["future"] = (suffix_sums(reward, sequence, gamma) - reward).view_as(like)
    numbers = {"extrapolation": extrapolation, "coef": coef, "reward_clamp": math.inf if reward_clamp is None else reward_clamp}
    options.setdefault("clip", None)
    return clipped_loss(name, opd_tokens, logp, tensors, mask, numbers, **options)


_NEEDS = ("old_logp", "teacher_logp")
add_method(
    "opd", "ratio", opd_loss, formula="−r·A, A = t − o", needs=_NEEDS, paper="Thinking Machines, On-Policy Distillation",
    confidence="A", products=3,
    note="t − o is detached: as a backpropagated loss s − t would have the expected gradient 0.",
)  # fmt: skip
add_method(
    "opd_clipped", "ratio", opd_loss, formula="−min(rA, clip(r)A), A = clamp(Σ_{t' ≥ t} γ^{t'−t}(t − o), ±5)", needs=_NEEDS,
    paper="arXiv 2603.25562", confidence="A", products=3, options={"clip": (0.2, 0.2), "reward_clamp": 5.0},
    note="γ = 0 is the default; γ > 0 has a variance that grows faster with the length.",
)  # fmt: skip
add_method(
    "exopd", "ratio", opd_loss, formula="−min(rA, clip(r)A) with dual clip 3, A = λt + (1 − λ)b − o, λ = 1.25",
    needs=(*_NEEDS, "base_logp"), paper="arXiv 2602.12125", confidence="A", products=3,
    options={"extrapolation": 1.25, "clip": (0.2, 0.2), "dual_clip": 3.0},
    note=(
        "λ = 1 is opd whatever b; λ = 1.5 can be unstable. The official code calls the teacher ref_log_prob and b "
        "base_log_prob."
    ),
)  # fmt: skip
