"""SDPO: the policy, told what was wrong with its answer, as its own teacher (arXiv 2601.20802)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlad_kernels.core.check import check_positive
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors, TokenLoss
from rlad_kernels.core.types import TokenScores, TopK
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.mopd import MOPD
from rlad_kernels.losses.ratio.rollout import Rollout
from rlad_kernels.losses.support.topk_kl import TopKKL

_JSD = TopKKL("jsd", normalize="tail")
FAR = 20.0  # nats: beyond it the log of the weight is clamped


@dataclass(frozen=True, kw_only=True)
class SDPO(TokenLoss):
    """min(e^{s−o}, c)·D(p, q) on K tokens and their tail, the weight without gradient (SDPO, arXiv 2601.20802).

    q is the policy, p the same model (or its moving average) with feedback, or an answer that succeeded, in its prompt: what it
    says of the tokens that the policy sampled without. The variant over the whole vocabulary is ``METHODS["gkd_jsd"]``, with the
    weight as ``weights``; that on the sampled token alone ``METHODS["sdpo_sampled"]``.

    Args:
        topk: D. SDPO's α is ``beta``: the JSD with m = αp + (1−α)q inside (0, 1), ``forward`` at 0, ``reverse`` at 1;
            ``normalize="both"`` is SDPO without the tail.
        ratio_clip: c; None leaves the weight out.

    Tensors of a call:
        logp, topk_logp: student log-probs s of the sampled tokens ``(…)``, and ``(…, K)`` at ``teacher.ids``, in nats.
        tail_logp: as of :class:`TopKKL`.
        old_logp: log-probs o of the policy that sampled ``(…)``, for ``ratio_clip``.
        teacher: the *student's* top-K (100), scored by the teacher behind the prompt with feedback:
            ``linear_support(teacher_hidden, teacher_head, linear_topk(hidden, head, 100).ids)``. ``mask`` leaves out the answers
            for which there is no feedback.

    Metrics: those of :class:`TopKKL`.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> q, p = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
        >>> teacher = rk.TopK(torch.tensor([[0, 1]]), p, tail_logp=torch.tensor([0.25]).log())
        >>> scores = rk.TokenScores(logp=torch.zeros(1), topk_logp=q, tail_logp=torch.tensor([0.25]).log())
        >>> rk.losses.SDPO()(scores, old_logp=torch.full((1,), -5.0), teacher=teacher).loss
        tensor(0.0849)
    """

    topk: TopKKL = field(default_factory=lambda: _JSD)
    ratio_clip: float | None = 2.0

    needs = ("teacher",)
    takes = ("old_logp",)

    def check(self) -> None:
        super().check()
        check_positive(self.name, "ratio_clip", self.ratio_clip)
        if not isinstance(self.topk, TopKKL):
            raise ValueError(f"{self.name}: topk must be a TopKKL, got {self.topk!r}")

    def needed(self) -> tuple[str, ...]:
        return self.needs if self.ratio_clip is None else ("old_logp", *self.needs)

    def read(self) -> tuple[str, ...]:
        return ("logp", *self.topk.read())

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        return self.topk.prepare(batch, tensors)

    def tokens(self, scores: TokenScores, *, teacher: TopK, old_logp: Tensor | None = None) -> tuple[Tensor, Metrics]:
        loss, metrics = self.topk.tokens(scores, teacher=teacher)
        if self.ratio_clip is None or old_logp is None:
            return loss, metrics
        weight = (scores.logp.detach() - old_logp).clamp(-FAR, FAR).exp().clamp(max=self.ratio_clip)
        return torch.where(loss == 0, 0, weight) * loss, metrics


add_method(
    "sdpo",
    "top-k",
    SDPO(),
    formula="min(e^{s−o}, 2)·[½KL(p‖m) + ½KL(q‖m)] on S and its tail, S = student's top-K, p = the policy under feedback",
    paper="arXiv 2601.20802",
    confidence="A",
    note="The teacher is linear_support of the student's top-K, behind the prompt with feedback, weights averaged in the paper.",
    published="lasgroup/SDPO's defaults: K 100, α ½, tail, weight ≤ 2, token-mean, weights averaged at 0.05; its script for rich "
    "feedback: K 20, α 1, 0.01. Teacher and weight detached, as here. It clamps S's mass at 1 − 1e-7; our tail is the sweep's.",
)
add_method(
    "sdpo_sampled",
    "ratio",
    MOPD(reduction="token-mean", rollout=Rollout("truncate", high=2.0, policy="current")),
    formula="min(sg[π/π_old], 2)·sg[s − t]·s, t of the policy under feedback",
    paper="arXiv 2601.20802",
    confidence="A",
    note="`rollout_logp` is the old policy's log-prob. The value is no objective, only its gradient is meant.",
    published="lasgroup/SDPO without full_logit_distillation, reverse KL only; TRL's default mode. Weight ≤ 2, token-mean; the "
    "weight's log-ratio is clamped at ±20 there, not here.",
)
