"""Context parallelism: each rank has a slice of every sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from rlad_kernels.core.check import check_tensor, is_number


def next_tokens(tokens: Tensor, group: dist.ProcessGroup, fill: float = -100) -> Tensor:
    """Each position's next token, that of the last from the rank after this one: labels for slices of sequences.

    Every rank of the group calls it, a rank with no column too. One all-gather of a number a row.

    Args:
        tokens: ids ``(…, T_here)``, or labels, masks, anything with one value a token: this rank's columns, the next ones on the
            next rank. The leading shape and the dtype are the same on all ranks, T_here need not be.
        group: the ranks that have the slices, in their order.
        fill: what follows the last token of all. Mask it out, ``mask=labels != -100``.

    Returns:
        As ``tokens``, without gradient.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, torch.distributed as dist, rlad_kernels as rk
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> rk.context.next_tokens(torch.tensor([[5, 6, 7]]), dist.group.WORLD)
        tensor([[   6,    7, -100]])
        >>> dist.destroy_process_group()
    """
    name = "next_tokens"
    check_tensor(name, "tokens", tokens)
    if not tokens.dim():
        raise ValueError(f"{name}: tokens must be (…, T), got a 0-dim tensor")
    _check_group(name, group)
    if not is_number(fill):
        raise ValueError(f"{name}: fill must be a number, got {fill!r}")
    tokens = tokens.detach()
    after = tokens.new_full((*tokens.shape[:-1], 1), fill)
    here = tokens.shape[-1] > 0
    first = torch.cat([tokens[..., :1] if here else after, torch.full_like(after, here)], -1)
    sent = first.to(torch.uint8) if first.dtype == torch.bool else first
    found = [torch.empty_like(sent) for _ in range(group.size())]
    dist.all_gather(found, sent.contiguous(), group=group)
    for part in reversed(found[dist.get_rank(group) + 1 :]):  # a rank without columns has none to give
        after = torch.where(part[..., 1:] != 0, part[..., :1].to(after.dtype), after)
    return torch.cat([tokens[..., 1:], after], -1) if here else tokens


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' columns side by side, ``(…, T)`` from each one's ``(…, T_here)``: for losses that read whole sequences.

    All ranks then compute the same loss of the same tokens. The backward is that of the sum of their losses, which the average of
    the gradients over all ranks turns into one: no factor is needed. Two all-gathers forward, an all-reduce of ``(…, T)`` backward.

    Args:
        x: one value a token, log-probs for instance; the leading shape and the dtype are the same on all ranks, T_here need not be.
        group: the ranks that have the slices, in their order.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, torch.distributed as dist, rlad_kernels as rk
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> rk.context.gather(torch.tensor([[-1.0, -2.0]]), dist.group.WORLD)
        tensor([[-1., -2.]])
        >>> dist.destroy_process_group()
    """
    check_tensor("gather", "x", x)
    if not x.dim():
        raise ValueError("gather: x must be (…, T), got a 0-dim tensor")
    _check_group("gather", group)
    return _Gather.apply(x, group)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        size = torch.tensor([x.shape[-1]], device=x.device)
        found = [torch.empty_like(size) for _ in range(group.size())]
        dist.all_gather(found, size, group=group)
        sizes = torch.cat(found).tolist()
        mine = F.pad(x, (0, max(sizes) - x.shape[-1])).contiguous()
        parts = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(parts, mine, group=group)
        ctx.group, ctx.sizes = group, sizes
        return torch.cat([part[..., :n] for part, n in zip(parts, sizes, strict=True)], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad.split(ctx.sizes, -1)[dist.get_rank(ctx.group)], None


def _check_group(name: str, group: Any) -> None:
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{name}: group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
