"""VESPO: REINFORCE weighed by a smooth kernel of the sequence's importance ratio (arXiv 2602.10693)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.check import is_pair
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.rollout import Rollout
from rlad_kernels.losses.ratio.sampled import SampledLoss, ratio_metrics, reinforced
from rlad_kernels.losses.ratio.sequences import totals
from rlad_kernels.losses.ratio.slopes import times

LOWEST, LARGEST = math.log(1e-8), 20.0  # of log w, and of a token's log-ratio ±20


def gamma_weights(log_w: Tensor, up: Tensor, positive: tuple[float, float], negative: tuple[float, float]) -> Tensor:
    """φ(w) = w^k·e^{λ(1−w)} without gradient, (k, λ) those of ``positive`` where ``up``, else of ``negative``; φ(1) = 1."""
    log_w = log_w.detach().clamp(LOWEST, LARGEST)
    k = torch.where(up, torch.full_like(log_w, positive[0]), negative[0])
    rate = torch.where(up, torch.full_like(log_w, positive[1]), negative[1])
    phi = (k * log_w - rate * torch.expm1(log_w)).exp()
    return torch.where(phi == torch.inf, 0, phi)


@dataclass(frozen=True, kw_only=True)
class VESPO(SampledLoss):
    """VESPO: −sg[φ(w_i)]·Â·s, φ(w) = w^k·e^{λ(1−w)}, w_i = exp(Σ_t(s − o)) over sequence i's kept tokens (arXiv 2602.10693).

    w is the sequence's own ratio, without a length's root, and φ(1) = 1: sequences that the policy has moved away from, either
    way, fade out. The value is no objective, only its gradient is meant. As in the official code a token's s − o is clamped to
    ±20 and log w to [log 1e-8, 20]. The ratio reads other tokens' scores: :func:`linear_loss` runs it on :func:`linear_logp`, at
    four products.

    Args:
        positive: (k, λ) where Â ≥ 0. k ≥ 1 is the paper's regime with a bounded variance.
        negative: (k, λ) where Â < 0.
        rollout: how ``rollout_logp`` makes weights, of the level ``token``; w_i takes their product over the sequence.
        reference: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`; packed tokens always need
            ``Reduction(seq_ids=…)``.

    Metrics: ratio_mean, ratio_max (of w_i as it is clamped), kl_old, kl_ref, rollout_weight_mean, rollout_clip_frac.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.full((1, 2), -1.0, requires_grad=True)
        >>> old = logp.detach() - 0.5  # w = e
        >>> rk.losses.VESPO()(logp, old_logp=old, advantages=torch.ones(1)).loss.backward()
        >>> logp.grad  # −e²·e^{3(1−e)}/2
        tensor([[-0.0213, -0.0213]])
    """

    positive: tuple[float, float] = (2.0, 3.0)
    negative: tuple[float, float] = (3.0, 2.0)

    needs = ("old_logp", "advantages")
    rowwise = False

    def check(self) -> None:
        super().check()
        for name in ("positive", "negative"):
            pair = getattr(self, name)
            if not (is_pair(pair) and min(pair) >= 0 and max(pair) < math.inf):
                raise ValueError(f"{self.name}: {name} must be (k, λ), both at least 0 and finite, got {pair!r}")
        if isinstance(self.rollout, Rollout) and self.rollout.level != "token":
            raise ValueError(f"{self.name}: rollout.level must be 'token', the loss multiplies its weights; got {self.rollout!r}")

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        return {**tensors, "keep": batch.keep, "sequence": batch.sequence("the ratio")}

    def tokens(
        self,
        scores: TokenScores,
        *,
        old_logp: Tensor,
        advantages: Tensor,
        keep: Tensor,
        sequence: Tensor,
        ref_logp: Tensor | None = None,
        rollout_logp: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        logp = scores.logp
        weights, found = self.weighed(torch.ones_like(logp), logp, old_logp, rollout_logp)
        log_w = (logp.detach() - old_logp).clamp(-20, 20) + weights.log().clamp(LOWEST, LARGEST)
        log_w = totals(torch.where(keep, log_w, 0), sequence).clamp(LOWEST, LARGEST)
        phi = gamma_weights(log_w, advantages >= 0, self.positive, self.negative)
        metrics = {**ratio_metrics(logp, old_logp), "ratio_mean": log_w.exp(), "ratio_max": log_w.exp(), **found}
        return self.reference.add(reinforced(logp, times(phi, advantages)), metrics, logp, ref_logp, old_logp)


add_method(
    "vespo",
    "ratio",
    VESPO(),
    formula="−sg[w_i^k·e^{λ(1−w_i)}]·Â·s, w_i = exp(Σ_t(s − o)), (k, λ) = (2, 3) where Â ≥ 0, else (3, 2)",
    paper="arXiv 2602.10693",
    confidence="A",
    published=(
        "The official code: (2, 3) and (3, 2), φ detached, token-mean, a token's s − o clamped to ±20 and w from below at 1e-8; a "
        "sampler's weights are multiplied into w. A λ of 0 is 1e-4 there."
    ),
    note="w_i spreads with the length: of long sequences off the policy nearly all weights are 0.",
)
