"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlad_kernels.core.check import check_tensor


def combine_teachers(logps: Tensor | Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ_m w_m·t_m of M teachers' log-probs, to be passed as ``teacher_logp``; without gradient.

    With weights that sum to 1 the reverse KL to it is Σ_m w_m·KL(π‖π_m), up to a constant. One-hot weights choose a teacher for
    each token. A teacher of weight 0 has no effect, whatever its value.

    Args:
        logps: ``(M, …)``, or M tensors ``(…)``.
        weights: ``(M,)``, or ``(M, …)`` for weights that differ from token to token; finite, not negative.

    Raises:
        ValueError: for another shape.
    """
    for x in [logps] if isinstance(logps, Tensor) else logps:
        check_tensor("combine_teachers", "logps", x)
    check_tensor("combine_teachers", "weights", weights)
    stacked = (logps if isinstance(logps, Tensor) else torch.stack(list(logps))).detach()
    weights = weights.detach().to(stacked.dtype)
    if weights.shape == stacked.shape[:1]:
        weights = weights.view(-1, *[1] * (stacked.dim() - 1))
    elif weights.shape != stacked.shape:
        raise ValueError(
            f"combine_teachers: weights has shape {tuple(weights.shape)}, wanted ({stacked.shape[0]},) or {tuple(stacked.shape)}"
        )
    return torch.where(weights == 0, 0, weights * stacked).sum(0)
