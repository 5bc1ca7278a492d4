"""A head whose rows lie on the ranks of a process group: what a rank computes alone, and what the ranks tell each other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from rlad_kernels.engine.statistics import Stats, merge_tiles


def columns_here(weight: Tensor, vocab_size: int, first: int) -> int:
    """How many rows of ``weight``, the head's from ``first`` on, are of the vocabulary."""
    return min(max(vocab_size - first, 0), weight.shape[0])


class Shard:
    """The columns ``first``, …, ``first + columns − 1`` of the vocabulary on this rank. Without a ``group`` all are here.

    Every rank has the same tokens and makes the same calls. What is sent: 6 + J numbers a row forward, a row's d_hidden backward.
    """

    def __init__(self, weight: Tensor, vocab_size: int, first: int, group: str) -> None:
        self.first, self.columns = first, columns_here(weight, vocab_size, first)
        self.group = dist.distributed_c10d._resolve_process_group(group) if group else None  # pyright: ignore[reportArgumentType]
        self.world = self.group.size() if self.group is not None else 1
        self.leads = self.group is None or self.group.rank() == 0

    def own(self, ids: Tensor) -> Tensor:
        """The columns of ``ids`` here, −1 for those of others."""
        if self.group is None:
            return ids
        here = (ids >= self.first) & (ids < self.first + self.columns)
        return torch.where(here, ids - self.first, -1)

    def gathered(self, x: Tensor) -> Tensor:
        """``x`` of each rank, ``(ranks, …)``."""
        if self.group is None:
            return x.unsqueeze(0)
        found = x.new_empty(self.world, *x.shape)
        dist.all_gather([*found.unbind(0)], x.contiguous(), group=self.group)
        return found

    def merged(self, stats: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics ``(6, n)`` and slot logits ``(n, J)`` over the vocabulary from those of each rank's columns."""
        if self.group is None:
            return stats, z
        rows = len(Stats._fields)
        ours = torch.cat([stats, z.t()])
        ours[Stats._fields.index("first")] += self.first
        parts = self.gathered(ours)
        return merge_tiles(parts[:, :rows].transpose(0, 1)), parts[:, rows:].amax(0).t().contiguous()

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks of what each has made of its columns, in place of ``x``."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over the ranks, in place of ``x``."""
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def log_softmax(self, z: Tensor) -> Tensor:
        """Log-probs of this rank's columns from their logits ``(R, C)``; −inf's are −inf."""
        if self.group is None:
            return z.log_softmax(1)
        top = self.largest(F.pad(z, (0, 1), value=-torch.inf).amax(1))  # a rank may have no column
        z = z - top.unsqueeze(1)
        return z - self.summed(z.exp().sum(1)).log_().unsqueeze(1)
