"""verl 0.9: importing this module in its processes puts our losses and our head under its own extension points.

``VERL_USE_EXTERNAL_MODULES=rlad_kernels.integrations.verl`` makes verl do so. ``rlad_grpo`` is a policy loss, ``rlad_trrd`` a
distillation loss (α and clamp from RLAD_TRRD_ALPHA and RLAD_TRRD_CLAMP), and ``use_fused_kernels`` with the torch backend computes
log-probs and entropy by :func:`rlad_kernels.linear_logp`. docs/verl.md has a worked configuration.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from rlad_kernels.core.check import check_floats, token_rows
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.reduction import keep_mask
from rlad_kernels.core.types import TokenScores
from rlad_kernels.engine.call import flat_rows
from rlad_kernels.integrations.wiring import check_head
from rlad_kernels.linear.logp import score
from rlad_kernels.losses.ratio.grpo import GRPO
from rlad_kernels.losses.ratio.sampled import ClippedLoss
from rlad_kernels.losses.ratio.slopes import times
from rlad_kernels.losses.ratio.surrogate import NO_CLIP
from rlad_kernels.losses.ratio.trrd import TRRD

SERIES = "0.9."
_OURS = {"old_log_prob": "old_logp", "old_log_probs": "old_logp", "teacher_logprobs": "teacher_logp"}  # verl's names


class FusedLinearForPPO(nn.Module):
    """verl's module of this name, on :func:`linear_logp`: float32 logits, no chunk of them longer than a tile.

    ``forward(hidden (…, D), weight (V, D), ids (…), temperature) → (log-probs, entropy)``, both float32 and differentiable; 0 where
    an id is −100. A tensor of another shape or dtype raises a ValueError.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        name = "FusedLinearForPPO"
        check_head(name, hidden_states, vocab_weights)
        flat_rows(name, "input_ids", input_ids, hidden_states.shape[:-1], hidden_states.device, ids=True)
        head = LMHead(vocab_weights, temperature=temperature)
        scores = score(name, hidden_states, head, input_ids.long(), entropy=True)
        assert scores.entropy is not None
        return scores.logp, scores.entropy


def _tokens(
    name: str, loss: ClippedLoss, log_prob: Tensor, mask: Tensor, given: dict[str, Tensor], weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Token losses ``(B, T)`` times ``weights``, 0 where masked, whatever sits there; and the loss's metrics as means.

    ``clip_frac`` is of what the weights leave aside, as verl's is.
    """
    check_floats(name, "log_prob", log_prob)
    logp = log_prob if log_prob.dtype == torch.float64 else log_prob.float()
    keep = keep_mask(name, mask, logp, "response_mask")

    def flat(argument: str, x: Tensor) -> Tensor:
        x = token_rows(name, argument, x, logp, spread=argument == "advantages").to(logp.dtype)
        return torch.where(keep, x, 0).flatten()

    rows = {_OURS.get(k, k): flat(k, x) for k, x in given.items()}
    advantages = rows["advantages"]
    if weights is not None:  # on the advantage, where a weight of 0 takes a ratio of inf with it
        w = torch.ops.rlad.checked(flat("rollout_is_weights", weights), "weight", f"{name}: rollout_is_weights")
        rows["advantages"] = times(advantages, w)
    token, found = loss.tokens(TokenScores(logp=torch.where(keep, logp, 0).flatten()), **rows)
    r, (low, high) = found["ratio_mean"], loss.clip or NO_CLIP
    clipped = ((r < 1 - low) & (advantages < 0)) | ((r > 1 + high) & (advantages > 0))
    found, kept = {**found, "clip_frac": clipped.to(r.dtype)}, keep.flatten()
    means = {k: torch.where(kept, x, 0).sum() / kept.sum().clamp_min(1) for k, x in found.items() if k != "ratio_max"}
    return torch.where(keep, token.view_as(logp), 0), means


def _clip(config: Any) -> tuple[float, float]:
    low, high = (getattr(config, name, None) for name in ("clip_ratio_low", "clip_ratio_high"))
    return config.clip_ratio if low is None else low, config.clip_ratio if high is None else high


def rlad_grpo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's ``vanilla`` with dual clip on our kernels; without its clamp of s − o to ±20. All tensors ``(B, T)``."""
    from verl.trainer.ppo.core_algos import agg_loss

    grpo = GRPO(clip=_clip(config), dual_clip=config.get("clip_ratio_c", 3.0))
    given = {"old_log_prob": old_log_prob, "advantages": advantages}
    loss, means = _tokens("rlad_grpo", grpo, log_prob, response_mask, given, rollout_is_weights)
    metrics = {"pg_clipfrac": means["clip_frac"], "ppo_kl": -means["kl_old"]}
    total = agg_loss(loss_mat=loss, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    return total, {f"actor/{k}": x.item() for k, x in metrics.items()}


def rlad_trrd(config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: Any) -> tuple[Tensor, dict[str, Any]]:
    """TRRD token losses (arXiv 2602.22495) with verl's teacher as the anchor: the whole policy objective, not a term beside it."""
    from verl.trainer.distillation.losses import no_padding_2_padding

    options = distillation_config.distillation_loss
    for name, wanted in (("use_task_rewards", False), ("use_policy_gradient", False), ("loss_max_clamp", None)):
        if getattr(options, name) != wanted:
            raise ValueError(
                f"rlad_trrd: distillation.distillation_loss.{name} is {getattr(options, name)!r}; the loss has the rewards in it: "
                f"set {name}={'null' if wanted is None else 'false'}"
            )
    alpha, clamp = float(os.environ.get("RLAD_TRRD_ALPHA", "0.5")), os.environ.get("RLAD_TRRD_CLAMP")
    trrd = TRRD(alpha=alpha, teacher_clamp=float(clamp) if clamp else None, clip=_clip(config))

    def padded(x: Tensor) -> Tensor:
        return x.to_padded_tensor(0) if x.is_nested else x

    teacher = no_padding_2_padding(data["teacher_logprobs"], data)
    given = {
        "old_log_probs": padded(data["old_log_probs"]),
        "advantages": padded(data["advantages"]),
        "teacher_logprobs": teacher.squeeze(-1) if teacher.dim() == 3 else teacher,
    }
    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    loss, means = _tokens("rlad_trrd", trrd, log_prob, padded(data["response_mask"]), given)
    return loss, {f"distillation/{k}": x.item() for k, x in means.items() if k != "clip_frac"}


def install() -> None:
    """Register the losses and replace the fused head.

    Raises:
        ImportError: without verl, or with one whose extension points were not looked at.
    """
    try:
        from verl.trainer.distillation import losses
        from verl.trainer.ppo.core_algos import register_policy_loss
        from verl.utils.experimental import torch_functional
    except ModuleNotFoundError as missing:
        raise ImportError(f"rlad_kernels.integrations.verl: {missing}; pip install 'verl==0.9.1'") from missing
    if not (found := version("verl")).startswith(SERIES):
        raise ImportError(f"rlad_kernels.integrations.verl: verl {found}, wanted {SERIES}x: pip install 'verl==0.9.1'")
    register_policy_loss("rlad_grpo")(rlad_grpo)
    if "rlad_trrd" not in losses.DISTILLATION_LOSS_REGISTRY:
        losses.register_distillation_loss(losses.DistillationLossSettings(names=["rlad_trrd"], use_estimator=True))(rlad_trrd)
    torch_functional.FusedLinearForPPO = FusedLinearForPPO  # its call sites import the name when they run


install()
