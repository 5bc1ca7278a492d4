"""The frame of a loss on sampled tokens: check, replace what is masked, flatten, call the method's tokens, reduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from rlad_kernels.core.check import check_tensor, refuse_options
from rlad_kernels.core.reduction import keep_mask, reduce, token_weights
from rlad_kernels.core.registry import register
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.rollout import TIS, Rollout, check_rollout
from rlad_kernels.losses.ratio.surrogate import check_clip, check_reference, per_token

Tokens = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class TokenOptions(TypedDict, total=False):
    """Options of every loss on sampled tokens, with the meanings and defaults of :func:`grpo_loss`."""

    ref_logp: Tensor | None
    kl_coef: float
    kl_estimator: str
    reduction: str
    seq_ids: Tensor | None
    denominator: float | Tensor | None


class SampledOptions(TokenOptions, total=False):
    """The same and those of the sampler's mismatch."""

    rollout_logp: Tensor | None
    rollout: Rollout | None


class ClippedOptions(SampledOptions, total=False):
    """The same and those of the clip; ``clip=None`` never clips."""

    clip: tuple[float, float] | None
    dual_clip: float | None


def on_sampled(name: str, *, rowwise: bool = True) -> Callable[[Tokens], Tokens]:
    """Register ``tokens(logp, **inputs) → (loss, metrics)`` as the token loss ``name`` of a fused sweep.

    ``fused_linear_loss(…, TOKEN_LOSSES[name], inputs=…)`` takes the public function's tensors and numbers under their names, with
    clip as clip_low and clip_high, and the fields of rollout as rollout_form, rollout_low, rollout_high and rollout_policy. Its
    options are not checked.
    """

    def add(tokens: Tokens) -> Tokens:
        @register(name, rowwise=rowwise)
        def token_loss(scores: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = tokens(scores.logp, **inputs)
            return loss, metrics if scores.entropy is None else {**metrics, "entropy": scores.entropy}

        return tokens

    return add


def accumulated(name: str, logp: Tensor, argument: str = "logp") -> Tensor:
    """Log-probs in the dtype that losses are computed in."""
    check_tensor(name, argument, logp)
    if not logp.is_floating_point():
        raise ValueError(f"{name}: {argument} must be floats, got {logp.dtype}")
    return logp if logp.dtype == torch.float64 else logp.float()


def sampled_loss(
    name: str, tokens: Tokens, logp: Tensor, tensors: Mapping[str, Tensor | None], mask: Tensor | None, options: Mapping[str, Any],
    /, *, ref_logp: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3", reduction: str = "token-mean",
    seq_ids: Tensor | None = None, denominator: float | Tensor | None = None, rollout_logp: Tensor | None = None,
    rollout: Rollout | None = None, **unknown: Any,
) -> LossOutput:  # fmt: skip
    """Reduce ``tokens(logp, **tensors, **options)``, all tensors ``(N,)``, for a public function ``name``.

    ``logp`` and ``tensors`` come in one shape ``(…)``, ``options`` as they go. The keywords are :class:`SampledOptions`.
    """
    if unknown:
        refuse_options(name, unknown)
    check_reference(name, ref_logp, kl_coef, kl_estimator)
    check_rollout(name, rollout, rollout_logp)
    logp = accumulated(name, logp)
    keep = keep_mask(name, mask, logp)
    tensors = {**tensors, "ref_logp": ref_logp, "rollout_logp": rollout_logp}
    given = {k: per_token(name, k, x, logp) for k, x in tensors.items() if x is not None}
    # Whatever sits at masked tokens must not matter, NaN included: every input is replaced there, not multiplied.
    flat = {k: torch.where(keep, x, 0).flatten() for k, x in {"logp": logp, **given}.items()}
    if rollout_logp is not None:
        options = {**options, **{f"rollout_{k}": v for k, v in (rollout or TIS)._asdict().items()}}
    loss, metrics = tokens(**flat, kl_coef=kl_coef, kl_estimator=kl_estimator, **options)
    weights = token_weights(name, keep, reduction, seq_ids, denominator, logp.dtype)
    return reduce(loss.view_as(logp), weights, keep, {k: x.view_as(logp) for k, x in metrics.items()})


def clipped_loss(
    name: str, tokens: Tokens, logp: Tensor, tensors: Mapping[str, Tensor | None], mask: Tensor | None, options: Mapping[str, Any],
    /, *, clip: tuple[float, float] | None = (0.2, 0.2), dual_clip: float | None = None, **shared: Unpack[SampledOptions],
) -> LossOutput:  # fmt: skip
    """:func:`sampled_loss` of tokens that have a clip; the keywords are :class:`ClippedOptions`."""
    clip = (1.0, math.inf) if clip is None else clip
    check_clip(name, clip, dual_clip)
    options = {**options, "clip_low": clip[0], "clip_high": clip[1], "dual_clip": dual_clip}
    return sampled_loss(name, tokens, logp, tensors, mask, options, **shared)


def reinforced(logp: Tensor, weight: Tensor) -> Tensor:
    """−sg[w]·s: REINFORCE; 0 where the weight is 0, whatever the log-prob. An infinite weight is the largest number."""
    largest = torch.finfo(weight.dtype).max
    weight = weight.detach().clamp(-largest, largest)
    return torch.where(weight == 0, 0, -weight * torch.where(weight == 0, 0, logp))


def ratio_metrics(logp: Tensor, old_logp: Tensor) -> dict[str, Tensor]:
    """ratio_mean, ratio_max and kl_old of a token loss that does not go through ``rlad::clipped_ratio``."""
    gap = (logp - old_logp).detach()
    r = gap.exp()
    return {"ratio_mean": r, "ratio_max": r, "kl_old": gap}


def teacher_gap(logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """d = sg[t − s], 0 where that is not finite, and the metrics kl_teacher (mean of s − t) and invalid_teacher."""
    gap = teacher_logp - logp.detach()
    gap = torch.where(gap.isfinite(), gap, 0)
    return gap, {"kl_teacher": -gap, "invalid_teacher": (~teacher_logp.isfinite()).to(gap.dtype)}
