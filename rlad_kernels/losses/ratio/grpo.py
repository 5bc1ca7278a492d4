"""GRPO and PPO on sampled tokens, and the methods that are only options of it: Dr. GRPO, DAPO, BNPO, TIS, IcePop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.rollout import ICEPOP, TIS
from rlad_kernels.losses.ratio.sampled import ClippedLoss


@dataclass(frozen=True, kw_only=True)
class GRPO(ClippedLoss):
    """GRPO/PPO clipped surrogate: −min(rÂ, clip(r, 1−ε_low, 1+ε_high)Â) with r = exp(s − o) (arXiv 2402.03300).

    Where the clip binds the token has no gradient, and neither has Â = 0. DAPO is clip = (0.2, 0.28). Beyond s − o = 88.7 r is
    inf in float32: clipped tokens are right there, others (Â < 0 without dual_clip) have the loss and the gradient inf, and with
    a k3 or k5 that overflows as well (s < ref − 88.7) no sum of the two.

    Args:
        clip: (ε_low, ε_high); None never clips.
        dual_clip: c > 1; for Â < 0 the token loss is min(PPO loss, −c·Â).
        reference: :class:`Reference`, adds coef × an estimate of KL(π‖π_ref) to each token.
        rollout: :class:`Rollout`, how ``rollout_logp`` weighs the tokens; None is TIS, min(π_old/μ, 2).
        reduction: how tokens become one number, unless a call says otherwise.

    Tensors of a call:
        logp: log-probs s of the sampled tokens in nats, ``(B, T)`` or packed ``(N,)``; what receives gradient.
        old_logp: log-probs o of the policy that sampled, same shape.
        advantages: Â, ``(B,)`` or the log-probs' shape.
        ref_logp: log-probs of the reference, needed for ``reference.coef`` ≠ 0.
        rollout_logp: log-probs μ of the engine that sampled.

    Metrics: clip_frac_low/high, ratio_mean, ratio_max, kl_old (mean of s − o), kl_ref, rollout_weight_mean, rollout_clip_frac.

    Raises:
        ValueError: naming the option or argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
        >>> old, advantages = logp.detach() - 0.1, torch.tensor([1.0, -1.0])
        >>> rk.losses.GRPO(clip=(0.2, 0.28))(logp, old_logp=old, advantages=advantages).loss.backward()
        >>> logp.grad
        tensor([[-0.2763, -0.2763],
                [ 0.2763,  0.2763]])
    """

    needs = ("old_logp", "advantages")

    def tokens(self, scores: TokenScores, *, old_logp: Tensor, advantages: Tensor, **shared: Any) -> tuple[Tensor, Metrics]:
        return self.surrogate(scores.logp, old_logp, advantages, **shared)


_FORMULA = "−min(rÂ, clip(r, 1−ε, 1+ε)Â), r = exp(s − o)"
add_method(
    "grpo",
    "ratio",
    GRPO(reduction="seq-mean-token-mean"),
    formula=f"{_FORMULA}; mean of the sequences' means",
    paper="arXiv 2402.03300",
    confidence="A",
    published=(
        "The mean of each sequence's tokens, then of the group's sequences; ε is not stated (0.2 here); k3 to the reference in the "
        "loss, β = 0.04 (none here: Reference(0.04)); Â normalised in its group, detached."
    ),
)
add_method(
    "dr_grpo",
    "ratio",
    GRPO(reduction="seq-mean-token-sum"),
    formula=f"{_FORMULA}; Σ over tokens / (B·L_max)",
    paper="arXiv 2503.20783",
    confidence="B",
    required={"denominator": "B·L_max, a constant, in place of the number of sequences"},
    published=(
        "Sums over a sequence's tokens by one constant, the generation budget, then the mean over sequences; Â = R − mean, not "
        "divided by the deviation; no KL; the value of ε was not read (0.2 here)."
    ),
)
add_method(
    "dapo",
    "ratio",
    GRPO(clip=(0.2, 0.28)),
    formula=f"{_FORMULA}; ε = (0.2, 0.28), mean over all tokens",
    paper="arXiv 2503.14476",
    confidence="B",
    published=(
        "The mean over all tokens of the group (Eq. 8), ε = (0.2, 0.28), no KL, no dual clip; its verl recipe has one of 10 "
        "besides. Dynamic sampling and the overlong penalty belong to the data."
    ),
)
add_method(
    "bnpo",
    "ratio",
    GRPO(),
    formula=f"{_FORMULA}; mean over the local batch's tokens",
    paper="TRL",
    confidence="B",
    published="TRL's loss_type='bnpo': the mean over the local batch's tokens, ε = 0.2 on both sides, β = 0. The same here.",
)
add_method(
    "tis",
    "ratio",
    GRPO(rollout=TIS),
    formula=f"min(π_old/μ, 2)·({_FORMULA})",
    paper="Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    confidence="A",
    published=(
        "min(π_old/μ, C) outside PPO's clipped surrogate, detached; an expectation over tokens, no reduction stated, runs on "
        "DAPO's recipe; C is a hyper-parameter, 2 in verl (and here)."
    ),
)
add_method(
    "icepop",
    "ratio",
    GRPO(reduction="seq-mean-token-mean", rollout=ICEPOP),
    formula=f"π_old/μ·1[.5 ≤ π_old/μ ≤ 5]·({_FORMULA}); mean of the sequences' means",
    paper="IcePop, Ring-1T (arXiv 2510.18855)",
    confidence="A",
    published=(
        "The mean of each sequence's tokens, then of the group's sequences; α = 0.5, β = 5 and a KL coefficient of 0 in Ring-1T's "
        "run; the mask multiplies the clipped surrogate; ε is not stated (0.2 here)."
    ),
)
