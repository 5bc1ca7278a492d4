"""SDAR: GRPO plus a gated pull towards the teacher where it likes the sampled token better (ms-swift's port)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers, needs
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.sampled import ClippedOptions, clipped_loss, on_sampled, teacher_gap
from rlad_kernels.losses.ratio.surrogate import ratio_loss_tokens


@on_sampled("sdar")
def sdar_tokens(
    logp: Tensor, *, old_logp: Tensor, advantages: Tensor, teacher_logp: Tensor, kd_coef: float = 1.0, gate: float = 5.0,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped surrogate + kd_coef·sg[σ(gate·(t − s))]·(t − s); all tensors ``(N,)``."""
    gap, found = teacher_gap(logp, teacher_logp)
    loss, metrics = ratio_loss_tokens(logp, old_logp=old_logp, advantages=advantages, **options)
    use = (logp.detach() - teacher_logp).isfinite()
    pull = torch.where(use, torch.where(use, teacher_logp, 0) - logp, 0)
    return loss + kd_coef * torch.sigmoid(gate * gap) * pull, {**metrics, **found}


def sdar_loss(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, *, kd_coef: float = 1.0,
    gate: float = 5.0, **options: Unpack[ClippedOptions],
) -> LossOutput:  # fmt: skip
    """SDAR: −min(rÂ, clip(r)Â) + coef·sg[σ(gate·(t − s))]·(t − s) (as in ms-swift).

    The second term always raises the sampled token, by coef·σ(gate·(t − s)): it is a gated imitation of the own samples, not a
    KL estimator, and its expected on-policy gradient is 0 where the gate is constant.

    Args:
        logp, old_logp, advantages, mask: as in :func:`grpo_loss`.
        teacher_logp: the teacher's log-probs t; a non-finite value gives no pull and counts in ``invalid_teacher``.
        kd_coef: factor on the pull; no published value is known to us.
        gate: slope of the gate.
        options: those of :func:`grpo_loss`.

    Returns:
        LossOutput. Metrics: those of :func:`grpo_loss`, kl_teacher (mean of s − t) and invalid_teacher.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    needs("sdar_loss", old_logp=old_logp, teacher_logp=teacher_logp, advantages=advantages)
    check_numbers("sdar_loss", kd_coef=kd_coef, gate=gate)
    tensors = {"old_logp": old_logp, "teacher_logp": teacher_logp, "advantages": advantages}
    return clipped_loss("sdar_loss", sdar_tokens, logp, tensors, mask, {"kd_coef": kd_coef, "gate": gate}, **options)


add_method(
    "sdar", "ratio", sdar_loss, formula="grpo + sg[σ(5(t − s))]·(t − s)", needs=("old_logp", "teacher_logp", "advantages"),
    paper="SDAR, ms-swift", confidence="A", products=3,
)  # fmt: skip
