"""RLAD's objective in one sweep: TRRD on the sampled tokens plus a truncated KL to the teacher's top-K (arXiv 2602.22495)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers, needs
from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.registry import register
from rlad_kernels.core.types import LossOutput, TokenScores, TopK
from rlad_kernels.engine.call import check_states, target_shape
from rlad_kernels.linear.loss import fuse
from rlad_kernels.losses.ratio.surrogate import check_ratio_options, per_token, ratio_loss_tokens
from rlad_kernels.losses.support.topk_kl import check_topk_options, teacher_rows, topk_kl_loss_tokens
from rlad_kernels.losses.support.topk_terms import KLOptions

_TOPK_INPUTS = ("ids", "topk_teacher_logp", "teacher_tail", "topk_kl_coef", "scale", *KLOptions._fields)


@register("rlad")
def rlad_tokens(scores: TokenScores, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """TRRD token loss + topk_kl_coef·scale·truncated KL, and the metrics of both; all tensors ``(N,)`` or ``(N, K)``."""
    topk = {k: inputs.pop(k) for k in _TOPK_INPUTS if k in inputs}
    loss, metrics = ratio_loss_tokens(scores.logp, **inputs)
    if topk:
        coef, teacher_logp = topk.pop("topk_kl_coef"), topk.pop("topk_teacher_logp")
        assert scores.topk_logp is not None
        kl, more = topk_kl_loss_tokens(
            scores.topk_logp, teacher_logp=teacher_logp, tail_logp=scores.tail_logp, entropy=scores.entropy, **topk
        )
        invalid = torch.maximum(metrics["invalid_teacher"], more.pop("invalid_teacher"))
        loss, metrics = loss + coef * kl, {**metrics, **more, "invalid_teacher": invalid}
    if scores.entropy is not None:
        metrics["entropy"] = scores.entropy
    return loss, metrics


def rlad_loss(
    hidden: Tensor, head: LMHead, target: Tensor, *, old_logp: Tensor, advantages: Tensor, teacher_logp: Tensor | None = None,
    teacher: TopK | None = None, topk_kl_coef: float | None = None, mask: Tensor | None = None, filter_eps: float = 0.0,
    alpha: float = 0.5, clip: tuple[float, float] = (0.2, 0.2), teacher_clamp: float | None = None, dual_clip: float | None = None,
    ref_logp: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3", direction: str = "reverse",
    normalize: str = "both", scale: float = 1.0, reduction: str = "seq-mean-token-mean", seq_ids: Tensor | None = None,
    denominator: float | Tensor | None = None, beta: float = 0.5, log_ratio_clamp: float | None = None,
    logp_floor: float | None = None, clamp_gradient: str = "kill", loss_min: float | None = None, loss_max: float | None = None,
    outside_logp: float | None = None,
) -> LossOutput:  # fmt: skip
    """TRRD + topk_kl_coef × truncated KL to the teacher, from hidden states, in one sweep (RLAD, arXiv 2602.22495).

    Args:
        hidden, head, target, mask: as in :func:`linear_logp`.
        old_logp, advantages, alpha, clip, teacher_clamp, dual_clip, ref_logp, kl_coef, kl_estimator: as in :func:`trrd_loss`.
        teacher_logp: teacher's log-probs of the targets; defaults to ``teacher.target_logp``.
        teacher: TopK of the teacher (:func:`linear_topk`); adds the truncated KL of :func:`topk_kl_loss` on its support.
        topk_kl_coef: factor on that term; required when ``teacher`` is given.
        direction, normalize, scale, beta, log_ratio_clamp, logp_floor, clamp_gradient, loss_min, loss_max, outside_logp: as in
            :func:`topk_kl_loss`; the student's tail mass and entropy come from the sweep.
        filter_eps: as in :func:`fused_linear_loss`.
        reduction, seq_ids, denominator: as in :func:`grpo_loss`, one reduction for both terms.

    Returns:
        LossOutput as of :func:`fused_linear_loss`, with the metrics of both terms and ``entropy``.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "rlad_loss"
    check_ratio_options(name, alpha, clip, teacher_clamp, dual_clip, ref_logp, kl_coef, kl_estimator)
    needs(name, old_logp=old_logp, advantages=advantages)
    check_states(name, hidden, head)
    target_shape(name, hidden, target)
    like = torch.empty(target.shape, dtype=acc_dtype(hidden.dtype), device=head.weight.device)
    if teacher_logp is None:
        teacher_logp = None if teacher is None else teacher.target_logp
        if teacher_logp is None:
            raise ValueError(f"{name}: teacher_logp is None; pass it, or a teacher with target_logp (linear_topk(…, target=…))")
    tensors = {"old_logp": old_logp, "advantages": advantages, "teacher_logp": teacher_logp, "ref_logp": ref_logp}
    inputs: dict[str, Any] = {k: per_token(name, k, x, like) for k, x in tensors.items() if x is not None}
    inputs |= {"alpha": alpha, "clip_low": clip[0], "clip_high": clip[1], "teacher_clamp": teacher_clamp}
    inputs |= {"dual_clip": dual_clip, "kl_coef": kl_coef, "kl_estimator": kl_estimator}
    if teacher is not None:
        if topk_kl_coef is None:
            raise ValueError(f"{name}: topk_kl_coef is required when teacher is given, got None")
        check_numbers(name, topk_kl_coef=topk_kl_coef, scale=scale)
        options = KLOptions(
            direction, normalize, beta, log_ratio_clamp, logp_floor, clamp_gradient, loss_min, loss_max, outside_logp
        )  # fmt: skip
        check_topk_options(name, teacher, options)
        rows = teacher_rows(name, teacher, like)
        rows["topk_teacher_logp"] = rows.pop("teacher_logp")
        inputs |= {**rows, "topk_kl_coef": topk_kl_coef, "scale": scale, **options._asdict()}
    elif topk_kl_coef is not None:
        raise ValueError(f"{name}: topk_kl_coef={topk_kl_coef!r} needs teacher, got None")
    return fuse(
        name, hidden, head, target, rlad_tokens, inputs=inputs, mask=mask, topk_ids=None if teacher is None else teacher.ids,
        filter_eps=filter_eps, reduction=reduction, seq_ids=seq_ids, denominator=denominator,
    )  # fmt: skip
