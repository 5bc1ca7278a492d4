"""DPPO: the trust region is a bound on the policies' divergence in place of a clip of the ratio (arXiv 2602.04879)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.check import check_choice, check_positive, is_pair
from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import SampledLoss, ratio_metrics, reinforced
from rlad_kernels.losses.ratio.slopes import times

DIVERGENCES = ("tv", "kl")


def binary_divergence(logp: Tensor, old_logp: Tensor, divergence: str) -> Tensor:
    """TV or KL(π_old‖π) of the sampled token against all others, from the two log-probs."""
    p, old = logp.exp(), old_logp.exp()
    if divergence == "tv":
        return (p - old).abs()
    rest, old_rest = ((-torch.expm1(x)).clamp_min(0) for x in (logp, old_logp))  # a log-prob may round to above 0
    return times(old, old_logp - logp) + torch.where(old_rest == 0, 0, old_rest * (old_rest.log() - rest.log()))


@dataclass(frozen=True, kw_only=True)
class DPPO(SampledLoss):
    """DPPO: −M·sg[r]·Â·s, r = exp(s − o), M = 0 where D(π_old, π) > δ and Â pushes π further away, else 1 (arXiv 2602.04879).

    D is the divergence of the sampled token against all others: TV, |π − π_old|, or KL(π_old‖π). A rare token may so change by a
    large ratio, a likely one by a small one only. As a ratio's clip, M never stops a step back towards π_old. The value is no
    objective, only its gradient is meant, −M·r·Â: the clipped surrogate's with another mask.

    Args:
        divergence: ``tv`` or ``kl``.
        delta: (δ_low, δ_high), the bounds for Â < 0 and for Â > 0, in probability or in nats.
        ratio_max: r is cut to at most this in the weight; None does not. The paper wants it large, if at all.
        reference, rollout: as of :class:`GRPO`. In the paper π_old is the sampler itself: pass its log-probs as ``old_logp``.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.

    Metrics: those of :class:`GRPO`; clip_frac_low/high are where M = 0 for Â < 0 and for Â > 0.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.tensor([0.5, 0.04]).log().requires_grad_()
        >>> old = torch.tensor([0.3, 0.01]).log()  # the second's ratio is 4, and it moved by 0.03
        >>> out = rk.losses.DPPO()(logp, old_logp=old, advantages=torch.ones(2), reduction="token-mean")
        >>> torch.autograd.grad(out.loss, logp)[0]
        tensor([ 0., -2.])
    """

    divergence: str = "tv"
    delta: tuple[float, float] = (0.15, 0.15)
    ratio_max: float | None = None

    needs = ("old_logp", "advantages")

    def check(self) -> None:
        super().check()
        check_choice(self.name, "divergence", self.divergence, DIVERGENCES)
        check_positive(self.name, "ratio_max", self.ratio_max)
        if not (is_pair(self.delta) and min(self.delta) >= 0):
            raise ValueError(f"{self.name}: delta must be (low, high), both at least 0, got {self.delta!r}")

    def tokens(
        self,
        scores: TokenScores,
        *,
        old_logp: Tensor,
        advantages: Tensor,
        ref_logp: Tensor | None = None,
        rollout_logp: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        logp = scores.logp
        advantages, found = self.weighed(advantages, logp, old_logp, rollout_logp)
        metrics = ratio_metrics(logp, old_logp)
        gap, apart = metrics["kl_old"], binary_divergence(logp.detach(), old_logp, self.divergence)
        low = (advantages < 0) & (gap < 0) & (apart > self.delta[0])
        high = (advantages > 0) & (gap > 0) & (apart > self.delta[1])
        r = metrics["ratio_mean"].clamp(max=math.inf if self.ratio_max is None else self.ratio_max)
        loss = reinforced(logp, times(torch.where(low | high, 0, r), advantages))
        clipped = {"clip_frac_low": low.to(r.dtype), "clip_frac_high": high.to(r.dtype)}
        return self.reference.add(loss, {**clipped, **metrics, **found}, logp, ref_logp, old_logp)


_PUBLISHED = (
    "verl's {}, by the authors: δ = {} on both sides, sums of sequences over a constant, r detached, cut at 10,000 in its example "
    "and s − o clamped to ±20; the sampler is π_old. Ours: token-mean, no cut, no clamp. The paper itself was not read in full."
)
add_method(
    "dppo_tv",
    "ratio",
    DPPO(),
    formula="−M·sg[r]·Â·s, M = 0 where |π − π_old| > .15 and Â·(π − π_old) > 0, else 1",
    paper="arXiv 2602.04879",
    confidence="A",
    published=_PUBLISHED.format("dppo_tv", "0.15"),
)
add_method(
    "dppo_kl",
    "ratio",
    DPPO(divergence="kl", delta=(0.05, 0.05)),
    formula="−M·sg[r]·Â·s, M = 0 where KL(π_old‖π) of the token against the rest > .05 and Â·(π − π_old) > 0, else 1",
    paper="arXiv 2602.04879",
    confidence="A",
    published=_PUBLISHED.format("dppo_kl", "0.05") + " Its KL has 1e-8 added to 1 − π.",
)
