"""The clipped surrogate on sampled tokens, min(ρA, clip(ρ)A), with its KL estimators: what the ratio methods are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rlad_kernels.backends.contract import on_cpu
from rlad_kernels.core.check import check_numbers, check_tensor, is_number
from rlad_kernels.core.modes import autograd_inside, numbers, ordinary, transformed
from rlad_kernels.losses.ratio.rollout import weigh

# Estimators of KL(π_θ‖π_ref) on a sampled token, x = s − ref. Value and gradient as they are backpropagated, expected on-policy:
# k2, k3+, k3++ and k4 have the reverse KL's gradient, k3 and k5 the *forward* KL's; k1's is 0, so it is a metric only.
# Backpropagating k1 is a mistake seen in the wild: whatever the reference, nothing but noise is left of it in the gradient.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: x.detach(),
    "k2": lambda x: x.square() / 2,
    "k3": lambda x: torch.expm1(-x) + x,
    "k3+": lambda x: x.square() / 2 + (torch.expm1(-x) + x - x.square() / 2).detach(),
    "k3++": lambda x: x.square() / 2 + (torch.expm1(-x) + x - x.square() / 2).detach(),  # k3·e^{x − sg x}: k3 + k3' = x
    "k4": lambda x: x.detach() * (x - x.detach()).exp(),
    "k5": lambda x: -x * torch.exp(-x).detach() + (x - x.detach()),
}
SPREAD = ("advantages", "correct", "group_ids")  # one value a sequence will do
RATIO_METRICS = ("clip_frac_low", "clip_frac_high", "ratio_mean", "kl_old", "kl_teacher", "kl_ref", "invalid_teacher")


class WithSlope(torch.autograd.Function):
    """``value`` with the derivative ``slope`` by ``x``, for products that autograd would take apart into 0·∞ or ∞ − ∞."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return times(grad, ctx.saved_tensors[0]), None, None


def times(a: Tensor, b: Tensor) -> Tensor:
    """a·b with 0·∞ = 0."""
    return torch.where((a == 0) | (b == 0), 0, a * b)


def weighted_slope(log_w: Tensor, x: Tensor) -> Tensor:
    """w·(1 − e^{−x}), the slope of w·k3(x), from log w: w and e^{−x} alone may leave float32 where their product does not."""
    return torch.where(x >= 0, times(log_w.exp(), -torch.expm1(-x)), times((log_w - x).exp(), torch.expm1(x)))


def ratio_tokens(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor | None, advantages: Tensor, ref_logp: Tensor | None, alpha: float,
    clip_low: float, clip_high: float, teacher_clamp: float, dual_clip: float, kl_coef: float, kl_estimator: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor | None, advantages: Tensor, ref_logp: Tensor | None, numbers: Tensor,
    kl_estimator: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements ``rlad::clipped_ratio`` on CPU: the per-token loss, its derivative (0 in inference mode) and the metrics."""
    options: tuple[Any, ...] = (*numbers.tolist(), kl_estimator)
    tensors = (logp, old_logp, teacher_logp, advantages, ref_logp)
    if torch.is_inference_mode_enabled():
        loss, metrics = ratio_tokens(*tensors, *options)
        return loss, torch.zeros_like(logp), metrics
    logp, *rest = tree_map_only(Tensor, ordinary, tensors)
    with autograd_inside():
        s = logp.detach().requires_grad_()
        loss, metrics = ratio_tokens(s, *rest, *options)
        (d_logp,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), d_logp, metrics


def ratio_loss_tokens(
    logp: Tensor, *, old_logp: Tensor, advantages: Tensor, teacher_logp: Tensor | None = None, alpha: float = 1.0,
    clip_low: float = 0.2, clip_high: float = 0.2, teacher_clamp: float | None = None, dual_clip: float | None = None,
    ref_logp: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3", **rollout: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The per-token loss and its metrics, on whichever backend the tensors' device has; all tensors ``(N,)``."""
    advantages, found = weigh(logp, old_logp, advantages, **rollout)
    tensors = (logp, old_logp, teacher_logp, advantages, ref_logp)
    clamp = math.inf if teacher_clamp is None else teacher_clamp
    options = (alpha, clip_low, clip_high, clamp, dual_clip or 0.0, kl_coef)
    if transformed(*tensors):
        loss, rows = ratio_tokens(*tensors, *options, kl_estimator)
    else:
        loss, _, rows = torch.ops.rlad.clipped_ratio(*tensors, numbers(*options), kl_estimator)
    absent = {"kl_teacher", "invalid_teacher"} if teacher_logp is None else set()
    absent |= {"kl_ref"} if ref_logp is None else set()
    metrics = {name: row for name, row in zip(RATIO_METRICS, rows, strict=True) if name not in absent}
    return loss, {**metrics, "ratio_max": metrics["ratio_mean"], **found}


def check_ratio_options(
    name: str, alpha: float, clip: tuple[float, float], teacher_clamp: float | None, dual_clip: float | None,
    ref_logp: Tensor | None, kl_coef: float, kl_estimator: str,
) -> None:  # fmt: skip
    """Raise a ValueError that names the option, what came and what was wanted."""
    check_anchor(name, alpha, teacher_clamp)
    check_clip(name, clip, dual_clip)
    check_reference(name, ref_logp, kl_coef, kl_estimator)


def check_anchor(name: str, alpha: float, teacher_clamp: float | None) -> None:
    """Raise a ValueError that names the option, what came and what was wanted."""
    if not (is_number(alpha) and 0 <= alpha <= 1):
        raise ValueError(f"{name}: alpha must be in [0, 1], got {alpha!r}")
    if teacher_clamp is not None and not (is_number(teacher_clamp) and teacher_clamp > 0):
        raise ValueError(f"{name}: teacher_clamp must be positive or None, got {teacher_clamp!r}")


def check_clip(name: str, clip: tuple[float, float], dual_clip: float | None) -> None:
    """Raise a ValueError that names the option, what came and what was wanted."""
    pair = isinstance(clip, tuple | list) and len(clip) == 2 and all(map(is_number, clip))
    if not (pair and 0 <= clip[0] <= 1 and clip[1] >= 0):
        raise ValueError(f"{name}: clip must be (low, high) with 0 <= low <= 1 and high >= 0, got {clip!r}")
    if dual_clip is not None and not (is_number(dual_clip) and dual_clip > 1):
        raise ValueError(f"{name}: dual_clip must be greater than 1 or None, got {dual_clip!r}")


def check_reference(name: str, ref_logp: Tensor | None, kl_coef: float, kl_estimator: str) -> None:
    """Raise a ValueError that names the option, what came and what was wanted."""
    check_numbers(name, kl_coef=kl_coef)
    check_kl(name, "kl_estimator", kl_estimator, kl_coef)
    if kl_coef and ref_logp is None:
        raise ValueError(f"{name}: kl_coef={kl_coef!r} needs ref_logp, got None")


def check_kl(name: str, argument: str, estimator: str, coef: float) -> None:
    """Raise a ValueError for an unknown estimator, or k1 with a coefficient."""
    if estimator == "k1" and coef:
        raise ValueError(
            f"{name}: {argument} 'k1' has zero expected gradient when backpropagated; use one of {[*KL_ESTIMATORS][1:]}"
        )
    if not isinstance(estimator, str) or estimator not in KL_ESTIMATORS:
        raise ValueError(f"{name}: {argument} must be one of {[*KL_ESTIMATORS]}, got {estimator!r}")


def add_kl(
    loss: Tensor, metrics: dict[str, Tensor], logp: Tensor, ref_logp: Tensor | None, kl_coef: float, kl_estimator: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The KL term of a token loss that does not go through ``rlad::clipped_ratio``."""
    if ref_logp is None:
        return loss, metrics
    kl = KL_ESTIMATORS[kl_estimator](logp - ref_logp)
    return loss + kl_coef * kl if kl_coef else loss, {**metrics, "kl_ref": kl.detach()}


def per_token(name: str, argument: str, x: Tensor, like: Tensor) -> Tensor:
    """``x`` detached, in the shape of the log-probs ``like``, floats in its dtype; ``(B,)`` of SPREAD over ``(B, T)``."""
    check_tensor(name, argument, x)
    spread = argument in SPREAD and like.dim() == 2
    if spread and x.dim() == 1 and x.shape[0] == like.shape[0]:
        x = x.unsqueeze(1).expand_as(like)
    if x.device != like.device:
        raise ValueError(f"{name}: {argument} is on {x.device}, wanted {like.device}; all tensors must share a device")
    if x.shape != like.shape:
        wanted = f"{tuple(like.shape)}" + (f" or ({like.shape[0]},)" if spread else "")
        raise ValueError(f"{name}: {argument} has shape {tuple(x.shape)}, wanted {wanted}")
    return x.detach() if argument == "group_ids" else x.detach().to(like.dtype)


on_cpu("clipped_ratio", clipped_ratio_cpu)
