"""Estimators of KL(π‖π_ref) on a sampled token, and the option that adds one to a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers, is_pair
from rlad_kernels.losses.ratio.slopes import WithSlope, times, weighted_slope

# x = s − ref. Value and gradient as they are backpropagated, expected on-policy: k2, k3+, k3++ and k4 have the reverse KL's
# gradient, k3 and k5 the *forward* KL's; k1's is 0, so it is a metric only. Backpropagating k1 is a mistake seen in the wild:
# whatever the reference, nothing but noise is left of it in the gradient.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: x.detach(),
    "k2": lambda x: x.square() / 2,
    "k3": lambda x: torch.expm1(-x) + x,
    "k3+": lambda x: x.square() / 2 + (torch.expm1(-x) + x - x.square() / 2).detach(),
    "k3++": lambda x: x.square() / 2 + (torch.expm1(-x) + x - x.square() / 2).detach(),  # k3·e^{x − sg x}: k3 + k3' = x
    "k4": lambda x: x.detach() * (x - x.detach()).exp(),
    "k5": lambda x: -x * torch.exp(-x).detach() + (x - x.detach()),
}


WEIGHTED = ("k1", "k3")
_LARGE = 45.0  # from which on e^x + 1 − x is e^x in float64


@dataclass(frozen=True)
class Reference:
    """coef × an estimate of KL(π‖π_ref) on each token, of ``ref_logp``.

    On-policy, k2, k3+, k3++ and k4 have the reverse KL's expected gradient, k3 and k5 the *forward* KL's. k1 raises: its expected
    gradient is 0 whatever the reference. With coef = 0 the estimate is only a metric.

    ``clamp``: (c, m), s − ref is clamped to [−c, c] and the estimate to [−m, m]; where either binds there is no gradient. Trainers
    clamp k3 by (20, 10) (verl). ``weighted``: k1 or k3 times π/π_old, through which the gradient goes (DeepSeek-V3.2's unbiased
    estimate, TRL's ``use_bias_correction_kl``): value and gradient are then the reverse KL's also on samples of π_old. The weight
    is the token's, in every loss.

    Example:
        >>> import rlad_kernels as rk
        >>> rk.losses.GRPO(reference=rk.losses.Reference(0.04, "k3")).needed()
        ('old_logp', 'advantages', 'ref_logp')
    """

    coef: float = 0.0
    estimator: str = "k3"
    clamp: tuple[float, float] | None = None
    weighted: bool = False

    def check(self, name: str) -> None:
        """Raise a ValueError that names the field, what came and what was wanted."""
        check_numbers(name, **{"reference.coef": self.coef})
        check_estimator(name, "reference.estimator", self.estimator, 0 if self.weighted else self.coef)
        if self.clamp is not None and not (is_pair(self.clamp) and min(self.clamp) > 0):
            raise ValueError(f"{name}: reference.clamp must be (log-ratio, estimate), both positive, or None, got {self.clamp!r}")
        if self.weighted and self.estimator not in WEIGHTED:
            raise ValueError(f"{name}: reference.estimator must be one of {WEIGHTED} if it is weighted, got {self.estimator!r}")

    @property
    def plain(self) -> bool:
        """Whether the estimate is the estimator's, which ``rlad::clipped_ratio`` adds by itself."""
        return self.clamp is None and not self.weighted

    def estimate(self, logp: Tensor, ref_logp: Tensor, old_logp: Tensor | None) -> Tensor:
        """The KL of each token, with the gradient it is backpropagated with."""
        if self.weighted:
            assert old_logp is not None
            return weighted_kl(logp, ref_logp, logp - old_logp, self.estimator, self.clamp)
        if self.clamp is None:
            return KL_ESTIMATORS[self.estimator](logp - ref_logp)
        bound, most = self.clamp
        return KL_ESTIMATORS[self.estimator]((logp - ref_logp).clamp(-bound, bound)).clamp(-most, most)

    def add(
        self, loss: Tensor, metrics: dict[str, Tensor], logp: Tensor, ref_logp: Tensor | None, old_logp: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss and its metrics with the KL term; ``old_logp`` is for a weighted one."""
        if ref_logp is None:
            return loss, metrics
        kl = self.estimate(logp, ref_logp, old_logp)
        return loss + self.coef * kl if self.coef else loss, {**metrics, "kl_ref": kl.detach()}


NO_KL = Reference()


def weighted_kl(
    logp: Tensor,
    ref_logp: Tensor,
    log_ratio: Tensor,
    estimator: str = "k3",
    clamp: tuple[float, float] | None = None,
    sequence: bool = False,
) -> Tensor:
    """r·k(s − ref) with r = e^{log_ratio}, whose gradient is that of both factors; of a ``sequence``, log_ratio is not s − o.

    Of a token the derivative of r·k3 is r·(s − ref): added up from its two factors' it would be ∞ − ∞ where either overflows.
    """
    bound, most = clamp or (math.inf, math.inf)
    x, log_r = (logp - ref_logp).detach(), log_ratio.detach()
    near, r = x.clamp(-bound, bound), log_r.exp()
    if estimator == "k1":
        value, slope, inside = times(r, near.clamp(-most, most)), times(r, x + 1), near.abs() <= most
    else:
        log_k3 = torch.where(near < -_LARGE, -near, (torch.expm1(-near) + near).log())
        value = torch.where(near == 0, 0, (log_r + log_k3.clamp(max=math.log(most))).exp())
        slope, inside = times(r, x), log_k3 <= math.log(most)
    inside = inside & (x.abs() <= bound)
    if not sequence:
        return WithSlope.apply(logp, value, torch.where(inside, slope, value))
    own = WithSlope.apply(logp, value, torch.where(inside, weighted_slope(log_r, x), 0))
    return own + WithSlope.apply(log_ratio, torch.zeros_like(value), value)


def check_estimator(name: str, argument: str, estimator: str, coef: float) -> None:
    """Raise a ValueError for an unknown estimator, or k1 with a coefficient."""
    if estimator == "k1" and coef:
        raise ValueError(
            f"{name}: {argument} 'k1' has zero expected gradient when backpropagated; use one of {[*KL_ESTIMATORS][1:]}"
        )
    if not isinstance(estimator, str) or estimator not in KL_ESTIMATORS:
        raise ValueError(f"{name}: {argument} must be one of {[*KL_ESTIMATORS]}, got {estimator!r}")
