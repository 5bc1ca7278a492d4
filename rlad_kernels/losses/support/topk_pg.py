"""Top-K distillation as a policy gradient: the divergence becomes a detached advantage in PPO's clipped ratio."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from rlad_kernels.core.check import needs, refuse_options
from rlad_kernels.core.reduction import keep_mask, reduce, token_weights
from rlad_kernels.core.registry import add_method, register
from rlad_kernels.core.types import LossOutput, TokenScores, TopK
from rlad_kernels.losses.ratio.sampled import clipped_loss
from rlad_kernels.losses.ratio.surrogate import check_ratio_options, per_token, ratio_loss_tokens
from rlad_kernels.losses.support.topk_kl import (
    check_support,
    flat_kept,
    kl_on_support,
    student_slots,
    teacher_rows,
    topk_kl_loss_tokens,
)
from rlad_kernels.losses.support.topk_terms import KLOptions, support

WEIGHTS = ("student", "teacher", "none")


class TruncatedOptions(TypedDict, total=False):
    """Options of a truncated KL that becomes another loss's advantage; meanings and defaults of :func:`topk_kl_loss`."""

    tail_logp: Tensor | None
    entropy: Tensor | None
    direction: str
    normalize: str
    scale: float
    beta: float
    log_ratio_clamp: float | None
    logp_floor: float | None
    clamp_gradient: str
    loss_min: float | None
    loss_max: float | None
    outside_logp: float | None


def topk_pg_tokens(
    topk_logp: Tensor, *, old_topk_logp: Tensor, ids: Tensor, teacher_logp: Tensor, teacher_tail: Tensor | None = None,
    weight: str = "student", renormalize: bool = True, clip_low: float = 0.2, clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Σ_S −min(r_v A_v, clip(r_v)A_v) per token, A_v = −w_v(log q_v − log p_v) of the old policy; tensors ``(N, K)``."""
    valid, invalid = support(ids, teacher_logp)
    valid = valid & old_topk_logp.isfinite()
    old, p = torch.where(valid, old_topk_logp, 0), torch.where(valid, teacher_logp, 0)
    by = {"student": old, "teacher": p, "none": torch.zeros_like(old)}[weight]
    by = torch.where(valid, by, -torch.inf)
    if renormalize:
        some = valid.any(1, keepdim=True)
        by = torch.where(some, torch.where(some, by, 0).log_softmax(1), by)
    advantages = torch.where(valid, (p - old) * by.exp(), 0)
    loss, metrics = ratio_loss_tokens(
        torch.where(valid, topk_logp, 0).flatten(), old_logp=old.flatten(), advantages=advantages.flatten(), clip_low=clip_low,
        clip_high=clip_high, dual_clip=dual_clip,
    )  # fmt: skip
    count = valid.sum(1).clamp_min(1)
    found = {k: torch.where(valid, x.view_as(valid), 0) for k, x in metrics.items()}
    means = {k: x.amax(1) if k.endswith("_max") else x.sum(1) / count for k, x in found.items()}
    return torch.where(valid, loss.view_as(valid), 0).sum(1), {**means, "invalid_teacher": invalid.to(loss.dtype)}


@register("topk_pg")
def topk_pg_scores(scores: TokenScores, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`topk_pg_loss` as a token loss; ``inputs`` as of :func:`topk_pg_tokens`, the student's side from the sweep."""
    assert scores.topk_logp is not None
    return topk_pg_tokens(scores.topk_logp, **inputs)


@register("topk_advantage")
def topk_advantage_scores(
    scores: TokenScores, *, old_logp: Tensor, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None,
    **topk: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """:func:`topk_advantage_loss` as a token loss; ``topk`` as of :func:`topk_kl_loss_tokens`."""
    assert scores.topk_logp is not None
    with torch.no_grad():
        kl, more = topk_kl_loss_tokens(scores.topk_logp, tail_logp=scores.tail_logp, entropy=scores.entropy, **topk)
    clip = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    loss, metrics = ratio_loss_tokens(scores.logp, old_logp=old_logp, advantages=-kl, **clip)
    return loss, {**more, **metrics}


def topk_pg_loss(
    topk_logp: Tensor, old_topk_logp: Tensor, teacher: TopK, mask: Tensor | None = None, *, weight: str = "student",
    renormalize: bool = True, clip: tuple[float, float] = (0.2, 0.2), dual_clip: float | None = None,
    reduction: str = "token-mean", seq_ids: Tensor | None = None, denominator: float | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """Σ_v −min(r_v A_v, clip(r_v)A_v), A_v = −w_v(log q_old,v − log p_v) detached, r_v = q_v/q_old,v (arXiv 2604.13016).

    Each candidate of the support is an action with a reward of its own. At the first step the gradient is Σ_v −A_v∇log q_v:
    with ``weight="student"`` and the whole vocabulary as support that of the reverse KL.

    Args:
        topk_logp: student log-probs ``(…, K)`` at ``teacher.ids``, in nats; the only input that receives gradient.
        old_topk_logp: those of the policy that the rewards are computed with; a non-finite slot is empty.
        teacher: the support and the teacher's log-probs there; thunlp/OPD takes the student's top-K by default
            (:func:`linear_support`), or :func:`union`, :func:`intersection`, :func:`symmetric_difference`.
        mask: bool or 0/1 ``(…)``; None is all.
        weight: w_v ∝ ``student`` q_old,v, ``teacher`` p_v, or ``none``: all alike.
        renormalize: weights sum to one over the support; False: the probabilities themselves (1 for ``none``), as for the
            symmetric difference.
        clip, dual_clip: as in :func:`grpo_loss`, per candidate.
        reduction, seq_ids, denominator: as in :func:`grpo_loss`.

    Returns:
        LossOutput. Metrics: those of :func:`grpo_loss`, means over each token's slots, and invalid_teacher.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "topk_pg_loss"
    check_ratio_options(name, 1.0, clip, None, dual_clip, None, 0.0, "k3")
    check_support(name, teacher)
    needs(name, old_topk_logp=old_topk_logp)
    if weight not in WEIGHTS:
        raise ValueError(f"{name}: weight must be one of {WEIGHTS}, got {weight!r}")
    topk_logp = student_slots(name, "topk_logp", topk_logp, teacher)
    like = topk_logp[..., 0].detach()
    rows = teacher_rows(name, teacher, like)
    rows |= {"topk_logp": topk_logp, "old_topk_logp": per_token(name, "old_topk_logp", old_topk_logp, topk_logp)}
    keep = keep_mask(name, mask, like)
    options = {"weight": weight, "renormalize": renormalize, "clip_low": clip[0], "clip_high": clip[1], "dual_clip": dual_clip}
    loss, metrics = topk_pg_tokens(**flat_kept(keep, rows), **options)  # type: ignore[arg-type]
    weights = token_weights(name, keep, reduction, seq_ids, denominator, like.dtype)
    return reduce(loss.view_as(like), weights, keep, {k: x.view_as(like) for k, x in metrics.items()})


def topk_advantage_loss(
    logp: Tensor, old_logp: Tensor, topk_logp: Tensor, teacher: TopK, mask: Tensor | None = None, *,
    clip: tuple[float, float] = (0.2, 0.2), dual_clip: float | None = None, reduction: str = "token-mean",
    seq_ids: Tensor | None = None, denominator: float | Tensor | None = None, **topk: Unpack[TruncatedOptions],
) -> LossOutput:  # fmt: skip
    """PPO's clipped loss on the sampled tokens with Â = −sg(truncated KL of the token) (verl's ``use_policy_gradient``).

    The KL itself is not backpropagated, it only lowers whatever was sampled where it is large. As such an advantage does not
    depend on which token was sampled, its expected on-policy gradient is **zero**; kept as published.

    Args:
        logp, old_logp, mask, clip, dual_clip, reduction, seq_ids, denominator: as in :func:`grpo_loss`, one shape ``(…)``.
        topk_logp, teacher: as in :func:`topk_kl_loss`; ``topk_logp`` receives no gradient.
        topk: the other options of :func:`topk_kl_loss`.

    Returns:
        LossOutput. Metrics of both.
    """
    name = "topk_advantage_loss"
    needs(name, topk_logp=topk_logp, old_logp=old_logp)
    unknown = [k for k in topk if k not in TruncatedOptions.__annotations__]
    if unknown:  # a look at signatures does not compile
        refuse_options(name, unknown)
    given: dict[str, Any] = {**topk}
    tail, entropy, scale = given.pop("tail_logp", None), given.pop("entropy", None), given.pop("scale", 1.0)
    with torch.no_grad():
        kl = kl_on_support(name, topk_logp, teacher, mask, tail, entropy, KLOptions(**given), scale, "token-mean", None, None)
    out = clipped_loss(
        name, ratio_loss_tokens, logp, {"old_logp": old_logp, "advantages": -kl.token_loss}, mask, {},
        clip=clip, dual_clip=dual_clip, reduction=reduction, seq_ids=seq_ids, denominator=denominator,
    )  # fmt: skip
    return out._replace(metrics={**kl.metrics, **out.metrics})


add_method(
    "thunlp_opd", "top-k", topk_pg_loss, formula="Σ_S −min(r_v A_v, clip(r_v)A_v), A_v = −q̂_old,v(log q_old,v − log p_v)",
    needs=("old_topk_logp", "teacher"), paper="arXiv 2604.13016", confidence="A", products=3,
)  # fmt: skip
add_method(
    "verl_topk_pg", "top-k", topk_advantage_loss, formula="−min(rÂ, clip(r)Â), Â = −sg(clip(Σ_S p(log p − log q), 0, 10))",
    needs=("old_logp", "teacher"), paper="verl trainer/distillation, use_policy_gradient", confidence="A", products=3,
    options={"direction": "forward", "normalize": "none", "logp_floor": -10.0, "loss_min": 0.0, "loss_max": 10.0},
)  # fmt: skip
