"""``rlad::linear_gather``: raw logits at a few ids, and their gradient; no sweep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlad_kernels.backends.contract import HEAD
from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.engine.op import NEED, define, given, gradients, no_double_backward, result, wanted
from rlad_kernels.engine.rows import check_ids, checked_inv_temp, row_mask


def _gather_ids(caller: str, ids: Tensor, mask: Tensor | None, vocab_size: int) -> Tensor:
    keep = row_mask(caller, None, mask)
    ids = ids if keep is None else torch.where(keep.unsqueeze(1), ids, -1)
    check_ids(caller, "ids", ids, -1, vocab_size)
    return torch.ops.rlad.row_slots(None, ids, vocab_size)


def linear_gather(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    inv_temp: Tensor,
    vocab_size: int,
    caller: str,
) -> Tensor:
    """Implements ``rlad::linear_gather``: raw logits h·W_v + b_v at ``ids (N, K)``; empty slots and masked rows give 0.

    What comes after, the temperature above all, is left to autograd; here its values can be checked under ``torch.compile`` too.
    """
    ids = _gather_ids(caller, ids, mask, vocab_size)
    checked_inv_temp(caller, inv_temp.expand(hidden.shape[0]), row_mask(caller, None, mask))
    raw = torch.ops.rlad.gather_dot(hidden, weight[:vocab_size], ids)
    inside = (ids >= 0) & (ids < vocab_size)
    if bias is not None:
        raw = torch.where(inside, raw + bias.to(raw.dtype)[torch.where(inside, ids, 0)], raw)
    return torch.where(ids >= vocab_size, torch.nan, raw)


def linear_gather_bwd(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements ``rlad::linear_gather_bwd``; d_weight touches only the rows in ``ids``."""
    ids = _gather_ids("linear_gather", ids, mask, vocab_size)
    grad = grad.to(acc_dtype(hidden.dtype)).contiguous()
    d_hidden, d_weight, d_bias = hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_hidden:
        d_hidden = torch.ops.rlad.gather_dhidden(grad, weight[:vocab_size], ids)
    if need_weight or need_bias:
        sorted_ids, order = ids.flatten().sort(stable=True)
    if need_weight:
        d_weight = torch.zeros_like(weight)
        torch.ops.rlad.gather_dweight_(d_weight[:vocab_size], grad, hidden, order, sorted_ids, False)
    if need_bias and bias is not None:
        d_bias = torch.zeros_like(bias)
        ones = hidden.new_ones(hidden.shape[0], 1)
        torch.ops.rlad.gather_dweight_(d_bias[:vocab_size].unsqueeze(1), grad, ones, order, sorted_ids, False)
    return d_hidden, d_weight, d_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.vocab_size, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> Any:
    hidden, weight, bias, ids, mask = ctx.saved_tensors
    need = wanted(ctx, bias)
    grads = gather_bwd_op(grad, hidden, weight, bias, ids, mask, ctx.vocab_size, *need)
    return *given(grads, need), *[None] * 5


gather_op = define(
    "linear_gather",
    f"({HEAD}, Tensor ids, Tensor? mask, Tensor inv_temp, int vocab_size, str caller) -> Tensor",
    linear_gather,
)
gather_bwd_op = define(
    "linear_gather_bwd",
    f"(Tensor grad, {HEAD}, Tensor ids, Tensor? mask, int vocab_size, {NEED}) -> (Tensor, Tensor, Tensor)",
    linear_gather_bwd,
)
torch.library.register_fake("rlad::linear_gather", lambda hidden, weight, bias, ids, *args: result(hidden, ids.shape))
torch.library.register_fake(
    "rlad::linear_gather_bwd", lambda grad, hidden, weight, bias, *args: gradients(hidden, weight, bias, args[-3:])
)
torch.library.register_autograd("rlad::linear_gather", _backward, setup_context=_setup)
no_double_backward("linear_gather_bwd")
