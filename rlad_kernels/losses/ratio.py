"""Clipped-ratio losses on sampled tokens: GRPO/PPO, and TRRD with its teacher anchor (RLAD, arXiv 2602.22495)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlad_kernels.losses.reduction import LossOutput, keep_mask, reduce, token_weights
from rlad_kernels.ops import autograd_inside
from rlad_kernels.registry import add_method

# Estimators of KL(π_θ‖π_ref) on a sampled token, x = s − ref. Value and gradient as they are backpropagated: k3 and k5
# have the gradient of the *forward* KL in expectation; k1's expected gradient is 0, so it is a metric only.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: x.detach(),
    "k2": lambda x: x.square() / 2,
    "k3": lambda x: torch.expm1(-x) + x,
    "k3+": lambda x: x.square() / 2 + (torch.expm1(-x) + x - x.square() / 2).detach(),
    "k4": lambda x: x.detach() * (x - x.detach()).exp(),
    "k5": lambda x: -x * torch.exp(-x).detach() + (x - x.detach()),
}
RATIO_METRICS = ("clip_frac_low", "clip_frac_high", "ratio_mean", "kl_old", "kl_teacher", "kl_ref", "invalid_teacher")


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


def clipped_ratio_cpu(logp: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    """Implements ``rlad::clipped_ratio`` on CPU: the per-token loss, its derivative and the metrics."""
    with autograd_inside():
        s = logp.detach().requires_grad_()
        loss, metrics = ratio_tokens(s, *args)  # type: ignore[arg-type]
        (d_logp,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), d_logp, metrics


def ratio_loss_tokens(
    logp: Tensor, *, old_logp: Tensor, advantages: Tensor, teacher_logp: Tensor | None = None, alpha: float = 1.0,
    clip_low: float = 0.2, clip_high: float = 0.2, teacher_clamp: float | None = None, dual_clip: float | None = None,
    ref_logp: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The per-token loss and its metrics, on whichever backend the tensors' device has; all tensors ``(N,)``."""
    loss, _, rows = torch.ops.rlad.clipped_ratio(
        logp, old_logp, teacher_logp, advantages, ref_logp, alpha, clip_low, clip_high,
        math.inf if teacher_clamp is None else teacher_clamp, dual_clip or 0.0, kl_coef, kl_estimator,
    )  # fmt: skip
    absent = {"kl_teacher", "invalid_teacher"} if teacher_logp is None else set()
    absent |= {"kl_ref"} if ref_logp is None else set()
    metrics = {name: row for name, row in zip(RATIO_METRICS, rows, strict=True) if name not in absent}
    return loss, {**metrics, "ratio_max": metrics["ratio_mean"]}


def check_ratio_options(
    name: str, alpha: float, clip: tuple[float, float], teacher_clamp: float | None, dual_clip: float | None,
    ref_logp: Tensor | None, kl_coef: float, kl_estimator: str,
) -> None:  # fmt: skip
    """Raise a ValueError that names the option, what came and what was wanted."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"{name}: alpha must be in [0, 1], got {alpha!r}")
    if not (isinstance(clip, tuple | list) and len(clip) == 2 and 0 <= clip[0] <= 1 and clip[1] >= 0):
        raise ValueError(f"{name}: clip must be (low, high) with 0 <= low <= 1 and high >= 0, got {clip!r}")
    if teacher_clamp is not None and not teacher_clamp > 0:
        raise ValueError(f"{name}: teacher_clamp must be positive or None, got {teacher_clamp!r}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"{name}: dual_clip must be greater than 1 or None, got {dual_clip!r}")
    if kl_coef and ref_logp is None:
        raise ValueError(f"{name}: kl_coef={kl_coef!r} needs ref_logp, got None")
    if kl_estimator == "k1" and kl_coef:
        raise ValueError(
            f"{name}: kl_estimator 'k1' has zero expected gradient when backpropagated; use one of {[*KL_ESTIMATORS][1:]}"
        )
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"{name}: kl_estimator must be one of {[*KL_ESTIMATORS]}, got {kl_estimator!r}")


def per_token(name: str, argument: str, x: Tensor, like: Tensor) -> Tensor:
    """``x`` detached, in the shape and dtype of the log-probs ``like``; ``(B,)`` advantages spread over ``(B, T)``."""
    if argument == "advantages" and x.dim() == 1 and like.dim() == 2 and x.shape[0] == like.shape[0]:
        x = x.unsqueeze(1).expand_as(like)
    if x.device != like.device:
        raise ValueError(f"{name}: {argument} is on {x.device}, wanted {like.device}; all tensors must share a device")
    if x.shape != like.shape:
        wanted = f"{tuple(like.shape)}" + (f" or ({like.shape[0]},)" if argument == "advantages" and like.dim() == 2 else "")
        raise ValueError(f"{name}: {argument} has shape {tuple(x.shape)}, wanted {wanted}")
    return x.detach().to(like.dtype)


def _ratio_loss(
    name: str, logp: Tensor, tensors: dict[str, Tensor | None], mask: Tensor | None, clip: tuple[float, float], reduction: str,
    seq_ids: Tensor | None, denominator: float | Tensor | None, **options: object,
) -> LossOutput:  # fmt: skip
    logp = logp if logp.dtype == torch.float64 else logp.float()
    keep = keep_mask(name, mask, logp)
    given = {k: per_token(name, k, x, logp) for k, x in tensors.items() if x is not None}
    # Whatever sits at masked tokens must not matter, NaN included: every input is replaced there, not multiplied.
    flat = {k: torch.where(keep, x, 0).flatten() for k, x in {"logp": logp, **given}.items()}
    loss, metrics = ratio_loss_tokens(**flat, clip_low=clip[0], clip_high=clip[1], **options)  # type: ignore[arg-type]
    weights = token_weights(name, keep, reduction, seq_ids, denominator, logp.dtype)
    return reduce(loss.view_as(logp), weights, keep, {k: x.view_as(logp) for k, x in metrics.items()})


def grpo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, *, clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None, ref_logp: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3",
    reduction: str = "token-mean", seq_ids: Tensor | None = None, denominator: float | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """GRPO/PPO clipped surrogate: −min(rÂ, clip(r, 1−ε_low, 1+ε_high)Â) with r = exp(s − o) (arXiv 2402.03300).

    Args:
        logp: current log-probs s in nats, ``(B, T)`` or packed ``(N,)``; the only input that receives gradient.
        old_logp: log-probs o of the policy that sampled, same shape.
        advantages: ``(B,)`` or ``(B, T)`` for ``(B, T)`` log-probs; ``(N,)`` packed.
        mask: bool or 0/1 in the log-probs' shape; None is all.
        clip: (ε_low, ε_high).
        dual_clip: c > 1; for Â < 0 the token loss is min(PPO loss, −c·Â).
        ref_logp, kl_coef, kl_estimator: adds kl_coef × estimator (k2, k3, k3+, k4, k5) of KL(π‖π_ref) to each token.
            k3 and k5 have the forward KL's expected gradient; k1 raises, its expected gradient is 0.
        reduction: ``token-mean``, ``seq-mean-token-mean`` or ``seq-mean-token-sum``.
        seq_ids: ``(N,)`` non-decreasing ints, needed by the ``seq-`` reductions of packed tokens.
        denominator: replaces the last divisor (tokens or sequences).

    Returns:
        LossOutput. Metrics: clip_frac_low/high, ratio_mean, ratio_max, kl_old (mean of s − o), kl_ref.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    check_ratio_options("grpo_loss", 1.0, clip, None, dual_clip, ref_logp, kl_coef, kl_estimator)
    tensors = {"old_logp": old_logp, "advantages": advantages, "ref_logp": ref_logp}
    options = {"dual_clip": dual_clip, "kl_coef": kl_coef, "kl_estimator": kl_estimator}
    return _ratio_loss("grpo_loss", logp, tensors, mask, clip, reduction, seq_ids, denominator, **options)


def trrd_loss(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, *, alpha: float = 0.5,
    clip: tuple[float, float] = (0.2, 0.2), teacher_clamp: float | None = None, dual_clip: float | None = None,
    ref_logp: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3", reduction: str = "seq-mean-token-mean",
    seq_ids: Tensor | None = None, denominator: float | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """TRRD: the clipped surrogate with r = π/(π_old^α·π_T^{1−α}), log r = α(s−o) + (1−α)(s−t) (RLAD, arXiv 2602.22495).

    α = 1 is GRPO. With α < 1 the clip is live at the first step already: at α = .5, ε = .2, tokens with Â > 0 get no
    gradient where s − t > 0.365 nats, tokens with Â < 0 none where t − s > 0.446 nats.

    Args:
        teacher_logp: teacher's log-probs t of the same tokens; a non-finite value turns that token into α = 1 and counts
            in ``invalid_teacher``.
        alpha: weight of the old policy in the anchor, in [0, 1].
        teacher_clamp: c; s − t is clamped to [−c, c] first, and where that binds the token keeps α of its gradient.
        logp, old_logp, advantages, mask, clip, dual_clip, ref_logp, kl_coef, kl_estimator, reduction, seq_ids, denominator:
            as in :func:`grpo_loss`.

    Returns:
        LossOutput. Metrics: those of :func:`grpo_loss`, kl_teacher (mean of s − t) and invalid_teacher (fraction).

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    if teacher_logp is None:
        raise ValueError("trrd_loss: teacher_logp is None, wanted a tensor in logp's shape (without a teacher: grpo_loss)")
    check_ratio_options("trrd_loss", alpha, clip, teacher_clamp, dual_clip, ref_logp, kl_coef, kl_estimator)
    tensors = {"old_logp": old_logp, "teacher_logp": teacher_logp, "advantages": advantages, "ref_logp": ref_logp}
    options = {"dual_clip": dual_clip, "kl_coef": kl_coef, "kl_estimator": kl_estimator}
    return _ratio_loss(
        "trrd_loss", logp, tensors, mask, clip, reduction, seq_ids, denominator, alpha=alpha, teacher_clamp=teacher_clamp, **options
    )


add_method(
    "grpo", "ratio", grpo_loss, formula="−min(rÂ, clip(r, 1−ε, 1+ε)Â), r = exp(s − o)", needs=("old_logp", "advantages"),
    paper="arXiv 2402.03300", confidence="A", products=3,
)  # fmt: skip
add_method(
    "trrd", "ratio", trrd_loss, formula="−min(rÂ, clip(r, 1−ε, 1+ε)Â), log r = α(s − o) + (1 − α)(s − t)",
    needs=("old_logp", "teacher_logp", "advantages"), paper="arXiv 2602.22495", confidence="B", products=3,
)  # fmt: skip
