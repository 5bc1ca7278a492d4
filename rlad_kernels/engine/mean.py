"""The mean of a row's logits over the vocabulary: linear in hidden states and head, it needs no sweep of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.engine.call import Call
from rlad_kernels.engine.gradients import Gradients
from rlad_kernels.engine.tiles import Tiles


def check_no_softcap(name: str, call: Call) -> None:
    """Raise a ValueError for a head whose logits are not linear in the hidden states."""
    if call.softcap:
        raise ValueError(f"{name}: mean_logits (label smoothing) needs a head without softcap, got softcap={call.softcap!r}")


def mean_logits(call: Call, keep: Tensor) -> Tensor:
    """``(N,)`` in the accumulation dtype, differentiable; 0 in rows outside ``keep (N,)``."""
    acc, vocab = acc_dtype(call.hidden.dtype), call.vocab_size
    hidden = torch.where(keep.unsqueeze(1), call.hidden, 0).to(acc)
    mean = (hidden * call.weight[:vocab].mean(0, dtype=acc)).sum(1)  # not a matrix product, which autocast would take to bfloat16
    mean = mean if call.bias is None else mean + call.bias[:vocab].mean(dtype=acc)
    return torch.where(keep, mean * (call.logit_scale * call.inv_temp), 0)


class MeanLogits:
    """The same of a sweep's rows, ``values (n,)``, and what a loss makes of it: each logit of a row gets 1/V of its gradient."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles, self.row = tiles, tiles.weight.mean(0, dtype=tiles.acc)
        self.factor = tiles.inv_temp * tiles.logit_scale
        raw = torch.empty_like(self.factor)
        for r0, r1 in tiles.row_ranges():
            torch.mv(tiles.hidden[r0:r1].to(tiles.acc), self.row, out=raw[r0:r1])
        self.values = self.factor * (raw if tiles.bias is None else raw + tiles.bias.mean())
        self.slope = torch.zeros_like(raw)  # d loss / d raw

    def send(self, at: slice, g: Tensor) -> None:
        """Keep d loss / d values of the rows ``at``."""
        self.slope[at] = g * self.factor[at]

    def finish(self, grads: Gradients) -> None:
        """Add what has been sent to gradients whose dlogits are all in: to d_weight and d_bias the same in every row."""
        total = torch.zeros_like(self.row)
        for r0, r1 in self.tiles.row_ranges():
            slope = self.slope[r0:r1]
            if grads.hidden is not None:
                grads.hidden[r0:r1].addr_(slope, self.row)
            total += torch.mv(self.tiles.hidden[r0:r1].to(self.tiles.acc).t(), slope)
        grads.add_to_all(total / self.tiles.vocab, self.slope.sum() / self.tiles.vocab)
