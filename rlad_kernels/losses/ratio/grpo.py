"""GRPO and PPO on sampled tokens, and the methods that are only options of it: Dr. GRPO, DAPO, BNPO, TIS, IcePop."""

from __future__ import annotations

from torch import Tensor

from rlad_kernels.core.check import needs
from rlad_kernels.core.registry import add_method
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.rollout import ICEPOP, TIS, Rollout
from rlad_kernels.losses.ratio.sampled import clipped_loss, on_sampled
from rlad_kernels.losses.ratio.surrogate import ratio_loss_tokens

on_sampled("grpo")(ratio_loss_tokens)


def grpo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, *, clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None, ref_logp: Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3",
    reduction: str = "token-mean", seq_ids: Tensor | None = None, denominator: float | Tensor | None = None,
    rollout_logp: Tensor | None = None, rollout: Rollout | None = None,
) -> LossOutput:  # fmt: skip
    """GRPO/PPO clipped surrogate: −min(rÂ, clip(r, 1−ε_low, 1+ε_high)Â) with r = exp(s − o) (arXiv 2402.03300).

    Args:
        logp: current log-probs s in nats, ``(B, T)`` or packed ``(N,)``; the only input that receives gradient.
        old_logp: log-probs o of the policy that sampled, same shape.
        advantages: ``(B,)`` or ``(B, T)`` for ``(B, T)`` log-probs; ``(N,)`` packed.
        mask: bool or 0/1 in the log-probs' shape; None is all.
        clip: (ε_low, ε_high).
        dual_clip: c > 1; for Â < 0 the token loss is min(PPO loss, −c·Â).
        ref_logp, kl_coef, kl_estimator: adds kl_coef × estimator (k2, k3, k3+, k3++, k4, k5) of KL(π‖π_ref) to each token.
            On-policy, k2, k3+, k3++ and k4 have the reverse KL's expected gradient, k3 and k5 the *forward* KL's. k1 raises: its
            expected gradient is 0 whatever the reference. With kl_coef = 0 the estimate is only a metric.
        reduction: ``token-mean``, ``seq-mean-token-mean`` or ``seq-mean-token-sum``.
        seq_ids: ``(N,)`` non-decreasing ints, needed by the ``seq-`` reductions of packed tokens.
        denominator: replaces the last divisor (tokens or sequences). Dr. GRPO: ``seq-mean-token-sum`` over B·L_max.
        rollout_logp, rollout: log-probs μ of the engine that sampled, and how :class:`Rollout` weighs the tokens by π_old/μ;
            None is TIS, min(π_old/μ, 2). A weight that underflows (log π_old/μ < −103 in float32) is 0, whatever r is.

    Where the clip binds the token has no gradient, and neither has Â = 0. DAPO is clip = (0.2, 0.28). Beyond s − o = 88.7 r is
    inf in float32: clipped tokens are right there, others (Â < 0 without dual_clip) have the loss and the gradient inf, and with
    a k3 or k5 that overflows as well (s < ref − 88.7) no sum of the two.

    Returns:
        LossOutput. Metrics: clip_frac_low/high, ratio_mean, ratio_max, kl_old (mean of s − o), kl_ref, rollout_weight_mean,
        rollout_clip_frac.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    needs("grpo_loss", old_logp=old_logp, advantages=advantages)
    return clipped_loss(
        "grpo_loss", ratio_loss_tokens, logp, {"old_logp": old_logp, "advantages": advantages}, mask, {},
        clip=clip, dual_clip=dual_clip, ref_logp=ref_logp, kl_coef=kl_coef, kl_estimator=kl_estimator, reduction=reduction,
        seq_ids=seq_ids, denominator=denominator, rollout_logp=rollout_logp, rollout=rollout,
    )  # fmt: skip


_FORMULA, _NEEDS = "−min(rÂ, clip(r, 1−ε, 1+ε)Â), r = exp(s − o)", ("old_logp", "advantages")
add_method(
    "grpo", "ratio", grpo_loss, formula=_FORMULA, needs=_NEEDS, paper="arXiv 2402.03300", confidence="A", products=3,
)  # fmt: skip
add_method(
    "dr_grpo", "ratio", grpo_loss, formula=f"{_FORMULA}; Σ over tokens / (B·L_max)", needs=_NEEDS, paper="arXiv 2503.20783",
    confidence="B", products=3, options={"reduction": "seq-mean-token-sum"},
    required={"denominator": "B·L_max, a constant, in place of the number of sequences"},
)  # fmt: skip
add_method(
    "dapo", "ratio", grpo_loss, formula=f"{_FORMULA}; ε = (0.2, 0.28), mean over all tokens", needs=_NEEDS,
    paper="arXiv 2503.14476", confidence="B", products=3, options={"clip": (0.2, 0.28), "reduction": "token-mean"},
)  # fmt: skip
add_method(
    "bnpo", "ratio", grpo_loss, formula=f"{_FORMULA}; mean over the local batch's tokens", needs=_NEEDS, paper="TRL",
    confidence="B", products=3, options={"reduction": "token-mean"},
)  # fmt: skip
add_method(
    "tis", "ratio", grpo_loss, formula=f"min(π_old/μ, 2)·({_FORMULA})", needs=(*_NEEDS, "rollout_logp"),
    paper="truncated importance sampling", confidence="B", products=3, options={"rollout": TIS},
)  # fmt: skip
add_method(
    "icepop", "ratio", grpo_loss, formula=f"π_old/μ·1[.5 ≤ π_old/μ ≤ 5]·({_FORMULA})", needs=(*_NEEDS, "rollout_logp"),
    paper="IcePop, Ring-1T", confidence="B", products=3, options={"rollout": ICEPOP},
)  # fmt: skip
