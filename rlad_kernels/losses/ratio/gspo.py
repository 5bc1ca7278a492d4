"""GSPO: the clipped surrogate on a sequence's length-normalised ratio; its token form, and LUSPO (arXiv 2507.18071, 2602.05261)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.check import check_choice
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import ClippedLoss
from rlad_kernels.losses.ratio.sequences import sequence_mean
from rlad_kernels.losses.ratio.surrogate import clipped_surrogate

LEVELS = ("sequence", "sequence-token")


@dataclass(frozen=True, kw_only=True)
class GSPO(ClippedLoss):
    """GSPO: −min(r_i Â, clip(r_i, 1−ε_low, 1+ε_high)Â), r_i = exp(mean over sequence i's kept tokens of s − o) (arXiv 2507.18071).

    Sequences are kept or clipped as a whole (with one Â a sequence), and all their tokens get the same gradient, through the mean.
    The ratio reads other tokens' scores: :func:`linear_loss` runs it on :func:`linear_logp`, at four products.

    Args:
        level: ``sequence``, or ``sequence-token`` (GSPO-token): the value of r_i with each token's own gradient,
            log r = sg[log r_i] + s − sg[s], for advantages that differ from token to token.
        clip, dual_clip, reference, rollout: as of :class:`GRPO`, with other defaults.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`; packed tokens always need
            ``Reduction(seq_ids=…)``.

    Metrics: those of :class:`GRPO`, the ratio being the sequence's.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> out = rk.losses.GSPO(clip=None)(logp, old_logp=logp.detach() - 0.5, advantages=torch.ones(1))
        >>> out.metrics["ratio_mean"]
        tensor(1.6487)
    """

    reduction: str = "seq-mean-token-mean"
    clip: tuple[float, float] | None = (3e-4, 4e-4)
    level: str = "sequence"

    needs = ("old_logp", "advantages")
    rowwise = False
    reads_sequences = True

    def check(self) -> None:
        super().check()
        check_choice(self.name, "level", self.level, LEVELS)

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
        logp = scores.logp
        advantages, found = self.weighed(advantages, logp, old_logp, rollout_logp, (keep, sequence))
        log_ratio = sequence_mean(logp - old_logp, keep, sequence)
        if self.level == "sequence-token":
            log_ratio = log_ratio.detach() + (logp - logp.detach())
        loss, metrics = clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), advantages, self.clip, self.dual_clip)
        return self.reference.add(loss, {**metrics, **found}, logp, ref_logp, old_logp)


add_method(
    "gspo",
    "ratio",
    GSPO(),
    formula="−min(r_i Â, clip(r_i, 1−3e-4, 1+4e-4)Â), r_i = exp(mean_t(s − o))",
    paper="arXiv 2507.18071",
    confidence="A",
    published=(
        "One term a sequence, the mean over the group; clip 3e-4 below and 4e-4 above; the gradient through the ratio, neither "
        "dual clip nor KL. The same here; verl, TRL and OpenRLHF clip at 0.2 unless told."
    ),
)
add_method(
    "gspo_token",
    "ratio",
    GSPO(level="sequence-token"),
    formula="gspo with r_it = sg[r_i]·π/sg[π]",
    paper="arXiv 2507.18071",
    confidence="A",
    published=(
        "The mean of each sequence's tokens, then of the group's sequences; sg[r_i]·π/sg[π]; its clip is not stated apart from "
        "gspo's. The same here."
    ),
)
add_method(
    "luspo",
    "ratio",
    GSPO(reduction="seq-mean-token-sum", clip=(2e-3, 2.5e-3)),
    formula="−|y_i|·min(r_i Â, clip(r_i, 1−2e-3, 1+2.5e-3)Â), r_i = exp(mean_t(s − o))",
    paper="arXiv 2602.05261",
    confidence="A",
    published=(
        "GSPO with each sequence's loss times its length, as TRL and Liger have it: the mean over sequences of sums over tokens. "
        "The clip (2e-3, 2.5e-3) is the paper's section 5.1, as TRL's paper index quotes it; the paper was read in its abstract."
    ),
)
