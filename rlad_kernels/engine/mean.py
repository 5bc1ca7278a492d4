"""The mean of a row's logits over the vocabulary: linear in hidden states and head, it needs no sweep of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.engine.call import Call
from rlad_kernels.engine.gradients import Gradients
from rlad_kernels.engine.shards import Shard
from rlad_kernels.engine.tiles import Tiles


def check_no_softcap(name: str, call: Call) -> None:
    """Raise a ValueError for a head whose logits are not linear in the hidden states."""
    if call.softcap:
        raise ValueError(f"{name}: mean_logits (label smoothing) needs a head without softcap, got softcap={call.softcap!r}")


def mean_logits(call: Call, keep: Tensor) -> Tensor:
    """``(N,)`` in the accumulation dtype, differentiable; 0 in rows outside ``keep (N,)``."""
    acc, shard = acc_dtype(call.hidden.dtype), Shard(call.weight, *call[6:])

    def mean_of(x: Tensor) -> Tensor:
        own = x[: shard.columns].sum(0, dtype=acc) / call.vocab_size
        return (
            own if shard.group is None else own + (shard.summed(own.detach().clone()) - own).detach()
        )  # its gradient is the rank's

    hidden = torch.where(keep.unsqueeze(1), call.hidden, 0).to(acc)
    mean = (hidden * mean_of(call.weight)).sum(1)  # not a matrix product, which autocast would take to bfloat16
    mean = mean if call.bias is None else mean + mean_of(call.bias)
    return torch.where(keep, mean * (call.logit_scale * call.inv_temp), 0)


class MeanLogits:
    """The same of a sweep's rows, ``values (n,)``, and what a loss makes of it: each logit of a row gets 1/V of its gradient."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles, self.own = tiles, tiles.weight.sum(0, dtype=tiles.acc) / tiles.total
        row = tiles.shard.summed(self.own.clone())
        self.factor = tiles.inv_temp * tiles.logit_scale
        raw = torch.empty_like(self.factor)
        for r0, r1 in tiles.row_ranges():
            torch.mv(tiles.hidden[r0:r1].to(tiles.acc), row, out=raw[r0:r1])
        if tiles.bias is not None:
            raw += tiles.shard.summed(tiles.bias.sum() / tiles.total)
        self.values = self.factor * raw
        self.slope = torch.zeros_like(raw)  # d loss / d raw

    def send(self, at: slice, g: Tensor) -> None:
        """Keep d loss / d values of the rows ``at``."""
        self.slope[at] = g * self.factor[at]

    def finish(self, grads: Gradients) -> None:
        """Add what has been sent to gradients whose dlogits are all in: to d_weight and d_bias the same in every row."""
        total = torch.zeros_like(self.own)
        for r0, r1 in self.tiles.row_ranges():
            slope = self.slope[r0:r1]
            if grads.hidden is not None:
                grads.hidden[r0:r1].addr_(slope, self.own)
            total += torch.mv(self.tiles.hidden[r0:r1].to(self.tiles.acc).t(), slope)
        grads.add_to_all(total / self.tiles.total, self.slope.sum() / self.tiles.total)
