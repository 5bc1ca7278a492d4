"""Clip-Cov and KL-Cov: the few tokens of large covariance are held back, so that the entropy stays (arXiv 2505.22617)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers, check_range, is_pair
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import ClippedLoss, SampledLoss
from rlad_kernels.losses.ratio.surrogate import NO_CLIP, clipped_surrogate


def covariances(logp: Tensor, advantages: Tensor, keep: Tensor) -> Tensor:
    """(s − mean s)(Â − mean Â) of each token, the means over the kept ones, without gradient; −∞ at others; all ``(N,)``."""
    logp = logp.detach()
    keep = keep & logp.isfinite()
    count = keep.sum().clamp_min(1)
    centred = [x - torch.where(keep, x, 0).sum() / count for x in (torch.where(keep, logp, 0), advantages)]
    return torch.where(keep, centred[0] * centred[1], -math.inf)


def how_many(keep: Tensor, fraction: float) -> Tensor:
    """That fraction of the kept tokens, rounded down, and at least one."""
    return (keep.sum().double() * fraction).floor().long().clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class ClipCov(ClippedLoss):
    """Clip-Cov: GRPO, and of the tokens with cov in (low, high) a few that have no loss, cov = (s − mean s)(Â − mean Â)
    (arXiv 2505.22617).

    The covariance of a token's log-prob with its advantage is what makes the entropy fall: likely tokens with a large Â. The
    means are the batch's, over its kept tokens. A ``fraction`` of them, at least one, is taken from those that are in the bounds
    and not clipped. The official code draws them at random; here they are evenly spaced among the candidates in the batch's
    order, so that the same batch gives the same loss. The means read other tokens' scores: :func:`linear_loss` runs it on
    :func:`linear_logp`, at four products; they are those of one call, not of an accumulated batch.

    Args:
        fraction: of the kept tokens that lose their loss, in [0, 1].
        bounds: (low, high) of the covariance, both excluded.
        clip, dual_clip, reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.

    Metrics: those of :class:`GRPO`, and cov_frac, the fraction of tokens taken.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.tensor([[-0.1, -3.0], [-3.0, -3.0]])
        >>> loss = rk.losses.ClipCov(bounds=(1.0, 5.0))
        >>> loss(logp, old_logp=logp, advantages=torch.tensor([[2.0, 0.5], [0.5, 0.5]])).token_loss
        tensor([[ 0.0000, -0.5000],
                [-0.5000, -0.5000]])
    """

    fraction: float = 2e-4
    bounds: tuple[float, float] = (1.0, 5.0)

    needs = ("old_logp", "advantages")
    rowwise = False

    def check(self) -> None:
        super().check()
        check_range(self.name, "fraction", self.fraction, 0, 1)
        if not (is_pair(self.bounds) and self.bounds[0] <= self.bounds[1]):
            raise ValueError(f"{self.name}: bounds must be (low, high) with low <= high, got {self.bounds!r}")

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        return {**super().prepare(batch, tensors), "keep": batch.keep}

    def tokens(
        self,
        scores: TokenScores,
        *,
        old_logp: Tensor,
        advantages: Tensor,
        keep: Tensor,
        **shared: Any,
    ) -> tuple[Tensor, Metrics]:
        logp, (low, high), (clip_low, clip_high) = scores.logp, self.bounds, self.clip or NO_CLIP
        r = (logp - old_logp).detach().exp()
        clipped = ((advantages < 0) & (r < 1 - clip_low)) | ((advantages > 0) & (r > 1 + clip_high))
        cov = covariances(logp, advantages, keep)
        able = (cov > low) & (cov < high) & ~clipped
        place, some = able.cumsum(0), able.sum().clamp_min(1)
        wanted = torch.minimum(how_many(keep, self.fraction), some)
        taken = able & (place * wanted // some > (place - 1) * wanted // some)
        loss, metrics = self.surrogate(logp, old_logp, torch.where(taken, 0, advantages), **shared)
        return loss, {**metrics, "cov_frac": taken.to(loss.dtype)}


@dataclass(frozen=True, kw_only=True)
class KLCov(SampledLoss):
    """KL-Cov: −rÂ + coef·|s − o| on the ``fraction`` of tokens of largest covariance, −rÂ on others (arXiv 2505.22617).

    The covariance and its means are those of :class:`ClipCov`, as is what follows from them: four products, and the statistics
    of one call. There is no clip. Equal covariances are taken in the batch's order.

    Args:
        fraction: of the kept tokens that are held to the old policy, at least one of them; in [0, 1].
        coef: factor on |s − o|.
        reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.

    Metrics: those of :class:`GRPO`, and cov_frac, the fraction of tokens held.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.tensor([-0.1, -3.0, -3.0, -3.0], requires_grad=True)
        >>> given = {"old_logp": torch.tensor([-0.6, -3.0, -3.0, -3.0]), "advantages": torch.tensor([2.0, 0.0, 0.0, 0.0])}
        >>> out = rk.losses.KLCov(fraction=0.25)(logp, **given)
        >>> out.token_loss[0]  # −2e^0.5 + 0.5
        tensor(-2.7974)
    """

    fraction: float = 2e-4
    coef: float = 1.0

    needs = ("old_logp", "advantages")
    rowwise = False

    def check(self) -> None:
        super().check()
        check_range(self.name, "fraction", self.fraction, 0, 1)
        check_numbers(self.name, coef=self.coef)

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        return {**super().prepare(batch, tensors), "keep": batch.keep}

    def tokens(
        self,
        scores: TokenScores,
        *,
        old_logp: Tensor,
        advantages: Tensor,
        keep: Tensor,
        ref_logp: Tensor | None = None,
        rollout_logp: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        logp = scores.logp
        cov = covariances(logp, advantages, keep)
        order = cov.argsort(descending=True, stable=True)
        rank = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
        held = keep & (cov > -math.inf) & (rank < how_many(keep, self.fraction))
        weighed, found = self.weighed(advantages, logp, old_logp, rollout_logp)
        loss, metrics = clipped_surrogate(logp, old_logp, weighed, None)
        gap = torch.where(held, logp - torch.where(held, old_logp, 0), 0).abs()
        loss = loss + self.coef * torch.where(held, gap, 0)
        return self.reference.add(loss, {**metrics, **found, "cov_frac": held.to(loss.dtype)}, logp, ref_logp, old_logp)


_PAPER = "arXiv 2505.22617"
add_method(
    "clip_cov",
    "ratio",
    ClipCov(),
    formula="−min(rÂ, clip(r)Â), 0 on 2e-4 of the tokens, of those with (s − mean s)(Â − mean Â) in (1, 5)",
    paper=_PAPER,
    confidence="A",
    published=(
        "verl's clip_cov, from the official code: 2e-4 and (1, 5), token-mean, the tokens drawn at random; ours are evenly spaced. "
        "Means are over verl's micro-batch, ours over the call."
    ),
)
add_method(
    "kl_cov",
    "ratio",
    KLCov(),
    formula="−rÂ + |s − o| on the 2e-4 of the tokens with the largest (s − mean s)(Â − mean Â)",
    paper=_PAPER,
    confidence="A",
    published=(
        "verl's kl_cov, from the official code: 2e-4, coefficient 1, no clip, token-mean. A sampler's weight multiplies the whole "
        "token there, the policy gradient alone here."
    ),
    note="Â < 0 is not bounded from below: there is no clip.",
)
