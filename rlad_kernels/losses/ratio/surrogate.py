"""The clipped surrogate on sampled tokens, min(ρA, clip(ρ)A): what the ratio methods are made of."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlad_kernels.backends.contract import on_cpu
from rlad_kernels.core.check import is_number, is_pair
from rlad_kernels.core.modes import autograd_inside, numbers, ordinary, transformed
from rlad_kernels.losses.ratio.kl import KL_ESTIMATORS, NO_KL, Reference

RATIO_METRICS = ("clip_frac_low", "clip_frac_high", "ratio_mean", "kl_old", "kl_teacher", "kl_ref", "invalid_teacher")
NO_CLIP = (1.0, math.inf)


class Anchor(NamedTuple):
    """TRRD's mixture: log r = α(s − o) + (1 − α)·clamp(s − t, ±c)."""

    teacher_logp: Tensor
    alpha: float
    clamp: float | None = None


def ratio_tokens(
    logp: Tensor,
    old_logp: Tensor,
    teacher_logp: Tensor | None,
    advantages: Tensor,
    ref_logp: Tensor | None,
    alpha: float,
    clip_low: float,
    clip_high: float,
    teacher_clamp: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: str,
) -> tuple[Tensor, Tensor]:
    """Per-token −min(rÂ, clip(r)Â) + kl_coef·KL, log r = α(s−o) + (1−α)·clamp(s−t, ±c); and the metrics ``(7, …)``."""
    old_gap = logp - old_logp
    log_r, teacher_gap = old_gap, torch.zeros_like(logp)
    invalid = torch.zeros_like(logp, dtype=torch.bool)
    if teacher_logp is not None:
        invalid = ~teacher_logp.isfinite()
        teacher_gap = torch.where(invalid, 0, logp - torch.where(invalid, 0, teacher_logp))
        clamped = teacher_gap.clamp(-teacher_clamp, teacher_clamp)
        # an anchor of weight 0 must not bring in 0·(−∞)
        mixed = (alpha * old_gap if alpha else 0) + ((1 - alpha) * clamped if alpha < 1 else 0)
        log_r = torch.where(invalid, old_gap, mixed)
    r = log_r.detach().exp()
    high = (advantages > 0) & (r > 1 + clip_high)
    low = (advantages < 0) & (r < 1 - clip_low)
    over = (advantages < 0) & (r > dual_clip) if dual_clip else torch.zeros_like(high)
    low_bound, dual_bound = torch.full_like(r, 1 - clip_low), torch.full_like(r, dual_clip)
    bound = torch.where(high, 1 + clip_high, torch.where(low, low_bound, dual_bound))
    live = (advantages != 0) & ~(high | low | over)
    loss = torch.where(live, -advantages * torch.where(live, log_r, 0).exp(), torch.where(advantages == 0, 0, -advantages * bound))
    kl_ref = torch.zeros_like(logp)
    if ref_logp is not None:
        kl_ref = KL_ESTIMATORS[kl_estimator](logp - ref_logp)
        loss = loss + kl_coef * kl_ref if kl_coef else loss
    rows = (low.to(r.dtype), high.to(r.dtype), r, old_gap.detach(), teacher_gap.detach(), kl_ref.detach(), invalid.to(r.dtype))
    return loss, torch.stack(rows)


def clipped_ratio_cpu(
    logp: Tensor,
    old_logp: Tensor,
    teacher_logp: Tensor | None,
    advantages: Tensor,
    ref_logp: Tensor | None,
    numbers: Tensor,
    kl_estimator: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements ``rlad::clipped_ratio`` on CPU: the per-token loss, its derivative (0 in inference mode) and the metrics."""
    options: tuple[Any, ...] = (*numbers.tolist(), kl_estimator)
    rest = (ordinary(old_logp), ordinary(teacher_logp), ordinary(advantages), ordinary(ref_logp))
    if torch.is_inference_mode_enabled():
        loss, metrics = ratio_tokens(logp, *rest, *options)
        return loss, torch.zeros_like(logp), metrics
    with autograd_inside():
        s = ordinary(logp).detach().requires_grad_()
        loss, metrics = ratio_tokens(s, *rest, *options)
        (d_logp,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), d_logp, metrics


on_cpu("clipped_ratio", clipped_ratio_cpu)


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    clip: tuple[float, float] | None,
    dual_clip: float | None = None,
    *,
    anchor: Anchor | None = None,
    ref_logp: Tensor | None = None,
    reference: Reference = NO_KL,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The per-token loss and its metrics, on whichever backend the tensors' device has; all tensors ``(N,)``."""
    teacher_logp, alpha, clamp = anchor or (None, 1.0, None)
    low, high = NO_CLIP if clip is None else clip
    tensors = (logp, old_logp, teacher_logp, advantages.to(logp.dtype), ref_logp if reference.plain else None)
    outside = ref_logp is not None and not reference.plain  # its KL is added to what the kernel gives
    coef = 0.0 if outside else reference.coef
    options = (alpha, low, high, math.inf if clamp is None else clamp, dual_clip or 0.0, coef)
    if transformed(*tensors):
        loss, rows = ratio_tokens(*tensors, *options, reference.estimator)
    else:
        loss, _, rows = torch.ops.rlad.clipped_ratio(*tensors, numbers(*options), reference.estimator)
    absent = {"kl_teacher", "invalid_teacher"} if teacher_logp is None else set()
    absent |= {"kl_ref"} if ref_logp is None or outside else set()
    metrics = {name: row for name, row in zip(RATIO_METRICS, rows, strict=True) if name not in absent}
    metrics = {**metrics, "ratio_max": metrics["ratio_mean"]}
    return reference.add(loss, metrics, logp, ref_logp, old_logp) if outside else (loss, metrics)


def check_clip(name: str, clip: tuple[float, float] | None, dual_clip: float | None = None) -> None:
    """Raise a ValueError that names the option, what came and what was wanted."""
    if clip is not None and not (is_pair(clip) and 0 <= clip[0] <= 1 and clip[1] >= 0):
        raise ValueError(f"{name}: clip must be (low, high) with 0 <= low <= 1 and high >= 0, or None, got {clip!r}")
    if dual_clip is not None and not (is_number(dual_clip) and dual_clip > 1):
        raise ValueError(f"{name}: dual_clip must be greater than 1 or None, got {dual_clip!r}")
