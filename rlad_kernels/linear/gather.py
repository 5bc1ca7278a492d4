"""Logits at a few ids, without a sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from rlad_kernels.core.check import check_k
from rlad_kernels.core.head import LMHead
from rlad_kernels.engine.call import flat_call, flat_rows, maybe_rows
from rlad_kernels.engine.gather import gather_op


def linear_gather(hidden: Tensor, head: LMHead, ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Logits z at ``ids`` after scale, softcap and temperature: K rows of the head a token, no sweep; differentiable.

    Args:
        hidden: ``(…, D)``.
        head: :class:`LMHead`.
        ids: ``(…, K)`` ints; −1 is an empty slot.
        mask: bool or 0/1 ``(…)``; masked rows are exactly 0.

    Returns:
        ``(…, K)`` float32 (float64 for float64), −inf in empty slots. d_weight touches only the rows in ``ids``.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> head = rk.LMHead(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> rk.linear_gather(torch.ones(1, 1), head, torch.tensor([[2, 0, -1]]))
        tensor([[3., 1., -inf]])
    """
    return gather("linear_gather", hidden, head, ids, mask=mask)


def gather(name: str, hidden: Tensor, head: LMHead, ids: Tensor, *, mask: Tensor | None = None, ids_name: str = "ids") -> Tensor:
    """:func:`linear_gather` for a public function ``name``, whose argument ``ids_name`` holds the ids."""
    call = flat_call(name, hidden, head)
    shape = hidden.shape[:-1]
    flat_ids = flat_rows(name, ids_name, ids, shape, hidden.device, ids=True, extra=1)
    check_k(name, flat_ids.shape[1], call.vocab_size, f"{ids_name} (…, K)")
    flat_mask = maybe_rows(name, "mask", mask, shape, hidden.device)
    raw = gather_op(*call[:3], flat_ids, flat_mask, call.inv_temp, *call[6:], name)
    z = raw * call.logit_scale
    if call.softcap:
        z = call.softcap * torch.tanh(z / call.softcap)
    z = torch.where(flat_ids < 0, -torch.inf, z * call.inv_temp.unsqueeze(1))
    if flat_mask is not None:
        z = torch.where(flat_mask.unsqueeze(1) != 0, z, 0)
    return z.view(ids.shape)
