"""GSPO: the clipped surrogate on a sequence's length-normalised ratio, and its token form (arXiv 2507.18071)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from rlad_kernels.core.check import needs
from rlad_kernels.core.reduction import keep_mask, sequence_index
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.rollout import weigh
from rlad_kernels.losses.ratio.sampled import ClippedOptions, accumulated, clipped_loss, on_sampled
from rlad_kernels.losses.ratio.sequences import sequence_mean
from rlad_kernels.losses.ratio.surrogate import add_kl, ratio_loss_tokens

LEVELS = ("sequence", "sequence-token")


@on_sampled("gspo", rowwise=False)
def gspo_tokens(
    logp: Tensor, *, old_logp: Tensor, advantages: Tensor, keep: Tensor, sequence: Tensor, level: str = "sequence",
    clip_low: float = 3e-4, clip_high: float = 4e-4, dual_clip: float | None = None, ref_logp: Tensor | None = None,
    kl_coef: float = 0.0, kl_estimator: str = "k3", **rollout: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped surrogate of each token's sequence ratio, and its metrics; all tensors ``(N,)``, ``sequence`` non-decreasing."""
    advantages, found = weigh(logp, old_logp, advantages, **rollout)
    log_ratio = sequence_mean(logp - old_logp, keep, sequence)
    if level == "sequence-token":
        log_ratio = log_ratio.detach() + (logp - logp.detach())
    loss, metrics = ratio_loss_tokens(
        log_ratio, old_logp=torch.zeros_like(log_ratio), advantages=advantages, clip_low=clip_low, clip_high=clip_high,
        dual_clip=dual_clip,
    )  # fmt: skip
    return add_kl(loss, {**metrics, **found}, logp, ref_logp, kl_coef, kl_estimator)


def gspo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, *, level: str = "sequence",
    **options: Unpack[ClippedOptions],
) -> LossOutput:  # fmt: skip
    """GSPO: −min(r_i Â, clip(r_i, 1−ε_low, 1+ε_high)Â), r_i = exp(mean over sequence i's kept tokens of s − o).

    Sequences are kept or clipped as a whole (with one Â a sequence), and all their tokens get the same gradient, through the mean.
    The ratio reads other rows, so that this loss runs on :func:`linear_logp`, not inside :func:`fused_linear_loss`, which raises.

    Args:
        logp, old_logp, advantages, mask: as in :func:`grpo_loss`.
        level: ``sequence``, or ``sequence-token`` (GSPO-token): the value of r_i with each token's own gradient,
            log r = sg[log r_i] + s − sg[s], for advantages that differ from token to token.
        options: as of :func:`grpo_loss`; unless given, ``clip`` is (3e-4, 4e-4) and ``reduction`` seq-mean-token-mean. Packed
            tokens always need ``seq_ids``.

    Returns:
        LossOutput. Metrics as of :func:`grpo_loss`, the ratio being the sequence's.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "gspo_loss"
    if level not in LEVELS:
        raise ValueError(f"{name}: level must be one of {LEVELS} (token level is grpo_loss), got {level!r}")
    needs(name, old_logp=old_logp, advantages=advantages)
    keep = keep_mask(name, mask, accumulated(name, logp))
    sequence = sequence_index(name, keep, "the ratio", options.get("seq_ids"))
    options.setdefault("clip", (3e-4, 4e-4))
    options.setdefault("reduction", "seq-mean-token-mean")
    given = {"keep": keep.flatten(), "sequence": sequence, "level": level}
    return clipped_loss(name, gspo_tokens, logp, {"old_logp": old_logp, "advantages": advantages}, mask, given, **options)


add_method(
    "gspo", "ratio", gspo_loss, formula="−min(r_i Â, clip(r_i, 1−3e-4, 1+4e-4)Â), r_i = exp(mean_t(s − o))",
    needs=("old_logp", "advantages"), paper="arXiv 2507.18071", confidence="B", products=4,
)  # fmt: skip
add_method(
    "gspo_token", "ratio", gspo_loss, formula="gspo with r_it = sg[r_i]·π/sg[π]", needs=("old_logp", "advantages"),
    paper="arXiv 2507.18071", confidence="B", products=4, options={"level": "sequence-token"},
)  # fmt: skip
