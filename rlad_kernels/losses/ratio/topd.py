"""TOP-D: on-policy distillation from a teacher mixed with the student, which bounds the rewards from below (arXiv 2607.04751)."""

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
from rlad_kernels.losses.ratio.groups import standardized
from rlad_kernels.losses.ratio.sampled import ClippedLoss
from rlad_kernels.losses.ratio.sequences import suffix_sums


@dataclass(frozen=True, kw_only=True)
class TOPD(ClippedLoss):
    """TOP-D: −min(rA, clip(r)A), r = exp(s − o), A from the rewards log(α·π_T/π_old + 1 − α) (arXiv 2607.04751).

    The reward is OPD's towards α·π_T + (1 − α)·π_old, a teacher near the student: at least log(1 − α), however little the teacher
    gives the token, and t − o at α = 1. A token's return is its reward and the mean of its sequence's later ones; A is the return
    standardised over the kept tokens of its group. All of it is of the given log-probs: no gradient, and three products.

    Args:
        alpha: α in (0, 1].
        future: whether the mean of the later rewards is added.
        normalize: whether returns are standardised by group; a group whose returns are all one has A = 0.
        clip, dual_clip, reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, ref_logp, rollout_logp: as of :class:`GRPO`; packed tokens need ``Reduction(seq_ids=…)`` for ``future``.
        teacher_logp: the teacher's log-probs t of the same tokens; a non-finite value is a reward of 0 and counts in
            ``invalid_teacher``.
        group_ids: ints, ``(B,)`` or the log-probs' shape, in any order; needed for ``normalize``.

    Metrics: those of :class:`GRPO`, kl_teacher (mean of s − t) and invalid_teacher.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> old, teacher = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -99.0]])
        >>> rk.losses.TOPD(alpha=0.5, normalize=False)(old, old_logp=old, teacher_logp=teacher).token_loss
        tensor([[0.6931, 0.6931]])
    """

    alpha: float = 0.2
    future: bool = True
    normalize: bool = True

    needs = ("old_logp", "teacher_logp")
    takes = (*ClippedLoss.takes, "group_ids")

    def check(self) -> None:
        super().check()
        check_range(self.name, "alpha", self.alpha, 0, 1, "(]")

    def needed(self) -> tuple[str, ...]:
        return (*super().needed(), *(("group_ids",) if self.normalize else ()))

    def reward(self, old_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
        """log(α·π_T/π_old + 1 − α), 0 where it or t is not finite; and where that is."""
        ratio = teacher_logp - old_logp + math.log(self.alpha)
        floor = math.log1p(-self.alpha) if self.alpha < 1 else -math.inf
        reward = torch.logaddexp(ratio, torch.full_like(ratio, floor))
        invalid = ~(teacher_logp.isfinite() & reward.isfinite())
        return torch.where(invalid, 0, reward), invalid

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        rest = {k: x for k, x in super().prepare(batch, tensors).items() if k != "group_ids"}
        found, invalid = self.reward(tensors["old_logp"], tensors["teacher_logp"])
        found = torch.where(batch.keep, found, 0)
        if self.future:
            sequence, one = batch.sequence("future"), batch.keep.to(found.dtype)
            later = suffix_sums(one, sequence) - one
            found = found + (suffix_sums(found, sequence) - found) / later.clamp_min(1)
        if self.normalize:
            found = standardized(found, batch.keep, tensors["group_ids"])
        return {**rest, "returns": torch.where(batch.keep, found, 0), "invalid": invalid}

    def tokens(
        self, scores: TokenScores, *, old_logp: Tensor, teacher_logp: Tensor, returns: Tensor, invalid: Tensor, **shared: Any
    ) -> tuple[Tensor, Metrics]:
        return self.taught(scores.logp, old_logp, teacher_logp, returns, invalid, **shared)


add_method(
    "topd",
    "ratio",
    TOPD(),
    formula="−min(rA, clip(r)A), A = standardised R, R_t = ρ_t + mean of later ρ, ρ = log(α·π_T/π_old + 1 − α), α = .2",
    paper="arXiv 2607.04751",
    confidence="B",
    published=(
        "α .1 or .2, clip .2, eight responses a prompt, token-mean over each prompt's responses (ours: over the batch), R and A as "
        "here. Read in notes of the full text and in prime-rl's code, which keeps std at 1e-6 at least; the paper itself was not."
    ),
    note="A sequence's last token has no later mean in its return, and is standardised with those that have.",
)
add_method(
    "nemo_rl_tropd",
    "ratio",
    TOPD(future=False, normalize=False, clip=None),
    formula="−r·A, A = log(α·π_T/π_old + 1 − α), α = .2",
    paper="NeMo-RL, TROPD",
    confidence="B",
    published=(
        "NeMo-RL's guide of MOPD: proximal_teacher_alpha = 0.2 in its example (1 by default), the mean over the step's tokens "
        "optionally taken off, REINFORCE with IcePop's gate in its recipe. Ours: without either."
    ),
)
