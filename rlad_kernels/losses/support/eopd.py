"""EOPD: the teacher's log-ratio as PPO advantage, and a forward KL where the teacher is uncertain (arXiv 2603.07079)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers, is_number
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors
from rlad_kernels.core.types import TokenScores, TopK
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import ClippedLoss
from rlad_kernels.losses.support.topk_kl import TopKKL

_FORWARD = TopKKL("forward", normalize="teacher")


@dataclass(frozen=True, kw_only=True)
class EOPD(ClippedLoss):
    """−min(rÂ, clip(r, 1±ε)Â) + 1[H_T > τ]·Σ_S p̃(log p̃ − log q), Â = t − o, r = e^{s−o} (EOPD, arXiv 2603.07079).

    p̃ is the teacher renormalised over its top-K (16 in the paper), q the student's full softmax, not renormalised; H_T the
    teacher's entropy over the whole vocabulary. The paper's Eq. 4 is ``seq-mean-token-mean``, its Algorithm 1 ``token-mean``.

    Args:
        entropy_threshold: τ in nats; inf is never.
        kl_coef: factor on the forward KL; 1 in the paper.
        clip, dual_clip, reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, topk_logp: student log-probs s of the sampled tokens ``(…)``, and ``(…, K)`` at ``teacher.ids``, in nats.
        old_logp, ref_logp, rollout_logp: as of :class:`GRPO`.
        teacher: ``linear_topk(hidden, head, 16, target=tokens, entropy=True)``; a non-finite ``target_logp`` has advantage 0
            and counts in ``invalid_teacher``, an entropy of NaN adds no KL.

    Metrics: those of :class:`GRPO` and :class:`TopKKL`.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> one = torch.zeros(1)
        >>> teacher = rk.TopK(torch.tensor([[2]]), torch.tensor([[-1.0]]), target_logp=one - 2, entropy=one + 1.5)
        >>> scores = rk.TokenScores(logp=one - 1, topk_logp=torch.tensor([[-3.0]]))
        >>> rk.losses.EOPD()(scores, old_logp=one - 1, teacher=teacher).loss
        tensor(4.)
    """

    entropy_threshold: float = 0.8
    kl_coef: float = 1.0

    needs = ("old_logp", "teacher")
    reads = ("logp", "topk_logp")

    def check(self) -> None:
        super().check()
        check_numbers(self.name, kl_coef=self.kl_coef)
        if not is_number(self.entropy_threshold) or self.entropy_threshold != self.entropy_threshold:
            raise ValueError(f"{self.name}: entropy_threshold must be a number, got {self.entropy_threshold!r}")

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        for field in ("target_logp", "entropy"):
            if getattr(tensors["teacher"], field) is None:
                raise ValueError(f"{self.name}: teacher.{field} is None; linear_topk(…, target=…, entropy=True) gives it")
        return super().prepare(batch, tensors)

    def tokens(self, scores: TokenScores, *, old_logp: Tensor, teacher: TopK, **shared: Any) -> tuple[Tensor, Metrics]:
        t, entropy = teacher.target_logp, teacher.entropy
        assert t is not None and entropy is not None
        finite = t.isfinite()
        advantages = torch.where(finite, torch.where(finite, t, 0) - old_logp, 0)
        loss, metrics = self.surrogate(scores.logp, old_logp, advantages, **shared)
        kl, more = _FORWARD.tokens(TokenScores(topk_logp=scores.topk_logp), teacher=teacher)
        invalid = torch.maximum(more["invalid_teacher"], (~finite).to(loss.dtype))
        uncertain = entropy > self.entropy_threshold
        return loss + torch.where(uncertain, self.kl_coef * kl, 0), {**more, **metrics, "invalid_teacher": invalid}


add_method(
    "eopd",
    "top-k",
    EOPD(),
    formula="−min(rÂ, clip(r, 1−ε, 1+ε)Â) + 1[H_T > τ]·Σ_S p̃(log p̃ − log q), Â = t − o",
    paper="arXiv 2603.07079",
    confidence="A",
    note="q is not renormalised. The paper's Eq. 4 averages over sequences, its Algorithm 1 over tokens, as here.",
    published=(
        "Algorithm 1: the mean over the mini-batch's tokens, as here; Eq. 4: each sequence's mean first. τ = 0.8, k = 16, ε = 0.2, "
        "both terms with factor 1; Â, p̃ and H_T detached."
    ),
)
