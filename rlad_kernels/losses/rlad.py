"""RLAD's objective: TRRD on the sampled tokens plus a truncated KL to the teacher's top-K (arXiv 2602.22495)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors
from rlad_kernels.core.types import TokenScores, TopK
from rlad_kernels.losses.ratio.trrd import TRRD
from rlad_kernels.losses.support.topk_kl import TopKKL


@dataclass(frozen=True, kw_only=True)
class RLAD(TRRD):
    """TRRD + topk_coef × truncated KL to the teacher (RLAD, arXiv 2602.22495); :func:`linear_loss` runs both in one sweep.

    Args:
        topk: the truncated KL, and
        topk_coef: its factor; both or neither.
        alpha, teacher_clamp, clip, dual_clip, reference, rollout: as of :class:`TRRD`; one reduction for both terms.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`; with ``topk`` also topk_logp.
        teacher_logp: teacher's log-probs of the targets; defaults to ``teacher.target_logp``.
        teacher: :class:`TopK` of the teacher (:func:`linear_topk`), needed with ``topk``.

    Metrics: those of both terms.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> hidden, head, target = torch.randn(2, 3, 8, requires_grad=True), rk.LMHead(torch.randn(32, 8)), torch.ones(2, 3).long()
        >>> teacher = rk.linear_topk(torch.randn(2, 3, 8), head, 4, target=target)
        >>> old = rk.linear_logp(hidden.detach(), head, target).logp
        >>> rlad = rk.losses.RLAD(alpha=0.5, topk=rk.losses.TopKKL("reverse", normalize="tail"), topk_coef=0.5)
        >>> out = rk.linear_loss(hidden, head, target, rlad, old_logp=old, advantages=torch.ones(2), teacher=teacher)
        >>> out.loss.backward()
    """

    topk: TopKKL | None = None
    topk_coef: float | None = None

    needs = ("old_logp", "advantages")
    takes = (*TRRD.takes, "teacher_logp", "teacher")

    def check(self) -> None:
        super().check()
        if (self.topk is None) != (self.topk_coef is None):
            raise ValueError(f"{self.name}: topk and topk_coef go together, got {self.topk!r} and {self.topk_coef!r}")
        if self.topk is not None:
            if not isinstance(self.topk, TopKKL):
                raise ValueError(f"{self.name}: topk must be a TopKKL or None, got {self.topk!r}")
            check_numbers(self.name, topk_coef=self.topk_coef)

    def needed(self) -> tuple[str, ...]:
        return (*super().needed(), *(("teacher",) if self.topk else ()))

    def read(self) -> tuple[str, ...]:
        return ("logp", *self.topk.read()) if self.topk else self.reads

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        tensors = super().prepare(batch, tensors)
        rest, teacher = {k: x for k, x in tensors.items() if k != "teacher"}, tensors.get("teacher")
        if rest.get("teacher_logp") is None:
            if teacher is None or teacher.target_logp is None:
                raise ValueError(
                    f"{self.name}: teacher_logp is None; pass it, or a teacher with target_logp (linear_topk(…, target=…))"
                )
            rest = {**rest, "teacher_logp": teacher.target_logp}
        return rest if self.topk is None else self.topk.prepare(batch, {**rest, "teacher": teacher})

    def tokens(self, scores: TokenScores, *, teacher: TopK | None = None, **sampled: Any) -> tuple[Tensor, Metrics]:
        loss, metrics = super().tokens(scores, **sampled)
        if self.topk is None or self.topk_coef is None or teacher is None:
            return loss, metrics
        kl, more = self.topk.tokens(scores, teacher=teacher)
        invalid = torch.maximum(metrics["invalid_teacher"], more["invalid_teacher"])
        return loss + self.topk_coef * kl, {**metrics, **more, "invalid_teacher": invalid}
