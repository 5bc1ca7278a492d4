"""What the public calls give: scores of tokens, a top-K, a reduced loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlad_kernels.core.check import check_tensor, integers


class TokenScores(NamedTuple):
    """What one sweep gives per token, in the target's shape; nats; float32 (float64 for float64 inputs). None is unknown.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> hidden, head = torch.zeros(1, 4), rk.LMHead(torch.zeros(8, 4))
        >>> rk.linear_logp(hidden, head, torch.tensor([3]), entropy=True).entropy
        tensor([2.0794])
    """

    logp: Tensor | Any = None  # (…) log π(target)
    lse: Tensor | Any = None  # (…) logsumexp of the tempered logits
    entropy: Tensor | Any = None  # (…) −Σ p log p
    topk_logp: Tensor | Any = None  # (…, K) log-probs at topk_ids, −inf in empty slots
    tail_logp: Tensor | Any = None  # (…) log-mass outside topk_ids
    mean_logits: Tensor | Any = None  # (…) mean of the tempered logits over the vocabulary
    extras: dict[str, Tensor] | Any = None  # without gradient


class TopK(NamedTuple):
    """K tokens of each position and their log-probs, without gradient: of :func:`linear_topk`, or of a server.

    Indexing goes over positions, ``teacher[0:2]``; the parts have names. ``torch.save`` and ``torch.load(weights_only=True)`` work.

    Example:
        >>> import io, torch, rlad_kernels as rk
        >>> teacher = rk.linear_topk(torch.ones(3, 5, 4), rk.LMHead(torch.eye(8, 4)), 2)
        >>> teacher[0:2].ids.shape, teacher[0].logp.shape, teacher[:, 1:].to("cpu").lse.shape
        (torch.Size([2, 5, 2]), torch.Size([5, 2]), torch.Size([3, 4]))
        >>> torch.save(teacher, file := io.BytesIO())
        >>> torch.equal(torch.load(io.BytesIO(file.getvalue()), weights_only=True).ids, teacher.ids)
        True
    """

    ids: Tensor  # (…, K) int32, −1 empty
    logp: Tensor  # (…, K) descending
    lse: Tensor | None = None  # (…)
    tail_logp: Tensor | None = None  # (…) log-mass outside the K
    target_logp: Tensor | None = None  # (…)
    entropy: Tensor | None = None  # (…)

    def __getitem__(self, positions: Any) -> TopK:  # type: ignore[override]
        """The same of some positions; an index may not reach the K."""
        wanted = positions if isinstance(positions, tuple) else (positions,)
        if len(wanted) >= self.ids.dim() or any(x is None or x is Ellipsis for x in wanted):
            raise IndexError(f"TopK: an index goes over the positions {tuple(self.ids.shape[:-1])}, got {positions!r}")
        return TopK._make(None if x is None else x[positions] for x in self)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TopK:
        """The same on another device."""
        return TopK._make(None if x is None else x.to(device, non_blocking=non_blocking) for x in self)


torch.serialization.add_safe_globals([TopK])


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

    Example:
        >>> import torch, rlad_kernels as rk
        >>> out = rk.losses.CrossEntropy()(torch.tensor([-1.0, -3.0]), mask=torch.tensor([True, False]))
        >>> out.loss, out.token_loss
        (tensor(1.), tensor([1., 0.]))
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
    return first.scatter(1, order, first) & (ids >= 0)  # every slot is written; scatter_ would be slow under vmap, with a warning
