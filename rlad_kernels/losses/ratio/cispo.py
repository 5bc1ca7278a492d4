"""CISPO: REINFORCE with a clipped importance weight, so that no token loses its gradient to the clip (arXiv 2506.13585)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import SampledLoss, ratio_metrics, reinforced
from rlad_kernels.losses.ratio.slopes import times
from rlad_kernels.losses.ratio.surrogate import NO_CLIP, check_clip


@dataclass(frozen=True, kw_only=True)
class CISPO(SampledLoss):
    """CISPO: −sg[clip(r, 1−ε_low, 1+ε_high)]·Â·s with r = exp(s − o) (MiniMax-M1, arXiv 2506.13585).

    The clip bounds the weight of a token's gradient and never kills it: d/ds = −clip(r)·Â, also where the clip binds. The value
    is no objective, only its gradient is meant.

    Args:
        clip: (ε_low, ε_high). The paper sets no lower bound (ε_low = 1 here) and tunes ε_high; 4 is a weight of at most 5. None
            never clips.
        reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.

    Metrics: those of :class:`GRPO`; clip_frac_low/high are where the weight is clipped, for either sign of Â.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.zeros(1, requires_grad=True)
        >>> rk.losses.CISPO()(logp, old_logp=torch.tensor([-3.0]), advantages=torch.ones(1)).loss.backward()
        >>> logp.grad
        tensor([-5.])
    """

    clip: tuple[float, float] | None = (1.0, 4.0)

    needs = ("old_logp", "advantages")

    def check(self) -> None:
        super().check()
        check_clip(self.name, self.clip)

    def tokens(
        self,
        scores: TokenScores,
        *,
        old_logp: Tensor,
        advantages: Tensor,
        ref_logp: Tensor | None = None,
        rollout_logp: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        logp, (low, high) = scores.logp, self.clip or NO_CLIP
        advantages, found = self.weighed(advantages, logp, old_logp, rollout_logp)
        metrics = ratio_metrics(logp, old_logp)
        r = metrics["ratio_mean"]
        live = advantages != 0
        loss = reinforced(logp, times(r.clamp(1 - low, 1 + high), advantages))
        clipped = {"clip_frac_low": (live & (r < 1 - low)).to(r.dtype), "clip_frac_high": (live & (r > 1 + high)).to(r.dtype)}
        return self.reference.add(loss, {**clipped, **metrics, **found}, logp, ref_logp, old_logp)


add_method(
    "cispo",
    "ratio",
    CISPO(),
    formula="−sg[clip(r, 1−ε_low, 1+ε_high)]·Â·s",
    paper="arXiv 2506.13585",
    confidence="B",
    published=(
        "The mean over all tokens of the group; the clipped weight detached, no KL, no lower bound in effect, ε_high tuned and its "
        "value not stated. Here weights up to 5, ScaleRL's ε_max, TRL's advice."
    ),
)
