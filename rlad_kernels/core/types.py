"""What the public calls give: scores of tokens, a top-K, a reduced loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlad_kernels.core.check import check_tensor, integers


class TokenScores(NamedTuple):
    """What one sweep gives per token, in the target's shape; nats; float32 (float64 for float64 inputs)."""

    logp: Tensor  # (…) log π(target)
    lse: Tensor  # (…) logsumexp of the tempered logits
    entropy: Tensor | None  # (…) −Σ p log p
    topk_logp: Tensor | None  # (…, K) log-probs at topk_ids, −inf in empty slots
    tail_logp: Tensor | None  # (…) log-mass outside topk_ids
    extras: dict[str, Tensor]  # without gradient


class TopK(NamedTuple):
    """The K most likely tokens of each position, without gradient: of :func:`linear_topk`, or of a server."""

    ids: Tensor  # (…, K) int32, −1 empty
    logp: Tensor  # (…, K) descending
    lse: Tensor | None = None  # (…)
    tail_logp: Tensor | None = None  # (…) log-mass outside the K
    target_logp: Tensor | None = None  # (…)
    entropy: Tensor | None = None  # (…)


def checked_topk(name: str, argument: str, x: TopK) -> TopK:
    """``x`` with ids that −1 fits in; a ValueError unless ids and log-probs are tensors ``(…, K)`` of one shape."""
    if not isinstance(x, TopK):
        raise ValueError(f"{name}: {argument} must be a TopK, got {type(x).__name__}; linear_topk or TopK(ids, logp) gives one")
    ids = integers(name, f"{argument}.ids", x.ids)
    check_tensor(name, f"{argument}.logp", x.logp)
    if ids.shape != x.logp.shape or not ids.dim():
        raise ValueError(f"{name}: {argument}.ids has shape {tuple(ids.shape)}, {argument}.logp {tuple(x.logp.shape)}, not (…, K)")
    return x._replace(ids=ids)


class LossOutput(NamedTuple):
    """A reduced loss.

    Attributes:
        loss: 0-dim, the one to call ``backward()`` on.
        token_loss: unreduced, detached, in the target's shape, exactly 0 at masked tokens.
        metrics: detached 0-dim tensors, means over kept tokens (``*_max``: maxima).
    """

    loss: Tensor
    token_loss: Tensor
    metrics: dict[str, Tensor]


def first_occurrence(ids: Tensor) -> Tensor:
    """Mark the slots ``(N, J)`` whose id is valid (≥ 0) and stands in no earlier slot of the row."""
    if ids.shape[1] == 1:
        return ids >= 0
    ordered, order = ids.sort(dim=1, stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(first).scatter_(1, order, first) & (ids >= 0)
