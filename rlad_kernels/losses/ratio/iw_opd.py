"""IW-OPD: on-policy distillation whose tokens weigh less the further the sequence has left the teacher (arXiv 2606.22600)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_range
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import ClippedLoss
from rlad_kernels.losses.ratio.sequences import suffix_sums, totals


@dataclass(frozen=True, kw_only=True)
class IWOPD(ClippedLoss):
    """IW-OPD: −min(rA, clip(r)A), r = exp(s − o), A_t = w_t·(t − o), w_t = 1 + γ(1 − Σ_{<t}|t − o| / Σ|t − o|) (arXiv 2606.22600).

    The first token of a sequence has the weight 1 + γ, and the weights fall to 1 as the sequence's disagreement with the teacher
    is used up. All of it is of the given log-probs: no gradient, and three products.

    Args:
        gamma: γ, at least 0; 0 is OPD.
        clip, dual_clip, reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, ref_logp, rollout_logp: as of :class:`GRPO`; packed tokens need ``Reduction(seq_ids=…)``.
        teacher_logp: the teacher's log-probs t of the same tokens; where t − o is not finite it is 0, and counts in
            ``invalid_teacher``.

    Metrics: those of :class:`GRPO`, kl_teacher (mean of s − t) and invalid_teacher.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> old, teacher = torch.full((1, 3), -2.0), torch.tensor([[-1.0, -2.0, -5.0]])  # t − o is 1, 0, −3
        >>> rk.losses.IWOPD(gamma=1.0)(old, old_logp=old, teacher_logp=teacher).token_loss
        tensor([[-2.0000,  0.0000,  5.2500]])
    """

    dual_clip: float | None = 3.0
    gamma: float = 0.5

    needs = ("old_logp", "teacher_logp")

    def check(self) -> None:
        super().check()
        check_range(self.name, "gamma", self.gamma, 0, math.inf, "[)")

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        gap = tensors["teacher_logp"] - tensors["old_logp"]
        invalid = ~gap.isfinite()
        gap = torch.where(batch.keep & ~invalid, gap, 0)
        sequence, size = batch.sequence("the weights"), gap.abs()
        total = totals(size, sequence)
        weight = 1 + self.gamma * (1 - (total - suffix_sums(size, sequence)) / total.clamp_min(1e-8))
        return {**super().prepare(batch, tensors), "returns": weight * gap, "invalid": invalid}

    def tokens(
        self, scores: TokenScores, *, old_logp: Tensor, teacher_logp: Tensor, returns: Tensor, invalid: Tensor, **shared: Any
    ) -> tuple[Tensor, Metrics]:
        return self.taught(scores.logp, old_logp, teacher_logp, returns, invalid, **shared)


add_method(
    "iw_opd",
    "ratio",
    IWOPD(),
    formula="−min(rA, clip(r)A) with dual clip 3, A_t = (1 + γ(1 − Σ_{<t}|t − o| / Σ|t − o|))·(t − o), γ = .5",
    paper="arXiv 2606.22600",
    confidence="A",
    published=(
        "TRL's IWOPDTrainer: γ = 0.5, token-mean, −A·s without a ratio. The paper's Table 6, as TRL quotes it: verl's clipped "
        "surrogate, clip .2, dual clip 3. The paper itself was not read."
    ),
)
