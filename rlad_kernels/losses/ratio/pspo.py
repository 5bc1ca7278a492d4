"""PSPO: the ratio is smoothed towards 1 in place of the clip (arXiv 2509.21282)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlad_kernels.core.check import check_range
from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import SampledLoss
from rlad_kernels.losses.ratio.surrogate import clipped_surrogate


@dataclass(frozen=True, kw_only=True)
class PSPO(SampledLoss):
    """PSPO: −((1 − a)r + a)Â, r = exp(s − o): the ratio of the policy mixed with a of the old one (arXiv 2509.21282).

    No token loses its gradient, and none but the constant a·Â is added: the gradient is (1 − a) times that of the surrogate
    without a clip. To an optimiser that divides by the gradient's size, as Adam does, the two are one (beside no other term).

    Args:
        smoothing: a, in [0, 1).
        reference, rollout: as of :class:`GRPO`.

    Tensors of a call:
        logp, old_logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.

    Metrics: those of :class:`GRPO`, of r before it is smoothed.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.zeros(1, 1, requires_grad=True)
        >>> out = rk.losses.PSPO(smoothing=0.25)(logp, old_logp=torch.tensor([[-1.0]]), advantages=torch.ones(1))
        >>> out.loss, torch.autograd.grad(out.loss, logp)[0]  # (3e + 1)/4, 3e/4
        (tensor(-2.2887, grad_fn=<SumBackward0>), tensor([[-2.0387]]))
    """

    reduction: str = "seq-mean-token-mean"
    smoothing: float = 0.1

    needs = ("old_logp", "advantages")

    def check(self) -> None:
        super().check()
        check_range(self.name, "smoothing", self.smoothing, 0, 1, "[)")

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
        loss, metrics = clipped_surrogate(logp, old_logp, advantages, None)
        loss = (1 - self.smoothing) * loss - self.smoothing * advantages
        return self.reference.add(loss, {**metrics, **found}, logp, ref_logp, old_logp)


add_method(
    "pspo",
    "ratio",
    PSPO(),
    formula="−((1 − a)r + a)Â, a = .1",
    paper="arXiv 2509.21282",
    confidence="B",
    published="The authors' trainer on TRL's GRPO: smoothing_alpha = 0.1, no clip. The paper's text was read in excerpts.",
    note="Derived here: its gradient is (1 − a) times the surrogate's without a clip, which Adam does not tell apart.",
)
