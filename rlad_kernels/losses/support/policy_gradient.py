"""Top-K distillation as a policy gradient: the divergence becomes a detached advantage in PPO's clipped ratio."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_choice
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors, TokenLoss
from rlad_kernels.core.types import TokenScores, TopK
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import ClippedLoss
from rlad_kernels.losses.ratio.surrogate import check_clip, clipped_surrogate
from rlad_kernels.losses.support.terms import support
from rlad_kernels.losses.support.topk_kl import TopKKL

WEIGHTS = ("student", "teacher", "none")
FORWARD = TopKKL("forward", normalize="none")


@dataclass(frozen=True, kw_only=True)
class TopKPG(TokenLoss):
    """Σ_v −min(r_v A_v, clip(r_v)A_v), A_v = −w_v(log q_old,v − log p_v) detached, r_v = q_v/q_old,v (arXiv 2604.13016).

    Each candidate of the support is an action with a reward of its own. At the first step the gradient is Σ_v −A_v∇log q_v:
    with ``weight="student"`` and the whole vocabulary as support that of the reverse KL.

    Args:
        weight: w_v ∝ ``student`` q_old,v, ``teacher`` p_v, or ``none``: all alike.
        renormalize: weights sum to one over the support; False: the probabilities themselves (1 for ``none``), as for the
            symmetric difference.
        clip, dual_clip: as of :class:`GRPO`, per candidate.

    Tensors of a call:
        topk_logp: student log-probs ``(…, K)`` at ``teacher.ids``, in nats; what receives gradient.
        old_topk_logp: those of the policy that the rewards are computed with; a non-finite slot is empty.
        teacher: the support and the teacher's log-probs there; thunlp/OPD takes the student's top-K by default
            (:func:`linear_support`), or ``union``, ``intersection``, ``symmetric_difference`` of ``rk.supports``.

    Metrics: those of :class:`GRPO`, means over each token's slots, and invalid_teacher.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> q, p = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> rk.losses.TopKPG()(q, old_topk_logp=q, teacher=rk.TopK(torch.tensor([[0, 1]]), p)).loss
        tensor(0.1438)
    """

    weight: str = "student"
    renormalize: bool = True
    clip: tuple[float, float] | None = (0.2, 0.2)
    dual_clip: float | None = None

    needs = ("old_topk_logp", "teacher")
    reads = ("topk_logp",)

    def check(self) -> None:
        super().check()
        check_choice(self.name, "weight", self.weight, WEIGHTS)
        check_clip(self.name, self.clip, self.dual_clip)

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        old, ids = tensors["old_topk_logp"], tensors["teacher"].ids
        if old.shape != ids.shape:
            raise ValueError(f"{self.name}: old_topk_logp has K={old.shape[-1]}, teacher.ids K={ids.shape[-1]}; they must match")
        return tensors

    def tokens(self, scores: TokenScores, *, old_topk_logp: Tensor, teacher: TopK) -> tuple[Tensor, Metrics]:
        valid, invalid = support(teacher.ids, teacher.logp)
        valid = valid & old_topk_logp.isfinite()
        old, p = torch.where(valid, old_topk_logp, 0), torch.where(valid, teacher.logp, 0)
        by = {"student": old, "teacher": p, "none": torch.zeros_like(old)}[self.weight]
        by = torch.where(valid, by, -torch.inf)
        if self.renormalize:
            some = valid.any(1, keepdim=True)
            by = torch.where(some, torch.where(some, by, 0).log_softmax(1), by)
        advantages = torch.where(valid, (p - old) * by.exp(), 0)
        logp = torch.where(valid, scores.topk_logp, 0)
        loss, metrics = clipped_surrogate(logp.flatten(), old.flatten(), advantages.flatten(), self.clip, self.dual_clip)
        count = valid.sum(1).clamp_min(1)
        found = {k: torch.where(valid, x.view_as(valid), 0) for k, x in metrics.items()}
        means = {k: x.amax(1) if k.endswith("_max") else x.sum(1) / count for k, x in found.items()}
        return torch.where(valid, loss.view_as(valid), 0).sum(1), {**means, "invalid_teacher": invalid.to(loss.dtype)}


@dataclass(frozen=True, kw_only=True)
class TopKAdvantage(ClippedLoss):
    """PPO's clipped loss on the sampled tokens with Â = −sg(truncated KL of the token) (verl's ``use_policy_gradient``).

    The KL itself is not backpropagated, it only lowers whatever was sampled where it is large. As such an advantage does not
    depend on which token was sampled, its expected on-policy gradient is **zero**; kept as published.

    Args:
        topk: the truncated KL.
        clip, dual_clip, reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, topk_logp: student log-probs of the sampled tokens ``(…)``, and ``(…, K)`` at ``teacher.ids``, without gradient.
        old_logp, ref_logp, rollout_logp: as of :class:`GRPO`.
        teacher: as of :class:`TopKKL`.

    Metrics: those of both.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> teacher = rk.TopK(torch.tensor([[0]]), torch.tensor([[0.0]]))
        >>> scores = rk.TokenScores(logp=torch.zeros(1), topk_logp=torch.tensor([[-2.0]]))
        >>> loss = rk.losses.TopKAdvantage(topk=rk.losses.TopKKL("forward", normalize="none"))
        >>> loss(scores, old_logp=torch.zeros(1), teacher=teacher).loss
        tensor(2.)
    """

    topk: TopKKL = field(default_factory=lambda: FORWARD)

    needs = ("old_logp", "teacher")

    def check(self) -> None:
        super().check()
        if not isinstance(self.topk, TopKKL):
            raise ValueError(f"{self.name}: topk must be a TopKKL, got {self.topk!r}")

    def read(self) -> tuple[str, ...]:
        return ("logp", *self.topk.read())

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        return self.topk.prepare(batch, super().prepare(batch, tensors))

    def tokens(self, scores: TokenScores, *, old_logp: Tensor, teacher: TopK, **shared: Any) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            kl, more = self.topk.tokens(scores, teacher=teacher)
        loss, metrics = self.surrogate(scores.logp, old_logp, -kl, **shared)
        return loss, {**more, **metrics}


add_method(
    "thunlp_opd",
    "top-k",
    TopKPG(),
    formula="Σ_S −min(r_v A_v, clip(r_v)A_v), A_v = −q̂_old,v(log q_old,v − log p_v)",
    paper="arXiv 2604.13016",
    confidence="A",
    published=(
        "The script: token mean, K = 16 of the student's top-K, weights student_p, no KL, temperature 1; rewards detached. Whether "
        "verl's dual clip of 3 holds for candidates was not read (none here)."
    ),
)
add_method(
    "verl_topk_pg",
    "top-k",
    TopKAdvantage(topk=TopKKL("forward", normalize="none", logp_floor=-10.0, loss_min=0.0, loss_max=10.0), dual_clip=3.0),
    formula="−min(rÂ, clip(r)Â) with dual clip 3, Â = −sg(clip(Σ_S p(log p − log q), 0, 10))",
    paper="verl trainer/distillation, use_policy_gradient",
    confidence="A",
    published=(
        "0.9.1: token mean, clip 0.2, dual clip 3, top 128, log-probs at least −10, the KL cut to [0, 10] and detached; the "
        "divergence is of the current policy. The same here for any K."
    ),
)
