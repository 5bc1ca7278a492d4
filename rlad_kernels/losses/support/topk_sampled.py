"""A truncated KL whose tail is estimated on the sampled token (EMA-PG's top-K KL)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers, check_tensor, integers, is_number
from rlad_kernels.core.reduction import keep_mask, reduce, token_weights
from rlad_kernels.core.registry import add_method, register
from rlad_kernels.core.types import LossOutput, TokenScores, TopK
from rlad_kernels.losses.ratio.surrogate import WithSlope, per_token, times, weighted_slope
from rlad_kernels.losses.support.topk_kl import check_topk_options, flat_kept, student_slots, teacher_rows, topk_kl_loss_tokens
from rlad_kernels.losses.support.topk_terms import KLOptions


def sampled_tail_tokens(
    topk_logp: Tensor, logp: Tensor, *, target: Tensor, target_teacher_logp: Tensor, ids: Tensor, teacher_logp: Tensor,
    teacher_tail: Tensor | None = None, old_logp: Tensor | None = None, iw_low: float = 0.0, iw_high: float = math.inf,
    direction: str = "reverse", unbiased: bool = False, scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The KL's exact sum over S and an estimate of the rest on the sampled token where that lies outside S, per token."""
    head, metrics = topk_kl_loss_tokens(topk_logp, ids=ids, teacher_logp=teacher_logp, direction=direction, normalize="none")
    finite = target_teacher_logp.isfinite()
    outside = ~(ids == target.unsqueeze(1)).any(1)
    use = outside & finite
    s, t = torch.where(use, logp, 0), torch.where(use, target_teacher_logp, 0)
    log_w = torch.zeros_like(s)
    if old_logp is not None:
        log_w = torch.where(use, logp.detach() - old_logp, 0).clamp(*(math.log(x) if x else -math.inf for x in (iw_low, iw_high)))
    tail = sampled_kl(s, t, log_w.detach(), direction, unbiased)
    invalid = torch.maximum(metrics["invalid_teacher"], (outside & ~finite).to(head.dtype))
    return (head + torch.where(use, tail, 0)) * scale, {**metrics, "invalid_teacher": invalid}


def sampled_kl(s: Tensor, t: Tensor, log_w: Tensor, direction: str, unbiased: bool) -> Tensor:
    """w·x (k4; reverse) or −w·e^{−x}x (k5; forward), x = s − t, with the gradients :func:`topk_sampled_tail_loss` documents.

    In log space: w and e^{−x} alone may leave float32 where their product does not.
    """
    x, w = (s - t).detach(), log_w.exp()
    if direction == "reverse":
        return WithSlope.apply(s, times(w, x), times(w, 1 + x if unbiased else x))
    odds = (log_w - x).exp()  # w·p/q
    return WithSlope.apply(s, times(odds, -x), -odds if unbiased else weighted_slope(log_w, x))


@register("topk_sampled_tail")
def sampled_tail_scores(scores: TokenScores, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`topk_sampled_tail_loss` as a token loss; ``inputs`` as of :func:`sampled_tail_tokens`."""
    assert scores.topk_logp is not None
    return sampled_tail_tokens(scores.topk_logp, scores.logp, **inputs)


def topk_sampled_tail_loss(
    topk_logp: Tensor, logp: Tensor, target: Tensor, teacher: TopK, mask: Tensor | None = None, *, old_logp: Tensor | None = None,
    iw_clip: tuple[float, float] | None = None, direction: str = "reverse", unbiased: bool = False, scale: float = 1.0,
    reduction: str = "token-mean", seq_ids: Tensor | None = None, denominator: float | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """Σ_S q(log q − log p) + 1[y∉S]·sg(s − t)·exp(s − sg s): exact on S, sampled outside it (k4; EMA-PG).

    The value's expectation over y ~ q is the whole KL. The gradient's is not quite, as published: the head's carries +1 in
    u = q(log q/p + 1) on S, which only cancels against the same on the tail, and k4 has none there. What is left over is
    ∇Q_S, the student's mass on S, which the loss therefore lowers (by d/dz_v: q_v(1[v∈S] − Q_S)). ``unbiased=True`` leaves
    s − t undetached, same value, and the expected gradient is that of the whole KL.

    Args:
        topk_logp: student log-probs ``(…, K)`` at ``teacher.ids``, in nats.
        logp: student log-probs s of the sampled tokens ``(…)``; with ``topk_logp`` what receives gradient.
        target: the sampled tokens ``(…)``.
        teacher: S, with ``target_logp`` t. EMA-PG's S is the top-K of the *old student* for the reverse KL, of the teacher for
            the forward KL: ``linear_support(teacher_hidden, teacher_head, student_ids, target=target)``. A sampled token
            without a finite t has no tail term and counts in ``invalid_teacher``.
        mask: bool or 0/1 ``(…)``; None is all.
        old_logp, iw_clip: multiply the tail term by clamp(sg(e^{s−o}), low, high), the importance weight of tokens that
            an older policy sampled; without gradient. ``iw_clip=None`` with ``old_logp``: not clamped.
        direction: ``reverse``, or ``forward``: Σ_S p(log p − log q) + 1[y∉S]·[sg(e^{t−s})(t − s) + s − sg s] (k5), whose
            expected gradient also has ∇(1 − Q_S) too much; ``unbiased=True`` drops s − sg s.
        unbiased: see above.
        scale, reduction, seq_ids, denominator: as in :func:`topk_kl_loss`.

    Returns:
        LossOutput. Metrics: student_mass, teacher_mass, invalid_teacher.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "topk_sampled_tail_loss"
    if direction not in ("reverse", "forward"):
        raise ValueError(f"{name}: direction must be 'reverse' or 'forward', got {direction!r}")
    check_topk_options(name, teacher, KLOptions(direction, "none"))
    topk_logp = student_slots(name, "topk_logp", topk_logp, teacher)
    like = topk_logp[..., 0].detach()
    if teacher.target_logp is None:
        raise ValueError(f"{name}: teacher.target_logp is None; the teacher's log-probs of the sampled tokens are needed")
    check_numbers(name, scale=scale)
    pair = isinstance(iw_clip, tuple | list) and len(iw_clip) == 2 and all(map(is_number, iw_clip))
    if iw_clip is not None and (old_logp is None or not pair or not 0 <= iw_clip[0] < iw_clip[1]):
        got = "None" if old_logp is None else "a tensor"
        raise ValueError(f"{name}: iw_clip must be 0 <= low < high and goes with old_logp, got {iw_clip!r} and {got}")
    for argument, x in (("logp", logp), ("target", target)):
        check_tensor(name, argument, x)
        if x.shape != like.shape:
            raise ValueError(f"{name}: {argument} has shape {tuple(x.shape)}, wanted {tuple(like.shape)}")
    rows = teacher_rows(name, teacher, like)
    rows |= {"topk_logp": topk_logp, "logp": logp.to(like.dtype), "target": integers(name, "target", target)}
    rows["target_teacher_logp"] = per_token(name, "teacher.target_logp", teacher.target_logp, like)
    if old_logp is not None:
        rows["old_logp"] = per_token(name, "old_logp", old_logp, like)
    keep = keep_mask(name, mask, like)
    iw_low, iw_high = iw_clip or (0.0, math.inf)
    loss, metrics = sampled_tail_tokens(
        **flat_kept(keep, rows), iw_low=iw_low, iw_high=iw_high, direction=direction, unbiased=unbiased, scale=scale
    )
    weights = token_weights(name, keep, reduction, seq_ids, denominator, like.dtype)
    return reduce(loss.view_as(like), weights, keep, {k: x.view_as(like) for k, x in metrics.items()})


add_method(
    "ema_pg", "top-k", topk_sampled_tail_loss, formula="Σ_S q log(q/p) + 1[y∉S]·sg(s − t)·exp(s − sg s), S = old policy's top-K",
    needs=("target", "teacher"), paper="EMA-PG (LunjunZhang/ema-pg)", confidence="A", products=3,
    note="As published the expected gradient also lowers the student's mass on S; unbiased=True does not.",
)  # fmt: skip
