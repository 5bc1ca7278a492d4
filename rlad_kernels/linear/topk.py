"""The most likely tokens, and the teacher's log-probs at any others."""

from __future__ import annotations

import torch
from torch import Tensor

from rlad_kernels.core.check import TOPK_MAX, check_k, integers
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.types import TopK
from rlad_kernels.engine.call import check_states, flat_call, maybe_rows, target_shape
from rlad_kernels.engine.topk import Top, topk_op
from rlad_kernels.linear.logp import score


def linear_topk(
    hidden: Tensor, head: LMHead, k: int, *, target: Tensor | None = None, entropy: bool = False, mask: Tensor | None = None
) -> TopK:
    """The K largest log-probs of every token with their ids, lse, tail mass, target log-prob and entropy; no gradient.

    Args:
        hidden: ``(…, D)``.
        head: :class:`LMHead`.
        k: 1 ≤ K ≤ 1,024 and ≤ vocab_size.
        target: ``(…)`` ints for ``target_logp``; −100 is masked.
        entropy: also −Σ p log p over the whole vocabulary.
        mask: bool or 0/1 ``(…)``; masked rows are exactly 0.

    Returns:
        TopK: ids int32 ``(…, K)``, logp ``(…, K)`` descending (the lower id wins among equal logits), lse, tail_logp ``(…)``,
        target_logp and entropy or None.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> head = rk.LMHead(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> rk.linear_topk(torch.ones(1, 1), head, 2).ids
        tensor([[2, 1]], dtype=torch.int32)
    """
    name = "linear_topk"
    with torch.no_grad():
        call = flat_call(name, hidden, head)
        shape = hidden.shape[:-1] if target is None else target_shape(name, hidden, target)
        check_k(name, k, call.vocab_size, most=TOPK_MAX)
        flat_target = maybe_rows(name, "target", target, shape, hidden.device, ids=True)
        flat_mask = maybe_rows(name, "mask", mask, shape, hidden.device)
        out = Top._make(topk_op(*call[:3], flat_target, flat_mask, *call[3:], k, entropy))
    return TopK(
        out.ids.view(*shape, k),
        out.logp.view(*shape, k),
        out.lse.view(shape),
        out.tail_logp.view(shape),
        None if target is None else out.target_logp.view(shape),
        out.entropy.view(shape) if entropy else None,
    )


def linear_support(
    hidden: Tensor, head: LMHead, ids: Tensor, *, target: Tensor | None = None, entropy: bool = False, mask: Tensor | None = None
) -> TopK:
    """The teacher's log-probs at any ids, the student's or old policy's top-K for instance, in one sweep; no gradient.

    Args:
        hidden, head: the teacher's, as in :func:`linear_logp`.
        ids: ``(…, K)`` ints, −1 empty; ``linear_topk(student_hidden, student_head, k).ids``, or a union of supports.
        target: ``(…)`` ints for ``target_logp``.
        entropy: also the teacher's entropy.
        mask: bool or 0/1 ``(…)``; masked rows are exactly 0.

    Returns:
        TopK with these ids in their order, the tail mass outside them from the sweep itself.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> head = rk.LMHead(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> rk.linear_support(torch.ones(1, 1), head, torch.tensor([[0, 2]])).logp
        tensor([[-2.4076, -0.4076]])
    """
    check_states("linear_support", hidden, head)
    ids = integers("linear_support", "ids", ids)
    at = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device) if target is None else target
    with torch.no_grad():
        s = score("linear_support", hidden, head, at, topk_ids=ids, entropy=entropy, tail=True, mask=mask, ids_name="ids")
    assert s.topk_logp is not None
    return TopK(ids.to(torch.int32), s.topk_logp, s.lse, s.tail_logp, None if target is None else s.logp, s.entropy)
