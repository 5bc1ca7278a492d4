"""RLSD: the teacher redistributes a response's advantage over its tokens and never turns its sign (arXiv 2609.04108, ms-swift)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlad_kernels.core.check import check_range
from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import ClippedLoss, teacher_gap


@dataclass(frozen=True, kw_only=True)
class RLSD(ClippedLoss):
    """RLSD: −min(rA, clip(r)A), A = Â·sg[(1 − λ) + λ·clip(e^{sign(Â)(t − s)}, 1 ± ε_w)] (as in arXiv 2609.04108 and ms-swift).

    Args:
        mix: λ in [0, 1]; 0 is GRPO.
        weight_clip: ε_w in [0, 1].
        clip, dual_clip, reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.
        teacher_logp: log-probs t of the teacher, usually the policy itself shown the answer; a non-finite value leaves Â as it
            is and counts in ``invalid_teacher``.

    Metrics: those of :class:`GRPO`, kl_teacher (mean of s − t) and invalid_teacher.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.zeros(2)
        >>> rk.losses.RLSD()(logp, old_logp=logp, advantages=logp + 1, teacher_logp=torch.tensor([0.1, -9.0])).token_loss
        tensor([-1.1052, -0.8000])
    """

    mix: float = 1.0
    weight_clip: float = 0.2

    needs = ("old_logp", "advantages", "teacher_logp")

    def check(self) -> None:
        super().check()
        check_range(self.name, "mix", self.mix, 0, 1)
        check_range(self.name, "weight_clip", self.weight_clip, 0, 1)

    def tokens(
        self, scores: TokenScores, *, old_logp: Tensor, advantages: Tensor, teacher_logp: Tensor, **shared: Any
    ) -> tuple[Tensor, Metrics]:
        gap, found = teacher_gap(scores.logp, teacher_logp)
        weight = (advantages.sign() * gap).exp().clamp(1 - self.weight_clip, 1 + self.weight_clip)
        loss, metrics = self.surrogate(scores.logp, old_logp, advantages * ((1 - self.mix) + self.mix * weight), **shared)
        return loss, {**metrics, **found}


add_method(
    "rlsd",
    "ratio",
    RLSD(),
    formula="−min(rA, clip(r)A), A = Â·sg[clip(e^{sign(Â)(t − s)}, 1 ± .2)]",
    paper="arXiv 2609.04108",
    confidence="A",
    published=(
        "As compared there: PPO's clip of 0.2, no KL, the gap t − s detached, verl with no reduction named (token mean, its "
        "default, here); λ = 1, ε_w = 0.2. ms-swift takes the gap to the old policy, t − o, which is the same at the first update."
    ),
)
