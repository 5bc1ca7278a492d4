"""A truncated KL whose tail is estimated on the sampled token (EMA-PG's top-K KL)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.check import check_choice, check_numbers, is_pair
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors, TokenLoss
from rlad_kernels.core.types import TokenScores, TopK
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.slopes import WithSlope, times, weighted_slope
from rlad_kernels.losses.support.topk_kl import TopKKL

_EXACT = {direction: TopKKL(direction, normalize="none") for direction in ("reverse", "forward")}


@dataclass(frozen=True, kw_only=True)
class SampledTailKL(TokenLoss):
    """Σ_S q(log q − log p) + 1[y∉S]·sg(s − t)·exp(s − sg s): exact on S, sampled outside it (k4; EMA-PG).

    The value's expectation over y ~ q is the whole KL. The gradient's is not quite, as published: the head's carries +1 in
    u = q(log q/p + 1) on S, which only cancels against the same on the tail, and k4 has none there. What is left over is
    ∇Q_S, the student's mass on S, which the loss therefore lowers (by d/dz_v: q_v(1[v∈S] − Q_S)). ``unbiased=True`` leaves
    s − t undetached, same value, and the expected gradient is that of the whole KL.

    Args:
        direction: ``reverse``, or ``forward``: Σ_S p(log p − log q) + 1[y∉S]·[sg(e^{t−s})(t − s) + s − sg s] (k5), whose
            expected gradient also has ∇(1 − Q_S) too much; ``unbiased=True`` drops s − sg s.
        unbiased: see above.
        iw_clip: bounds of the importance weight sg(e^{s−o}) of ``old_logp``; None does not clamp it.
        scale: factor on value and gradient.

    Tensors of a call:
        logp, topk_logp: student log-probs s of the sampled tokens ``(…)``, and ``(…, K)`` at ``teacher.ids``, in nats.
        target: the sampled tokens ``(…)``; :func:`linear_loss` passes its own.
        teacher: S, with ``target_logp`` t. EMA-PG's S is the top-K of the *old student* for the reverse KL, of the teacher for
            the forward KL: ``linear_support(teacher_hidden, teacher_head, student_ids, target=target)``. A sampled token
            without a finite t has no tail term and counts in ``invalid_teacher``.
        old_logp: log-probs o of an older policy that sampled: the tail term is multiplied by e^{s−o}, without gradient.

    Metrics: student_mass, teacher_mass, invalid_teacher.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> teacher = rk.TopK(torch.tensor([[0]]), torch.tensor([[-1.0]]), target_logp=torch.tensor([-2.0]))
        >>> scores = rk.TokenScores(logp=torch.tensor([-1.5]), topk_logp=torch.tensor([[-1.0]]))
        >>> rk.losses.SampledTailKL()(scores, target=torch.tensor([3]), teacher=teacher).loss
        tensor(0.5000)
    """

    direction: str = "reverse"
    unbiased: bool = False
    iw_clip: tuple[float, float] | None = None
    scale: float = 1.0

    needs = ("target", "teacher")
    takes = ("old_logp",)
    reads = ("logp", "topk_logp")

    def check(self) -> None:
        super().check()
        check_choice(self.name, "direction", self.direction, _EXACT)
        check_numbers(self.name, scale=self.scale)
        clip = self.iw_clip
        if clip is not None and not (is_pair(clip) and 0 <= clip[0] < clip[1]):
            raise ValueError(f"{self.name}: iw_clip must be (low, high) with 0 <= low < high, or None, got {clip!r}")

    def needed(self) -> tuple[str, ...]:
        return (*self.needs, *(("old_logp",) if self.iw_clip else ()))

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        if tensors["teacher"].target_logp is None:
            raise ValueError(f"{self.name}: teacher.target_logp is None; the teacher's log-probs of the sampled tokens are needed")
        return tensors

    def tokens(
        self, scores: TokenScores, *, target: Tensor, teacher: TopK, old_logp: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        head, metrics = _EXACT[self.direction].tokens(TokenScores(topk_logp=scores.topk_logp), teacher=teacher)
        assert teacher.target_logp is not None
        known = teacher.target_logp.isfinite()
        outside = ~(teacher.ids == target.unsqueeze(1)).any(1)
        use = outside & known & scores.logp.detach().isfinite()  # q = 0 has no share
        s, t = torch.where(use, scores.logp, 0), torch.where(use, teacher.target_logp, 0)
        log_w = torch.zeros_like(s)
        if old_logp is not None:
            low, high = (math.log(x) if x else -math.inf for x in self.iw_clip or (0.0, math.inf))
            log_w = torch.where(use, scores.logp.detach() - old_logp, 0).clamp(low, high)
        tail = self.estimate(s, t, log_w.detach())
        invalid = torch.maximum(metrics["invalid_teacher"], (outside & ~known).to(head.dtype))
        return (head + torch.where(use, tail, 0)) * self.scale, {**metrics, "invalid_teacher": invalid}

    def estimate(self, s: Tensor, t: Tensor, log_w: Tensor) -> Tensor:
        """w·x (k4; reverse) or −w·e^{−x}x (k5; forward), x = s − t, with the gradients documented above.

        In log space: w and e^{−x} alone may leave float32 where their product does not.
        """
        x, w = (s - t).detach(), log_w.exp()
        if self.direction == "reverse":
            return WithSlope.apply(s, times(w, x), times(w, 1 + x if self.unbiased else x))  # type: ignore[return-value]
        odds = (log_w - x).exp()  # w·p/q
        slope = -odds if self.unbiased else weighted_slope(log_w, x)
        return WithSlope.apply(s, times(odds, -x), slope)  # type: ignore[return-value]


add_method(
    "ema_pg",
    "top-k",
    SampledTailKL(),
    formula="Σ_S q log(q/p) + 1[y∉S]·sg(s − t)·exp(s − sg s), S = old policy's top-K",
    paper="EMA-PG (LunjunZhang/ema-pg)",
    confidence="A",
    note="As published the expected gradient also lowers the student's mass on S; unbiased=True does not.",
    published="K = 32; 0.001 × this beside GRPO with clip (0.2, 0.28), e^{s−o} on the tail; token mean here, there not read.",
)
