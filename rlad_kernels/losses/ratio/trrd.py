"""TRRD, RLAD's loss on sampled tokens: the clipped surrogate anchored between the old policy and a teacher (arXiv 2602.22495)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlad_kernels.core.check import needs
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.rollout import Rollout
from rlad_kernels.losses.ratio.sampled import clipped_loss, on_sampled
from rlad_kernels.losses.ratio.surrogate import check_anchor, ratio_loss_tokens


@on_sampled("trrd")
def trrd_tokens(logp: Tensor, *, alpha: float = 0.5, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate on TRRD's ratio, and its metrics; all tensors ``(N,)``."""
    return ratio_loss_tokens(logp, alpha=alpha, **inputs)


def trrd_loss(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, *, alpha: float = 0.5,
    clip: tuple[float, float] = (0.2, 0.2), teacher_clamp: float | None = None, dual_clip: float | None = None,
    ref_logp: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3", reduction: str = "seq-mean-token-mean",
    seq_ids: Tensor | None = None, denominator: float | Tensor | None = None, rollout_logp: Tensor | None = None,
    rollout: Rollout | None = None,
) -> LossOutput:  # fmt: skip
    """TRRD: the clipped surrogate with r = π/(π_old^α·π_T^{1−α}), log r = α(s−o) + (1−α)(s−t) (RLAD, arXiv 2602.22495).

    α = 1 is GRPO. With α < 1 the clip is live at the first step already: at α = .5, ε = .2, tokens with Â > 0 get no
    gradient where s − t > 0.365 nats, tokens with Â < 0 none where t − s > 0.446 nats.

    Args:
        teacher_logp: teacher's log-probs t of the same tokens; a non-finite value turns that token into α = 1 and counts
            in ``invalid_teacher``.
        alpha: weight of the old policy in the anchor, in [0, 1].
        teacher_clamp: c; s − t is clamped to [−c, c] first, and where that binds the token keeps α of its gradient.
        logp, old_logp, advantages, mask, clip, dual_clip, ref_logp, kl_coef, kl_estimator, reduction, seq_ids, denominator,
            rollout_logp, rollout: as in :func:`grpo_loss`.

    Returns:
        LossOutput. Metrics: those of :func:`grpo_loss`, kl_teacher (mean of s − t) and invalid_teacher (fraction).

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    if teacher_logp is None:
        raise ValueError("trrd_loss: teacher_logp is None, wanted a tensor in logp's shape (without a teacher: grpo_loss)")
    needs("trrd_loss", old_logp=old_logp, advantages=advantages)
    check_anchor("trrd_loss", alpha, teacher_clamp)
    return clipped_loss(
        "trrd_loss", trrd_tokens, logp, {"old_logp": old_logp, "teacher_logp": teacher_logp, "advantages": advantages}, mask,
        {"alpha": alpha, "teacher_clamp": teacher_clamp}, clip=clip, dual_clip=dual_clip, ref_logp=ref_logp, kl_coef=kl_coef,
        kl_estimator=kl_estimator, reduction=reduction, seq_ids=seq_ids, denominator=denominator, rollout_logp=rollout_logp,
        rollout=rollout,
    )  # fmt: skip


add_method(
    "trrd", "ratio", trrd_loss, formula="−min(rÂ, clip(r, 1−ε, 1+ε)Â), log r = α(s − o) + (1 − α)(s − t)",
    needs=("old_logp", "teacher_logp", "advantages"), paper="arXiv 2602.22495", confidence="B", products=3,
    note=(
        "The clip is live at the first step: at α = .5, ε = .2 no gradient where s − t > 0.365 (Â > 0) or t − s > "
        "0.446 (Â < 0). Â = 0: no teacher signal. Without teacher_clamp or dual_clip r is unbounded for Â < 0. α = "
        "1 is grpo."
    ),
)  # fmt: skip
