"""RLSD: the teacher redistributes a response's advantage over its tokens and never turns its sign (arXiv 2609.04108, ms-swift)."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from rlad_kernels.core.check import is_number, needs
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.sampled import ClippedOptions, clipped_loss, on_sampled, teacher_gap
from rlad_kernels.losses.ratio.surrogate import ratio_loss_tokens


@on_sampled("rlsd")
def rlsd_tokens(
    logp: Tensor, *, old_logp: Tensor, advantages: Tensor, teacher_logp: Tensor, mix: float = 1.0, weight_clip: float = 0.2,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped surrogate with A = Â·((1 − λ) + λ·clip(e^{sign(Â)(t − s)}, 1 ± ε_w)); all tensors ``(N,)``."""
    gap, found = teacher_gap(logp, teacher_logp)
    weight = (1 - mix) + mix * (advantages.sign() * gap).exp().clamp(1 - weight_clip, 1 + weight_clip)
    loss, metrics = ratio_loss_tokens(logp, old_logp=old_logp, advantages=advantages * weight, **options)
    return loss, {**metrics, **found}


def rlsd_loss(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, *, mix: float = 1.0,
    weight_clip: float = 0.2, **options: Unpack[ClippedOptions],
) -> LossOutput:  # fmt: skip
    """RLSD: −min(rA, clip(r)A), A = Â·sg[(1 − λ) + λ·clip(e^{sign(Â)(t − s)}, 1 ± ε_w)] (as in arXiv 2609.04108 and ms-swift).

    Args:
        logp, old_logp, advantages, mask: as in :func:`grpo_loss`.
        teacher_logp: log-probs t of the teacher, usually the policy itself shown the answer; a non-finite value leaves Â as it
            is and counts in ``invalid_teacher``.
        mix: λ in [0, 1]; 0 is GRPO.
        weight_clip: ε_w in [0, 1].
        options: those of :func:`grpo_loss`.

    Returns:
        LossOutput. Metrics: those of :func:`grpo_loss`, kl_teacher (mean of s − t) and invalid_teacher.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "rlsd_loss"
    needs(name, old_logp=old_logp, teacher_logp=teacher_logp, advantages=advantages)
    for option, value in {"mix": mix, "weight_clip": weight_clip}.items():
        if not (is_number(value) and 0 <= value <= 1):
            raise ValueError(f"{name}: {option} must be in [0, 1], got {value!r}")
    tensors = {"old_logp": old_logp, "teacher_logp": teacher_logp, "advantages": advantages}
    return clipped_loss(name, rlsd_tokens, logp, tensors, mask, {"mix": mix, "weight_clip": weight_clip}, **options)


add_method(
    "rlsd", "ratio", rlsd_loss, formula="−min(rA, clip(r)A), A = Â·sg[clip(e^{sign(Â)(t − s)}, 1 ± .2)]",
    needs=("old_logp", "teacher_logp", "advantages"), paper="arXiv 2609.04108", confidence="A", products=3,
)  # fmt: skip
