"""Estimators of KL(π‖π_ref) on a sampled token, and the option that adds one to a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.check import check_numbers

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


@dataclass(frozen=True)
class Reference:
    """coef × an estimate of KL(π‖π_ref) on each token, of ``ref_logp``.

    On-policy, k2, k3+, k3++ and k4 have the reverse KL's expected gradient, k3 and k5 the *forward* KL's. k1 raises: its expected
    gradient is 0 whatever the reference. With coef = 0 the estimate is only a metric.

    Example:
        >>> import rlad_kernels as rk
        >>> rk.losses.GRPO(reference=rk.losses.Reference(0.04, "k3")).needed()
        ('old_logp', 'advantages', 'ref_logp')
    """

    coef: float = 0.0
    estimator: str = "k3"

    def check(self, name: str) -> None:
        """Raise a ValueError that names the field, what came and what was wanted."""
        check_numbers(name, **{"reference.coef": self.coef})
        check_estimator(name, "reference.estimator", self.estimator, self.coef)

    def add(
        self, loss: Tensor, metrics: dict[str, Tensor], logp: Tensor, ref_logp: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss and its metrics with the KL term."""
        if ref_logp is None:
            return loss, metrics
        kl = KL_ESTIMATORS[self.estimator](logp - ref_logp)
        return loss + self.coef * kl if self.coef else loss, {**metrics, "kl_ref": kl.detach()}


NO_KL = Reference()


def check_estimator(name: str, argument: str, estimator: str, coef: float) -> None:
    """Raise a ValueError for an unknown estimator, or k1 with a coefficient."""
    if estimator == "k1" and coef:
        raise ValueError(
            f"{name}: {argument} 'k1' has zero expected gradient when backpropagated; use one of {[*KL_ESTIMATORS][1:]}"
        )
    if not isinstance(estimator, str) or estimator not in KL_ESTIMATORS:
        raise ValueError(f"{name}: {argument} must be one of {[*KL_ESTIMATORS]}, got {estimator!r}")
