"""TRRD, RLAD's loss on sampled tokens: the clipped surrogate anchored between the old policy and a teacher (arXiv 2602.22495)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlad_kernels.core.check import check_positive, check_range
from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import ClippedLoss
from rlad_kernels.losses.ratio.surrogate import Anchor


@dataclass(frozen=True, kw_only=True)
class TRRD(ClippedLoss):
    """TRRD: the clipped surrogate with r = π/(π_old^α·π_T^{1−α}), log r = α(s−o) + (1−α)(s−t) (RLAD, arXiv 2602.22495).

    α = 1 is GRPO. With α < 1 the clip is live at the first step already: at α = .5, ε = .2, tokens with Â > 0 get no
    gradient where s − t > 0.365 nats, tokens with Â < 0 none where t − s > 0.446 nats.

    Args:
        alpha: weight of the old policy in the anchor, in [0, 1].
        teacher_clamp: c; s − t is clamped to [−c, c] first, and where that binds the token keeps α of its gradient.
        clip, dual_clip, reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.
        teacher_logp: teacher's log-probs t of the same tokens; a non-finite value turns that token into α = 1 and counts
            in ``invalid_teacher``.

    Metrics: those of :class:`GRPO`, kl_teacher (mean of s − t) and invalid_teacher (fraction).

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> teacher = torch.tensor([-1.0, -1.0])
        >>> out = rk.losses.TRRD(reduction="token-mean")(
        ...     logp, old_logp=logp.detach(), advantages=torch.ones(2), teacher_logp=teacher
        ... )
        >>> out.token_loss
        tensor([-1.0000, -0.6065])
    """

    reduction: str = "seq-mean-token-mean"
    alpha: float = 0.5
    teacher_clamp: float | None = None

    needs = ("old_logp", "advantages", "teacher_logp")

    def check(self) -> None:
        super().check()
        check_range(self.name, "alpha", self.alpha, 0, 1)
        check_positive(self.name, "teacher_clamp", self.teacher_clamp)

    def tokens(
        self, scores: TokenScores, *, old_logp: Tensor, advantages: Tensor, teacher_logp: Tensor, **shared: Any
    ) -> tuple[Tensor, Metrics]:
        anchor = Anchor(teacher_logp, self.alpha, self.teacher_clamp)
        return self.surrogate(scores.logp, old_logp, advantages, anchor=anchor, **shared)


add_method(
    "trrd",
    "ratio",
    TRRD(),
    formula="−min(rÂ, clip(r, 1−ε, 1+ε)Â), log r = α(s − o) + (1 − α)(s − t)",
    paper="arXiv 2602.22495",
    confidence="B",
    note=(
        "The clip is live at the first step: at α = .5, ε = .2 no gradient where s − t > 0.365 (Â > 0) or t − s > "
        "0.446 (Â < 0). Â = 0: no teacher signal. Without teacher_clamp or dual_clip r is unbounded for Â < 0. α = "
        "1 is grpo."
    ),
    published=(
        "The mean of each sequence's tokens, then of the group's sequences (Eq. 4); α = 0.5; symmetric clip, its ε not seen (0.2 "
        "in arXiv 2609.04108 and here); s − t clamped before mixing (App. B) and a KL to the reference, both values not seen, both "
        "off here; o, t, Â detached."
    ),
)
