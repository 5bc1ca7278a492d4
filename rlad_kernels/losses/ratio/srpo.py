"""SRPO: reinforcement on right responses, distillation on wrong ones (arXiv 2609.04108, table of methods)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from rlad_kernels.core.check import needs
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.groups import correct_tokens
from rlad_kernels.losses.ratio.sampled import ClippedOptions, accumulated, clipped_loss, on_sampled, teacher_gap
from rlad_kernels.losses.ratio.surrogate import ratio_loss_tokens


@on_sampled("srpo")
def srpo_tokens(
    logp: Tensor, *, old_logp: Tensor, advantages: Tensor, teacher_logp: Tensor, right: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate with A = Â where ``right`` is not 0, else t − s; all tensors ``(N,)``."""
    gap, found = teacher_gap(logp, teacher_logp)
    loss, metrics = ratio_loss_tokens(logp, old_logp=old_logp, advantages=torch.where(right != 0, advantages, gap), **options)
    return loss, {**metrics, **found}


def srpo_loss(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, correct: Tensor, mask: Tensor | None = None,
    **options: Unpack[ClippedOptions],
) -> LossOutput:  # fmt: skip
    """SRPO: −min(rA, clip(r)A), A = c·Â + (1 − c)·sg[t − s], c = 1 in a correct response (as in arXiv 2609.04108).

    Args:
        logp, old_logp, advantages, mask: as in :func:`grpo_loss`.
        teacher_logp: the teacher's log-probs t; a non-finite value makes t − s 0 and counts in ``invalid_teacher``.
        correct: bools or 0/1, ``(B,)`` or the log-probs' shape.
        options: those of :func:`grpo_loss`.

    Returns:
        LossOutput. Metrics: those of :func:`grpo_loss`, kl_teacher (mean of s − t) and invalid_teacher.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "srpo_loss"
    needs(name, old_logp=old_logp, teacher_logp=teacher_logp, advantages=advantages)
    right = correct_tokens(name, correct, accumulated(name, logp).detach(), mask)
    tensors = {"old_logp": old_logp, "teacher_logp": teacher_logp, "advantages": advantages, "right": right}
    return clipped_loss(name, srpo_tokens, logp, tensors, mask, {}, **options)


add_method(
    "srpo", "ratio", srpo_loss, formula="−min(rA, clip(r)A), A = Â in right responses, sg[t − s] in wrong ones",
    needs=("old_logp", "teacher_logp", "advantages", "correct"), paper="arXiv 2609.04108", confidence="A", products=3,
    note="As the paper that compares it writes it; the method's own paper was not read.",
)  # fmt: skip
