"""``rlad::linear_gather``: raw logits at a few ids, and their gradient; no sweep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlad_kernels.backends.contract import HEAD
from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.engine.op import NEED, define, given, gradients, no_double_backward, result, wanted
from rlad_kernels.engine.rows import check_ids, checked_inv_temp, row_mask
from rlad_kernels.engine.shards import Shard


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
    first: int,
    group: str,
    caller: str,
) -> Tensor:
    """Implements ``rlad::linear_gather``: raw logits h·W_v + b_v at ``ids (N, K)``; empty slots and masked rows give 0.

    What comes after, the temperature above all, is left to autograd; here its values can be checked under ``torch.compile`` too.
    """
    ids = _gather_ids(caller, ids, mask, vocab_size)
    checked_inv_temp(caller, inv_temp.expand(hidden.shape[0]), row_mask(caller, None, mask))
    shard = Shard(weight, vocab_size, first, group)
    own = shard.own(ids)
    raw = torch.ops.rlad.gather_dot(hidden, weight[: shard.columns], own)
    inside = (own >= 0) & (own < shard.columns)
    if bias is not None and shard.columns:
        raw = torch.where(inside, raw + bias.to(raw.dtype)[torch.where(inside, own, 0)], raw)
    return torch.where(ids >= vocab_size, torch.nan, shard.summed(raw))


def linear_gather_bwd(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    first: int,
    group: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements ``rlad::linear_gather_bwd``; d_weight touches only the rows in ``ids``."""
    shard = Shard(weight, vocab_size, first, group)
    ids = shard.own(_gather_ids("linear_gather", ids, mask, vocab_size))
    grad = grad.to(acc_dtype(hidden.dtype)).contiguous()
    d_hidden, d_weight, d_bias = hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_hidden:
        d_hidden = hidden.new_empty(hidden.shape, dtype=hidden.dtype if shard.group is None else grad.dtype)
        torch.ops.rlad.gather_dhidden_(d_hidden, grad, weight[: shard.columns], ids, False)
        d_hidden = shard.summed(d_hidden).to(hidden.dtype)
    if need_weight or need_bias:
        sorted_ids, order = ids.flatten().sort(stable=True)
    if need_weight:
        d_weight = torch.zeros_like(weight)
        torch.ops.rlad.gather_dweight_(d_weight[: shard.columns], grad, hidden, order, sorted_ids, False)
    if need_bias and bias is not None:
        d_bias = torch.zeros_like(bias)
        ones = hidden.new_ones(hidden.shape[0], 1)
        torch.ops.rlad.gather_dweight_(d_bias[: shard.columns].unsqueeze(1), grad, ones, order, sorted_ids, False)
    return d_hidden, d_weight, d_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, vocab_size, first, group, _ = inputs
    ctx.head = (vocab_size, first, group)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> Any:
    hidden, weight, bias, ids, mask = ctx.saved_tensors
    need = wanted(ctx, bias)
    grads = gather_bwd_op(grad, hidden, weight, bias, ids, mask, *ctx.head, *need)
    return *given(grads, need), *[None] * 7


gather_op = define(
    "linear_gather",
    f"({HEAD}, Tensor ids, Tensor? mask, Tensor inv_temp, int vocab_size, int first, str group, str caller) -> Tensor",
    linear_gather,
)
gather_bwd_op = define(
    "linear_gather_bwd",
    f"(Tensor grad, {HEAD}, Tensor ids, Tensor? mask, int vocab_size, int first, str group, {NEED}) -> (Tensor, Tensor, Tensor)",
    linear_gather_bwd,
)
torch.library.register_fake("rlad::linear_gather", lambda hidden, weight, bias, ids, *args: result(hidden, ids.shape))
torch.library.register_fake(
    "rlad::linear_gather_bwd", lambda grad, hidden, weight, bias, *args: gradients(hidden, weight, bias, args[-3:])
)
torch.library.register_autograd("rlad::linear_gather", _backward, setup_context=_setup)
no_double_backward("linear_gather_bwd")
