"""Cross-entropy with token weights and z-loss: SFT, and distillation from sequences that the teacher wrote (arXiv 1606.07947)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.check import check_range
from rlad_kernels.core.token_loss import Metrics, TokenLoss
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(TokenLoss):
    """−w·log π(y) + z_loss·lse²: SFT, or distillation from what a teacher wrote (arXiv 1606.07947, 2204.02311).

    Args:
        z_loss: factor on the squared logsumexp in nats² (PaLM: 1e-4), not weighted by w. It holds the normaliser near 0, which
            log-probs alone leave free; its gradient is 2·z_loss·lse·p.

    Tensors of a call:
        logp: log-probs of the labels, in nats; with ``z_loss`` also lse.
        weights: w per token in the labels' shape; None is 1. They do not enter the divisor of a reduction: pass
            ``Reduction(denominator=weights[mask].sum())`` for a weighted mean. A token of weight 0 keeps only its z-loss.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.losses.CrossEntropy()(torch.tensor([-1.0, -3.0]), weights=torch.tensor([1.0, 0.0])).loss
        tensor(0.5000)
    """

    z_loss: float = 0.0

    takes = ("weights",)

    def check(self) -> None:
        super().check()
        check_range(self.name, "z_loss", self.z_loss, 0, torch.inf, "[)")

    def read(self) -> tuple[str, ...]:
        return ("logp", "lse") if self.z_loss else self.reads

    def tokens(self, scores: TokenScores, *, weights: Tensor | None = None) -> tuple[Tensor, Metrics]:
        loss = -scores.logp if weights is None else torch.where(weights == 0, 0, -weights * scores.logp)
        return loss + self.z_loss * scores.lse.square() if self.z_loss else loss, {}


add_method(
    "seq_kd",
    "other",
    CrossEntropy(),
    formula="−log π(y), y written by the teacher",
    paper="arXiv 1606.07947",
    confidence="B",
    published=(
        "The teacher's beam-search output (K = 5), in some runs mixed with the data's; log-likelihoods of whole sequences. Here "
        "the mean over tokens."
    ),
)
add_method(
    "cross_entropy_z_loss",
    "other",
    CrossEntropy(z_loss=1e-4),
    formula="−w·log π(y) + c·lse², c = 1e-4",
    paper="arXiv 2204.02311",
    confidence="B",
    published="1e-4·log²Z beside the cross-entropy, no token weights; its reduction is not stated (the mean over tokens here).",
)
