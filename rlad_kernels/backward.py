"""Backward of a sweep: cotangents of a row's outputs → dlogits of a tile → d_hidden, d_weight, d_bias.

dlogits = a·(onehot_y − p) + Σ_k c_k(onehot_k − p) + l·p − b·p(log p + H) + t·(1[outside]·p/τ − p), τ the tail mass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlad_kernels.moments import merge_slots
from rlad_kernels.tiles import Tiles, empty


@dataclass
class Cotangents:
    """Upstream gradients of the kept rows in the form ``dlogits_`` wants; everything in it is linear in them."""

    slots: Tensor  # (n, J) int32, unique, −1 empty
    slot_grad: Tensor  # (n, J)
    slot_tail: Tensor | None  # (n, J) bool: a slot outside the support takes part in the tail
    rows: Tensor  # (6, n): lse, w, b, H, t, tail_lse
    entropy: bool
    tail: bool
    unscale: Tensor | None = None

    @classmethod
    def of(
        cls, slots: Tensor, lse: Tensor, lse_error: Tensor, a: Tensor, l: Tensor, b: Tensor | None, c: Tensor | None,
        t: Tensor | None, entropy: Tensor | None, tail_logp: Tensor | None,
    ) -> Cotangents:  # fmt: skip
        """From the cotangents a (logp), l (lse), b (entropy), c (topk_logp), t (tail_logp) and the row's lse, H, log τ.

        ``lse_error`` = float32 lse − lse: the kernels' p = e^{z−lse} is off by that factor in the whole row (1e-5 at logits of
        150), so it goes into the coefficients.
        """
        zero = torch.zeros_like(lse)
        grad = a.unsqueeze(1)
        if c is None and t is None:
            slots = slots[:, :1]
        else:
            c = torch.zeros_like(slots[:, 1:], dtype=lse.dtype) if c is None else c
            grad = torch.cat([grad, torch.where(slots[:, 1:] >= 0, c, 0)], 1)
        w = l - grad.sum(1)
        tail_lse = zero
        if t is not None:
            assert tail_logp is not None
            empty = tail_logp == -torch.inf  # no mass outside the support: no gradient, and e^{z−∞} keeps it finite
            t = torch.where(empty, 0, t)
            w = w - t
            tail_lse = lse + tail_logp
            t = t * (1 + torch.where(empty, 0, (tail_lse - lse) - tail_logp + lse_error))
            tail_lse = torch.where(empty, torch.inf, tail_lse)
        b_row, h_row = (zero, zero) if b is None or entropy is None else (b * (1 + lse_error), entropy + lse_error)
        rows = torch.stack([lse, w * (1 + lse_error), b_row, h_row, zero if t is None else t, tail_lse])
        in_support = torch.ones(slots.shape[1], dtype=torch.bool, device=slots.device)
        in_support[0] = False
        if slots.shape[1] > 1:
            slots, grad, member = merge_slots(slots, grad, in_support)
        else:
            member = in_support.expand_as(slots)
        return cls(slots, grad.contiguous(), ~member if t is not None else None, rows, b is not None, t is not None)

    def take(self, rows: Tensor | slice) -> Cotangents:
        """The cotangents of some rows."""
        tail = None if self.slot_tail is None else self.slot_tail[rows]
        return replace(self, slots=self.slots[rows], slot_grad=self.slot_grad[rows], slot_tail=tail, rows=self.rows[:, rows])

    @property
    def total(self) -> Tensor:
        """Σ_v dL/dz_v of each row: everything cancels but the gradient of lse."""
        return self.rows[1] + self.slot_grad.sum(1) + self.rows[4]

    def rescale(self, factor: Tensor) -> None:
        """Bring dlogits into float16's range by one power of two for the call; ``unscale`` takes it out of the gradients."""
        _, w, b, h, t, _ = self.rows
        bound = (w.abs() + self.slot_grad.abs().sum(1) + t.abs() + b.abs() * (1 + h)) * factor
        largest = bound.max() if bound.numel() else bound.new_ones(())
        scale = torch.exp2(torch.floor(torch.log2(4096 / torch.where(largest > 0, largest, 1))))
        self.slot_grad *= scale
        self.rows[[1, 2, 4]] *= scale
        self.unscale = 1 / scale


class Gradients:
    """The gradients asked for, accumulated in the accumulation dtype and cast once.

    ``whole`` keeps all of d_weight in the accumulation dtype, for loops with tokens outermost; otherwise one vocabulary
    tile's slab at a time is enough. ``scattered`` starts it from zero, for :meth:`add_columns` instead of :meth:`add`.
    """

    def __init__(
        self, tiles: Tiles, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool, *, whole: bool = False,
        scattered: bool = False,
    ) -> None:  # fmt: skip
        new = tiles.inv_temp.new_empty
        self.tiles, self.dtype, self._scattered = tiles, weight.dtype, scattered
        self.hidden = new(tiles.n, weight.shape[1]).zero_() if need_hidden else None
        self.bias = new(weight.shape[0]).zero_() if need_bias else None
        self.weight, self._whole, self._slab = None, None, None
        if need_weight:
            exact = weight.dtype == tiles.acc
            self._whole = empty(tiles.inv_temp, *weight.shape) if whole or scattered or exact else None
            self.weight = self._whole if exact else empty(weight, *weight.shape)
            for x in (self.weight, self._whole):
                if x is not None:
                    (x if scattered or tiles.n == 0 else x[tiles.vocab :]).zero_()

    def add(self, g: Tensor, w: Tensor, c0: int, rows: slice | Tensor, *, first: bool, last: bool, unscale: Tensor | None) -> None:
        """Add dlogits ``g`` of ``rows`` and the columns from c0, whose weight rows are ``w``.

        ``first`` overwrites d_weight of these columns, ``last`` finishes it.
        """
        c1 = c0 + g.shape[1]
        self._add_hidden(g, w, rows, unscale)
        if self.weight is not None:
            if self._whole is not None:
                slab = self._whole[c0:c1]
            elif first or self._slab is None:
                slab = self._slab = self.tiles.inv_temp.new_empty(c1 - c0, self.weight.shape[1])
            else:
                slab = self._slab
            self.tiles.add_product(slab, g.t(), self.tiles.hidden[rows], unscale, first=first)
            if last and self._whole is not self.weight:
                self.weight[c0:c1] = slab
        if self.bias is not None:
            total = g.sum(0, dtype=self.bias.dtype)
            self.bias[c0:c1] += total if unscale is None else total * unscale

    def add_columns(
        self, g: Tensor, w: Tensor, columns: Tensor, rows: Tensor, rest: Tensor, mean: Tensor, unscale: Tensor | None
    ) -> None:
        """Add dlogits ``g`` of ``rows`` and the scattered ``columns``; ``rest·mean`` stands for all other columns in d_hidden."""
        factor = 1 if unscale is None else unscale
        if self.hidden is not None:
            self._add_hidden(g, w, rows, unscale)
            self.hidden.index_add_(0, rows, torch.outer(rest * factor, mean))
        if self._whole is not None:
            part = self._whole.new_empty(len(columns), self._whole.shape[1])
            self.tiles.add_product(part, g.t(), self.tiles.hidden.index_select(0, rows), unscale, first=True)
            self._whole.index_add_(0, columns, part)
        if self.bias is not None:
            self.bias.index_add_(0, columns, g.sum(0, dtype=self.bias.dtype) * factor)

    def _add_hidden(self, g: Tensor, w: Tensor, rows: slice | Tensor, unscale: Tensor | None) -> None:
        if self.hidden is None:
            return
        if isinstance(rows, slice):
            self.tiles.add_product(self.hidden[rows], g, w, unscale)
        else:
            part = self.hidden.index_select(0, rows)
            self.tiles.add_product(part, g, w, unscale)
            self.hidden.index_copy_(0, rows, part)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """d_hidden, d_weight, d_bias in the head's dtype; empty where not asked for."""
        if self._scattered and self.weight is not None and self._whole is not None and self._whole is not self.weight:
            self.weight.copy_(self._whole)
        hidden = None if self.hidden is None else self.hidden.to(self.dtype)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        empty = self.tiles.weight.new_empty  # an op's outputs may not alias: each absent one is a tensor of its own
        return tuple(empty(0) if x is None else x for x in (hidden, self.weight, bias))  # type: ignore[return-value]


def backward_tile(tiles: Tiles, cot: Cotangents, x: Tensor, c0: int, inv_temp: Tensor) -> Tensor:
    """dlogits of one tile of raw logits ``x``, in place where the dtype allows; ``cot`` and ``inv_temp`` are its rows'."""
    g = x if tiles.grad_dtype == x.dtype else tiles.buffer(x.shape[0], x.shape[1], tiles.grad_dtype)
    torch.ops.rlad.dlogits_(
        g, x, c0, tiles.bias_tile(c0, c0 + x.shape[1]), inv_temp, tiles.logit_scale, tiles.softcap, cot.slots, cot.slot_grad,
        cot.slot_tail, cot.rows, cot.entropy, cot.tail,
    )  # fmt: skip
    return g
