"""SRPO: reinforcement on right responses, distillation on wrong ones (arXiv 2609.04108, table of methods)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.token_loss import Batch, Metrics, Tensors
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.groups import correct_tokens
from rlad_kernels.losses.ratio.sampled import ClippedLoss, teacher_gap


@dataclass(frozen=True, kw_only=True)
class SRPO(ClippedLoss):
    """SRPO: −min(rA, clip(r)A), A = c·Â + (1 − c)·sg[t − s], c = 1 in a correct response (as in arXiv 2609.04108).

    Args:
        clip, dual_clip, reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.
        teacher_logp: the teacher's log-probs t; a non-finite value makes t − s 0 and counts in ``invalid_teacher``.
        correct: bools or 0/1, ``(B,)`` or the log-probs' shape.

    Metrics: those of :class:`GRPO`, kl_teacher (mean of s − t) and invalid_teacher.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.zeros(2)
        >>> given = {"old_logp": logp, "advantages": logp + 1, "teacher_logp": logp - 3}
        >>> rk.losses.SRPO()(logp, **given, correct=torch.tensor([True, False])).token_loss
        tensor([-1.,  3.])
    """

    needs = ("old_logp", "advantages", "teacher_logp", "correct")

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        return {**super().prepare(batch, tensors), "correct": correct_tokens(batch, tensors["correct"])}

    def tokens(
        self, scores: TokenScores, *, old_logp: Tensor, advantages: Tensor, teacher_logp: Tensor, correct: Tensor, **shared: Any
    ) -> tuple[Tensor, Metrics]:
        gap, found = teacher_gap(scores.logp, teacher_logp)
        loss, metrics = self.surrogate(scores.logp, old_logp, torch.where(correct, advantages, gap), **shared)
        return loss, {**metrics, **found}


add_method(
    "srpo",
    "ratio",
    SRPO(),
    formula="−min(rA, clip(r)A), A = Â in right responses, sg[t − s] in wrong ones",
    paper="arXiv 2609.04108",
    confidence="A",
    note="As the paper that compares it writes it; the method's own paper was not read.",
    published=(
        "As compared there: PPO's clip of 0.2, no KL, the gap t − s detached, verl with no reduction named (token mean, its "
        "default, here); it comes from self-distillation, here the teacher is another model."
    ),
)
