"""GMPO: the clipped ratio of a sequence is the geometric mean of its tokens' clipped ratios (arXiv 2507.20673)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.check import is_pair
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import SampledLoss
from rlad_kernels.losses.ratio.sequences import sequence_mean
from rlad_kernels.losses.ratio.surrogate import clipped_surrogate


@dataclass(frozen=True, kw_only=True)
class GMPO(SampledLoss):
    """GMPO: −Â·exp(mean_t c_t), c = min(s − o, ε_high) where Â > 0, max(s − o, −ε_low) where Â < 0 (arXiv 2507.20673).

    The mean is over sequence i's kept tokens, each clipped on its own before: a token that is clipped has no gradient and the
    others of its sequence keep theirs, all with the sequence's weight. The ratio reads other tokens' scores: :func:`linear_loss`
    runs it on :func:`linear_logp`, at four products.

    Args:
        log_clip: (ε_low, ε_high) in nats, of the log-ratio: the ratio stays within (e^−ε_low, e^ε_high). None never clips, which
            is GSPO without a clip.
        reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`; the paper's Â is one of the sequence. Packed
            tokens always need ``Reduction(seq_ids=…)``.

    Metrics: those of :class:`GRPO`, the ratio being the sequence's; clip_frac_low/high are of tokens.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> old = torch.tensor([[-2.0, -2.2]])  # log-ratios 1 and 0.2, the first is cut to 0.4
        >>> out = rk.losses.GMPO()(logp, old_logp=old, advantages=torch.ones(1))
        >>> out.metrics["ratio_mean"], torch.autograd.grad(out.loss, logp)[0]
        (tensor(1.3499), tensor([[ 0.0000, -0.6749]]))
    """

    reduction: str = "seq-mean-token-mean"
    log_clip: tuple[float, float] | None = (0.4, 0.4)

    needs = ("old_logp", "advantages")
    rowwise = False
    reads_sequences = True

    def check(self) -> None:
        super().check()
        if self.log_clip is not None and not (is_pair(self.log_clip) and min(self.log_clip) >= 0):
            raise ValueError(f"{self.name}: log_clip must be (low, high), both at least 0, or None, got {self.log_clip!r}")

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        return {**super().prepare(batch, tensors), "keep": batch.keep, "sequence": batch.sequence("the ratio")}

    def tokens(
        self,
        scores: TokenScores,
        *,
        old_logp: Tensor,
        advantages: Tensor,
        keep: Tensor,
        sequence: Tensor,
        ref_logp: Tensor | None = None,
        rollout_logp: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        logp, (low, high) = scores.logp, self.log_clip or (math.inf, math.inf)
        up, down, gap = advantages > 0, advantages < 0, logp - old_logp
        clipped = torch.where(up, gap.clamp(max=high), torch.where(down, gap.clamp(min=-low), 0))
        log_ratio = sequence_mean(clipped, keep, sequence)
        advantages, found = self.weighed(advantages, logp, old_logp, rollout_logp, (keep, sequence))
        loss, metrics = clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), advantages, None)
        gap = gap.detach()
        flags = {"clip_frac_low": (down & (gap < -low)).to(gap.dtype), "clip_frac_high": (up & (gap > high)).to(gap.dtype)}
        return self.reference.add(loss, {**metrics, **flags, "kl_old": gap, **found}, logp, ref_logp, old_logp)


add_method(
    "gmpo",
    "ratio",
    GMPO(),
    formula="−Â·exp(mean_t c_t), c = min(s − o, .4) where Â > 0, max(s − o, −.4) where Â < 0",
    paper="arXiv 2507.20673",
    confidence="A",
    published=(
        "verl's geo_mean, by the authors, and TRL's GMPO: (e^−.4, e^.4), one-sided by Â's sign, mean over sequences. A sampler's "
        "weights multiply Â here; verl takes their geometric mean."
    ),
)
