"""The eight losses of Liger's and TRL's GRPO on log-probs ``(B, T)``, of the library's own parts and reductions.

The clipped ones are its surrogate and not :class:`GRPO` or :class:`CISPO`, whose options are checked as those methods': here δ and
the upper bound may be below 1. Each formula is a loss's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlad_kernels.core.check import token_rows
from rlad_kernels.core.reduction import Reduction, reduce, sequence_index, token_weights
from rlad_kernels.core.types import LossOutput, TokenScores
from rlad_kernels.losses.ratio.kl import Reference, weighted_kl
from rlad_kernels.losses.ratio.sampled import ratio_metrics, reinforced
from rlad_kernels.losses.ratio.sapo import SAPO
from rlad_kernels.losses.ratio.sequences import sequence_mean
from rlad_kernels.losses.ratio.slopes import times
from rlad_kernels.losses.ratio.surrogate import clipped_surrogate
from rlad_kernels.losses.ratio.vespo import LARGEST, LOWEST, gamma_weights

NAME = "LigerFusedLinearGRPOLoss"
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
_REDUCTIONS = {"grpo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean", "luspo": "seq-mean-token-sum"}


@dataclass(frozen=True)
class Options:
    """As the constructor takes them; and what is made of them.

    Raises:
        ValueError: naming the option, what came and what was wanted.
    """

    beta: float
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    max_completion_length: int | None
    importance_sampling_level: str
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    temperature: float
    delta: float | None
    use_bias_correction_kl: bool
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    reference: Reference = field(init=False)
    sapo: SAPO = field(init=False)

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "reference", Reference(0.0 if self.use_bias_correction_kl else self.beta, "k3"))
        temperatures = (self.sapo_temperature_pos, self.sapo_temperature_neg)
        object.__setattr__(self, "sapo", SAPO(temperatures=temperatures, reference=self.reference))

    def _check(self) -> None:
        kind, level = self.loss_type, self.importance_sampling_level
        if kind not in LOSSES:
            raise ValueError(f"{NAME}: loss_type must be one of {LOSSES}, got {kind!r}")
        if level not in ("token", "sequence"):
            raise ValueError(f"{NAME}: importance_sampling_level must be token or sequence, got {level!r}")
        if level == "sequence" and kind in ("cispo", "sapo", "vespo"):
            raise ValueError(f"{NAME}: loss_type={kind!r} is per token; set importance_sampling_level='token', got 'sequence'")
        if kind == "dr_grpo" and not (self.max_completion_length or 0) > 0:
            raise ValueError(f"{NAME}: loss_type='dr_grpo' needs max_completion_length > 0, got {self.max_completion_length!r}")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature", "delta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{NAME}: {name} must be positive and finite, got {value!r}")
        vespo = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
        for name in ("beta", "epsilon_low", "epsilon_high", *vespo):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{NAME}: {name} must be at least 0 and finite, got {getattr(self, name)!r}")


def grpo(
    o: Options,
    logp: Tensor,
    keep: Tensor,
    advantages: Tensor,
    *,
    old: Tensor | None,
    reference: Tensor | None,
    is_ratio: Tensor | None,
    items: Tensor | float | None,
) -> LossOutput:
    """The reduced loss of ``logp (B, T)``, 0 where ``keep`` is not; metrics ``kl`` (with beta), where clipped ``clip``.

    Args:
        advantages: ``(B,)``, ``(B, 1)`` or ``(B, T)``.
        old, reference: log-probs ``(B, T)``; None are the policy's own.
        is_ratio: vLLM's importance weights, ``(B,)``, ``(B, 1)`` or ``(B, T)``.
        items: tokens of the whole accumulated batch, for dapo, cispo and vespo.
    """
    advantages = advantages.squeeze(1) if advantages.shape == (len(keep), 1) else advantages
    given = {"advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference}
    rows = {k: logp.detach() if x is None else token_rows(NAME, k, x, logp, spread=k == "advantages") for k, x in given.items()}
    a, o_logp, ref = (torch.where(keep, x.to(logp.dtype), 0) for x in rows.values())
    weights = _is_ratio(is_ratio, keep, logp)
    loss, metrics = _tokens(o, logp, keep, a, o_logp, ref if o.beta else None, weights)
    reduction = Reduction(_REDUCTIONS.get(o.loss_type, "token-mean"), denominator=_divisor(o, keep, items))
    return reduce(loss, token_weights(NAME, keep, reduction, logp.dtype), keep, metrics)


def _is_ratio(ratio: Tensor | None, keep: Tensor, like: Tensor) -> Tensor | None:
    """vLLM's ratios as ``(B, 1)`` or ``(B, T)`` with 1 at masked places."""
    if ratio is None:
        return None
    b, t = keep.shape
    wide = ratio.detach().to(like.dtype).unsqueeze(1) if ratio.dim() == 1 else ratio.detach().to(like.dtype)
    if wide.shape not in ((b, 1), (b, t)):
        raise ValueError(f"{NAME}: vllm_is_ratio has shape {tuple(ratio.shape)}, wanted ({b},), ({b}, 1) or ({b}, {t})")
    if wide.device != keep.device:
        raise ValueError(f"{NAME}: vllm_is_ratio is on {wide.device}, wanted {keep.device}; all tensors must share a device")
    if wide.shape[1] == t:
        wide = torch.where(keep, wide, 1)
    return torch.ops.rlad.checked(wide, "weight", f"{NAME}: vllm_is_ratio")


def _tokens(
    o: Options, logp: Tensor, keep: Tensor, advantages: Tensor, old: Tensor, reference: Tensor | None, is_ratio: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss and metrics ``(B, T)``; every tensor is finite at masked places."""
    kind, shape = o.loss_type, logp.shape
    # a weight that is not negative multiplies a loss as it multiplies its advantage, and not the KL
    weighted = advantages if is_ratio is None or kind == "vespo" else times(advantages, is_ratio.expand(shape))
    s, old_s, a, weighted = (x.flatten() for x in (logp, old, advantages, weighted))
    ref = None if reference is None else reference.flatten()
    upper = o.epsilon_high if kind == "cispo" else 1 + o.epsilon_high
    place = sequence_index(NAME, keep, "the ratio", None) if o.importance_sampling_level == "sequence" else None
    if kind == "sapo":
        loss, found = o.sapo.tokens(TokenScores(logp=s), old_logp=old_s, advantages=weighted, ref_logp=ref)
    elif kind in ("cispo", "vespo"):
        found = ratio_metrics(s, old_s)
        if kind == "cispo":
            weight = found["ratio_mean"].clamp(max=upper)
        else:
            weight = vespo_weights(o, logp.detach() - old, advantages, is_ratio).flatten()
        loss, found = o.reference.add(reinforced(s, times(weight, weighted)), found, s, ref)
    else:  # min(min(r, δ)Â, clip(r)Â): δ bounds r from above for either sign, beside the clip
        most = upper if o.delta is None else min(o.delta, upper)
        bounds = (o.epsilon_low, most - 1), None if o.delta is None else max(o.delta, upper)
        if place is None:
            loss, found = clipped_surrogate(s, old_s, weighted, *bounds, ref_logp=ref, reference=o.reference)
        else:
            log_r = sequence_mean(s - old_s, keep.flatten(), place)
            loss, found = clipped_surrogate(log_r, torch.zeros_like(log_r), weighted, *bounds)
            loss, found = o.reference.add(loss, found, s, ref)
    r = found["ratio_mean"]
    clipped = ((r < 1 - o.epsilon_low) & (a < 0) & (kind != "cispo")) | ((r > upper) & (a > 0))
    metrics = {"clip": (clipped & (kind not in ("sapo", "vespo"))).to(r.dtype)}
    if ref is not None:
        metrics = {"kl": found["kl_ref"], **metrics}
        if o.use_bias_correction_kl:
            log_r = s - old_s if place is None else sequence_mean(s - old_s, keep.flatten(), place)
            corrected = weighted_kl(s, ref, log_r, sequence=place is not None)
            loss, metrics["kl"] = loss + o.beta * corrected, corrected.detach()
    return loss.view(shape), {k: x.view(shape) for k, x in metrics.items()}


def vespo_weights(o: Options, log_ratio: Tensor, advantages: Tensor, is_ratio: Tensor | None) -> Tensor:
    """:class:`VESPO`'s weights, whose ratio takes vLLM's as a factor, ``(B, T)``; constant in the loss."""
    log_w = log_ratio.clamp(-20, 20).sum(1, keepdim=True)
    if is_ratio is not None:
        log_w = log_w + is_ratio.log().clamp(LOWEST, LARGEST).sum(1, keepdim=True)
    positive, negative = (
        (k, max(rate, 1e-4)) for k, rate in ((o.vespo_k_pos, o.vespo_lambda_pos), (o.vespo_k_neg, o.vespo_lambda_neg))
    )
    return gamma_weights(log_w.expand_as(log_ratio), advantages >= 0, positive, negative)


def _divisor(o: Options, keep: Tensor, items: Tensor | float | None) -> Tensor | float | None:
    """What TRL divides by: sequences, their longest lengths, the batch's own tokens (None) or those of all processes."""
    batch = max(len(keep), 1)
    if o.loss_type in _REDUCTIONS:
        return float(batch)
    if o.loss_type == "bnpo":
        return None
    return float(batch * (o.max_completion_length or 1)) if o.loss_type == "dr_grpo" else _all_tokens(keep, items)


def _all_tokens(keep: Tensor, items: Tensor | float | None) -> Tensor:
    """Tokens a process: of the whole accumulated batch if given, else of this one; the mean over processes."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    here = keep.sum().float()
    if items is not None:
        here = torch.as_tensor(items, device=keep.device, dtype=torch.float32)
        if here.numel() != 1:
            raise ValueError(f"{NAME}: num_items_in_batch must be one number, got shape {tuple(here.shape)}")
    elif distributed:
        torch.distributed.all_reduce(here)
    return (here.reshape(()) / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1)
