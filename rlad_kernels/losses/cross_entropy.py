"""Cross-entropy with token weights, label smoothing and z-loss: SFT, or distillation from what a teacher wrote."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.check import check_range
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors, TokenLoss
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(TokenLoss):
    """w·[−(1−ε)·log π(y) − ε·mean_v log π(v)] + z_loss·lse²: SFT, or distillation from what a teacher wrote (arXiv 1606.07947).

    Args:
        label_smoothing: ε in [0, 1), as in ``torch.nn.functional.cross_entropy``: a share ε of the label is spread evenly over the
            vocabulary (arXiv 1512.00567).
        z_loss: factor on the squared logsumexp in nats² (PaLM: 1e-4, arXiv 2204.02311), not weighted by w. It holds the normaliser
            near 0, which log-probs alone leave free; its gradient is 2·z_loss·lse·p.
        normalize_weights: scale the call's weights to a mean of 1 over its kept tokens: ``token-mean`` is then Σ w·loss/Σ w, as
            with the class weights of ``torch.nn.functional.cross_entropy``, and the z-loss still a mean over tokens.

    Tensors of a call:
        logp: log-probs of the labels, in nats; with ``z_loss`` also lse, with ``label_smoothing`` lse and mean_logits.
        weights: w per token in the labels' shape, ``class_weights[target.clamp_min(0)]`` for weights of classes; None is 1. Unless
            normalised they do not enter the divisor of a reduction. A token of weight 0 keeps only its z-loss. With label
            smoothing they weigh the whole token, where torch weighs each class of the even part.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.losses.CrossEntropy()(torch.tensor([-1.0, -3.0]), weights=torch.tensor([1.0, 0.0])).loss
        tensor(0.5000)
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    normalize_weights: bool = False

    takes = ("weights",)

    def check(self) -> None:
        super().check()
        check_range(self.name, "label_smoothing", self.label_smoothing, 0, 1, "[)")
        check_range(self.name, "z_loss", self.z_loss, 0, torch.inf, "[)")

    def read(self) -> tuple[str, ...]:
        if self.label_smoothing:
            return ("logp", "lse", "mean_logits")
        return ("logp", "lse") if self.z_loss else self.reads

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        weights = tensors.get("weights")
        if weights is None or not self.normalize_weights:
            return tensors
        total = weights.sum()
        return {**tensors, "weights": torch.where(total > 0, weights * (batch.keep.sum() / total), 0)}

    def tokens(self, scores: TokenScores, *, weights: Tensor | None = None) -> tuple[Tensor, Metrics]:
        loss, eps = -scores.logp, self.label_smoothing
        loss = (1 - eps) * loss + eps * (scores.lse - scores.mean_logits) if eps else loss
        loss = loss if weights is None else torch.where(weights == 0, 0, weights * loss)
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
add_method(
    "label_smoothing",
    "other",
    CrossEntropy(label_smoothing=0.1),
    formula="−w·[(1 − ε)·log π(y) + ε·mean_v log π(v)], ε = 0.1",
    paper="arXiv 1512.00567",
    confidence="B",
    note="Needs a head without softcap. With class weights torch weighs each class of the even part, this the whole token.",
    published="ε = 0.1, an even prior, mean over examples; ours as F.cross_entropy(label_smoothing=). Paper not read in full text.",
)
