"""EOPD: the teacher's log-ratio as PPO advantage, and a forward KL where the teacher is uncertain (arXiv 2603.07079)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers, check_tensor, is_number, needs
from rlad_kernels.core.reduction import keep_mask, reduce, token_weights
from rlad_kernels.core.registry import add_method, register
from rlad_kernels.core.types import LossOutput, TokenScores, TopK
from rlad_kernels.losses.ratio.surrogate import check_ratio_options, per_token, ratio_loss_tokens
from rlad_kernels.losses.support.topk_kl import check_support, flat_kept, student_slots, teacher_rows, topk_kl_loss_tokens


def eopd_tokens(
    logp: Tensor, topk_logp: Tensor, *, old_logp: Tensor, target_teacher_logp: Tensor, teacher_entropy: Tensor, ids: Tensor,
    teacher_logp: Tensor, teacher_tail: Tensor | None = None, entropy_threshold: float = 0.8, kl_coef: float = 1.0,
    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """−min(rÂ, clip(r)Â) + kl_coef·1[H_T > τ]·Σ_S p̃(log p̃ − log q), Â = t − o, per token; metrics of both."""
    finite = target_teacher_logp.isfinite()
    advantages = torch.where(finite, torch.where(finite, target_teacher_logp, 0) - old_logp, 0)
    clip = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    loss, metrics = ratio_loss_tokens(logp, old_logp=old_logp, advantages=advantages, **clip)
    kl, more = topk_kl_loss_tokens(topk_logp, ids=ids, teacher_logp=teacher_logp, direction="forward", normalize="teacher")
    more["invalid_teacher"] = torch.maximum(more["invalid_teacher"], (~finite).to(loss.dtype))
    return loss + torch.where(teacher_entropy > entropy_threshold, kl_coef * kl, 0), {**more, **metrics}


@register("eopd")
def eopd_scores(scores: TokenScores, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`eopd_loss` as a token loss; ``inputs`` as of :func:`eopd_tokens`, the student's side from the sweep."""
    assert scores.topk_logp is not None
    return eopd_tokens(scores.logp, scores.topk_logp, **inputs)


def eopd_loss(
    logp: Tensor, topk_logp: Tensor, old_logp: Tensor, teacher: TopK, mask: Tensor | None = None, *,
    entropy_threshold: float = 0.8, kl_coef: float = 1.0, clip: tuple[float, float] = (0.2, 0.2), dual_clip: float | None = None,
    reduction: str = "token-mean", seq_ids: Tensor | None = None, denominator: float | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """−min(rÂ, clip(r, 1±ε)Â) + 1[H_T > τ]·Σ_S p̃(log p̃ − log q), Â = t − o, r = e^{s−o} (EOPD, arXiv 2603.07079).

    p̃ is the teacher renormalised over its top-K (16 in the paper), q the student's full softmax, not renormalised; H_T the
    teacher's entropy over the whole vocabulary. The paper's Eq. 4 is ``seq-mean-token-mean``, its Algorithm 1 ``token-mean``.

    Args:
        logp: student log-probs s of the sampled tokens ``(…)``, in nats.
        topk_logp: student log-probs ``(…, K)`` at ``teacher.ids``; with ``logp`` what receives gradient.
        old_logp: log-probs o of the policy that sampled.
        teacher: ``linear_topk(hidden, head, 16, target=tokens, entropy=True)``; a non-finite ``target_logp`` has advantage 0
            and counts in ``invalid_teacher``, an entropy of NaN adds no KL.
        mask: bool or 0/1 ``(…)``; None is all.
        entropy_threshold: τ in nats.
        kl_coef: factor on the forward KL; 1 in the paper.
        clip, dual_clip, reduction, seq_ids, denominator: as in :func:`grpo_loss`.

    Returns:
        LossOutput. Metrics: those of :func:`grpo_loss` and :func:`topk_kl_loss`.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "eopd_loss"
    check_ratio_options(name, 1.0, clip, None, dual_clip, None, 0.0, "k3")
    check_support(name, teacher)
    topk_logp = student_slots(name, "topk_logp", topk_logp, teacher)
    like = topk_logp[..., 0].detach()
    needs(name, old_logp=old_logp)
    check_numbers(name, kl_coef=kl_coef)
    if not is_number(entropy_threshold):
        raise ValueError(f"{name}: entropy_threshold must be a number, got {entropy_threshold!r}")
    check_tensor(name, "logp", logp)
    if logp.shape != like.shape:
        raise ValueError(f"{name}: logp has shape {tuple(logp.shape)}, wanted {tuple(like.shape)}")
    rows = teacher_rows(name, teacher, like)
    rows |= {"logp": logp.to(like.dtype), "topk_logp": topk_logp, "old_logp": per_token(name, "old_logp", old_logp, like)}
    for argument, key, x in (
        ("target_logp", "target_teacher_logp", teacher.target_logp), ("entropy", "teacher_entropy", teacher.entropy),
    ):  # fmt: skip
        if x is None:
            raise ValueError(f"{name}: teacher.{argument} is None; linear_topk(…, target=…, entropy=True) gives it")
        rows[key] = per_token(name, f"teacher.{argument}", x, like)
    keep = keep_mask(name, mask, like)
    loss, metrics = eopd_tokens(
        **flat_kept(keep, rows), entropy_threshold=entropy_threshold, kl_coef=kl_coef, clip_low=clip[0], clip_high=clip[1],
        dual_clip=dual_clip,
    )  # fmt: skip
    weights = token_weights(name, keep, reduction, seq_ids, denominator, like.dtype)
    return reduce(loss.view_as(like), weights, keep, {k: x.view_as(like) for k, x in metrics.items()})


add_method(
    "eopd", "top-k", eopd_loss, formula="−min(rÂ, clip(r, 1−ε, 1+ε)Â) + 1[H_T > τ]·Σ_S p̃(log p̃ − log q), Â = t − o",
    needs=("old_logp", "teacher"), paper="arXiv 2603.07079", confidence="A", products=3,
    note="q is not renormalised. The paper's Eq. 4 averages over sequences, its Algorithm 1 over tokens, as here.",
)  # fmt: skip
