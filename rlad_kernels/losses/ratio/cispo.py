"""CISPO: REINFORCE with a clipped importance weight, so that no token loses its gradient to the clip (arXiv 2506.13585)."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from rlad_kernels.core.check import needs
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.rollout import weigh
from rlad_kernels.losses.ratio.sampled import SampledOptions, on_sampled, ratio_metrics, reinforced, sampled_loss
from rlad_kernels.losses.ratio.surrogate import add_kl, check_clip, times


@on_sampled("cispo")
def cispo_tokens(
    logp: Tensor, *, old_logp: Tensor, advantages: Tensor, clip_low: float = 1.0, clip_high: float = 4.0,
    ref_logp: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3", **rollout: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """−sg[clip(r)]·A·s per token, and its metrics; all tensors ``(N,)``."""
    advantages, found = weigh(logp, old_logp, advantages, **rollout)
    metrics = ratio_metrics(logp, old_logp)
    r = metrics["ratio_mean"]
    live = advantages != 0
    loss = reinforced(logp, times(r.clamp(1 - clip_low, 1 + clip_high), advantages))
    clipped = {"clip_frac_low": (live & (r < 1 - clip_low)).to(r.dtype), "clip_frac_high": (live & (r > 1 + clip_high)).to(r.dtype)}
    return add_kl(loss, {**clipped, **metrics, **found}, logp, ref_logp, kl_coef, kl_estimator)


def cispo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, *, clip: tuple[float, float] = (1.0, 4.0),
    **options: Unpack[SampledOptions],
) -> LossOutput:  # fmt: skip
    """CISPO: −sg[clip(r, 1−ε_low, 1+ε_high)]·Â·s with r = exp(s − o) (MiniMax-M1, arXiv 2506.13585).

    The clip bounds the weight of a token's gradient and never kills it: d/ds = −clip(r)·Â, also where the clip binds. The value
    is no objective, only its gradient is meant.

    Args:
        logp, old_logp, advantages, mask: as in :func:`grpo_loss`.
        clip: (ε_low, ε_high). The paper sets no lower bound (ε_low = 1 here) and tunes ε_high; 4 is a weight of at most 5.
        options: ref_logp, kl_coef, kl_estimator, reduction, seq_ids, denominator, rollout_logp, rollout of :func:`grpo_loss`.

    Returns:
        LossOutput. Metrics as of :func:`grpo_loss`; clip_frac_low/high are where the weight is clipped, for either sign of Â.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    needs("cispo_loss", old_logp=old_logp, advantages=advantages)
    check_clip("cispo_loss", clip, None)
    tensors = {"old_logp": old_logp, "advantages": advantages}
    return sampled_loss("cispo_loss", cispo_tokens, logp, tensors, mask, {"clip_low": clip[0], "clip_high": clip[1]}, **options)


add_method(
    "cispo", "ratio", cispo_loss, formula="−sg[clip(r, 1−ε_low, 1+ε_high)]·Â·s", needs=("old_logp", "advantages"),
    paper="arXiv 2506.13585", confidence="B", products=3,
)  # fmt: skip
