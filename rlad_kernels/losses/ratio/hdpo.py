"""HDPO: distillation where a whole group is wrong and reinforcement has nothing to say (arXiv 2609.04108, table of methods)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from rlad_kernels.core.check import check_numbers, needs
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.kdrl import kdrl_tokens, taught_tokens
from rlad_kernels.losses.ratio.sampled import ClippedOptions, clipped_loss


def hdpo_loss(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, correct: Tensor, group_ids: Tensor,
    mask: Tensor | None = None, *, kd_coef: float = 1.0, **options: Unpack[ClippedOptions],
) -> LossOutput:  # fmt: skip
    """HDPO: −min(rA, clip(r)A), A = Â + 1[all of the group wrong]·β·sg[t − s] (as in arXiv 2609.04108).

    It is :func:`kdrl_loss` in the reward, on wrong groups, with a clip.

    Args:
        logp, old_logp, teacher_logp, advantages, correct, group_ids, mask: as in :func:`kdrl_loss`.
        kd_coef: β; no published value is known to us.
        options: those of :func:`grpo_loss`.

    Returns:
        LossOutput. Metrics: those of :func:`grpo_loss`, kl_teacher (mean of s − t) and invalid_teacher.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "hdpo_loss"
    needs(name, old_logp=old_logp, teacher_logp=teacher_logp, advantages=advantages)
    check_numbers(name, kd_coef=kd_coef)
    taught = taught_tokens(name, logp, mask, "wrong-groups", correct, group_ids)
    tensors = {"old_logp": old_logp, "teacher_logp": teacher_logp, "advantages": advantages, "taught": taught}
    return clipped_loss(name, kdrl_tokens, logp, tensors, mask, {"kd_coef": kd_coef, "form": "in-reward"}, **options)


add_method(
    "hdpo", "ratio", hdpo_loss, formula="−min(rA, clip(r)A), A = Â + 1[all wrong]·β·sg[t − s]",
    needs=("old_logp", "teacher_logp", "advantages", "correct", "group_ids"), paper="arXiv 2609.04108", confidence="A", products=3,
    note="As the paper that compares it writes it; the method's own paper was not read.",
)  # fmt: skip
