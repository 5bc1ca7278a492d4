"""Backward of a sweep: cotangents of a row's outputs → dlogits of a tile → d_hidden, d_weight, d_bias.

dlogits = a·(onehot_y − p) + Σ_k c_k(onehot_k − p) + l·p − b·p(log p + H) + t·(1[outside]·p/τ − p), τ the tail mass.

Those of the slots come whole from the forward's log-probs: where p is next to 1 they are small differences, in which the
rounding of a logit, recomputed or not, would drown the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlad_kernels.backends.contract import on_cpu
from rlad_kernels.core.dtypes import held_dtype
from rlad_kernels.engine.statistics import merge_slots
from rlad_kernels.engine.tiles import Tiles, empty
from rlad_kernels.engine.waiting import Waiting

NEAR = -0.5  # a log-prob from which 1 − p is formed as −expm1(log p)


@dataclass
class Cotangents:
    """Upstream gradients of the kept rows in the form ``dlogits_`` wants; everything in it is linear in them."""

    target: Tensor  # (n, 1) int32
    slots: Tensor  # (n, J) int32, unique, −1 empty: the target among them
    slot_dz: Tensor  # (n, J) dL/dz there
    rows: Tensor  # (6, n): lse, w, b, H, t, tail_lse, of which dL/dz of the other columns is made
    total: Tensor | None  # (n,) Σ_v dL/dz_v: everything cancels but the gradient of lse; None is 0
    entropy: bool
    tail: bool
    unscale: Tensor | None = None
    lost: Tensor | None = None  # (n, 1) what rounding dlogits to bfloat16 took from the target's entry
    _sorted: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls,
        slots: Tensor,
        logp: Tensor,
        topk_logp: Tensor | None,
        lse: Tensor,
        lse_error: Tensor,
        a: Tensor | None,
        l: Tensor | None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        t: Tensor | None = None,
        entropy: Tensor | None = None,
        tail_logp: Tensor | None = None,
    ) -> Cotangents:
        """From a row's outputs and their cotangents a (logp), l (lse), b (entropy), c (topk_logp), t (tail_logp).

        ``lse_error`` = float32 lse − lse: the kernels' p = e^{z−lse} is off by that factor in the whole row (1e-5 at logits of
        150), so it goes into the coefficients.
        """
        entropy, tail_logp = None if b is None else entropy, None if t is None else tail_logp
        if c is None and t is None:
            slots, topk_logp = slots[:, :1], None
        own, slot_dz, rows = torch.ops.rlad.row_cotangents(
            slots, logp, topk_logp, lse, lse_error, a, l, b, c, t, entropy, tail_logp
        )
        return cls(slots[:, :1], own, slot_dz, rows, l, b is not None, t is not None)

    def take(self, rows: Tensor | slice) -> Cotangents:
        """The cotangents of some rows."""
        lost = None if self.lost is None else self.lost[rows]
        return replace(
            self,
            target=self.target[rows],
            slots=self.slots[rows],
            slot_dz=self.slot_dz[rows],
            rows=self.rows[:, rows],
            total=None if self.total is None else self.total[rows],
            lost=lost,
            _sorted=None,
        )

    def sorted(self) -> tuple[Tensor, Tensor]:
        """The targets in ascending order, and the rows that they are of."""
        if self._sorted is None:
            ids, rows = self.target.flatten().sort(stable=True)
            self._sorted = ids, rows
        return self._sorted

    def fit(self, tiles: Tiles, rows: slice | Tensor) -> None:
        """Prepare for the dlogits of these columns and their dtype; ``rows`` of ``tiles`` are these.

        bfloat16: what rounding takes from the targets' entries is kept in ``lost``. Equal cotangents would be rounded alike there,
        by up to 0.4 % of what is nearly the whole gradient. float16: one power of two for the call brings dlogits into its range;
        ``unscale`` takes it out of the gradients.
        """
        self.slots, self.target = tiles.shard.own(self.slots), tiles.shard.own(self.target)
        if tiles.grad_dtype == torch.bfloat16:
            self.lost = torch.zeros_like(self.slot_dz[:, :1])
        if tiles.grad_dtype != torch.float16:
            return
        _, w, b, h, t, _ = self.rows
        size = self.slot_dz.abs().amax(1) + w.abs() + t.abs() + b.abs() * (1 + h)
        bound = size * tiles.inv_temp[rows] * abs(tiles.logit_scale)
        largest = bound.max() if bound.numel() else bound.new_ones(())
        scale = half_scale(largest)
        self.slot_dz *= scale
        self.rows[[1, 2, 4]] *= scale
        self.total = None if self.total is None else self.total * scale
        self.unscale = 1 / scale


def row_cotangents_cpu(
    slots: Tensor,
    logp: Tensor,
    topk_logp: Tensor | None,
    lse: Tensor,
    lse_error: Tensor,
    g_logp: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    g_topk: Tensor | None,
    g_tail: Tensor | None,
    entropy: Tensor | None,
    tail_logp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements ``rlad::row_cotangents`` on CPU: ``slots``, ``slot_dz`` and ``rows`` of :class:`Cotangents`."""
    zero = torch.zeros_like(lse)
    a, l, b, t, h, tau = (zero if x is None else x for x in (g_logp, g_lse, g_entropy, g_tail, entropy, tail_logp))
    grad, logp, inside = a.unsqueeze(1), logp.unsqueeze(1), None
    if topk_logp is not None:
        c = torch.zeros_like(topk_logp) if g_topk is None else torch.where(slots[:, 1:] >= 0, g_topk, 0)
        slots, grad, logp, inside = merge_slots(slots, torch.cat([grad, c], 1), torch.cat([logp, topk_logp], 1))
    empty = tau == -torch.inf  # no mass outside the support: no gradient, and e^{z−∞} keeps it finite
    t, tau = torch.where(empty, 0, t), torch.where(empty, 0, tau)
    w = l - grad.sum(1)
    slot_dz = _slot_dz(grad, logp, inside, l, w - t, b, h, t, tau)
    # what is left lies outside the support: p·(w − t + t/τ), from one exponential where 1/τ − 1 would be a small difference
    whole = tau > NEAR
    w = w + t * torch.where(whole, torch.expm1(-tau), -1)
    tail_lse = lse + tau
    t = torch.where(whole, 0, t * (1 + (tail_lse - lse) - tau + lse_error))
    tail_lse = torch.where(empty, torch.inf, tail_lse)
    rows = torch.stack([lse, w * (1 + lse_error), b * (1 + lse_error), h + lse_error, t, tail_lse])
    return slots.clone() if topk_logp is None else slots, slot_dz, rows


on_cpu("row_cotangents", row_cotangents_cpu)


def half_scale(largest: Tensor) -> Tensor:
    """The power of two that brings dlogits of at most ``largest`` into float16's range."""
    return torch.exp2(torch.floor(torch.log2(4096 / torch.where(largest > 0, largest, 1))))


def _slot_dz(
    grad: Tensor,
    logp: Tensor,
    inside: Tensor | None,
    l: Tensor,
    w: Tensor,
    b: Tensor,
    entropy: Tensor,
    t: Tensor,
    tail_logp: Tensor,
) -> Tensor:
    """dL/dz = g + w·p − b·p(log p + H) + t·p/τ of the slots ``(n, J)``, p/τ only outside the support, w = l − Σ g − t.

    Where p is next to 1: g + w + t = l − Σ of the *other* g, and w·(p − 1) and t·(p/τ − 1) on top of it.
    """
    w, b, t, entropy, tail_logp = (x.unsqueeze(1) for x in (w, b, t, entropy, tail_logp))
    finite, top = logp > -torch.inf, logp > NEAR
    others = l.unsqueeze(1) - torch.where(top, 0, grad).sum(1, keepdim=True)
    share = torch.where(finite if inside is None else finite & ~inside, logp - tail_logp, -torch.inf)
    near, far = others + w * logp.expm1() + t * share.expm1(), grad + w * logp.exp() + t * share.exp()
    return torch.where(top, near, far) - torch.where(finite, b * logp.exp() * (logp + entropy), 0)


class Gradients:
    """The gradients asked for, accumulated in the accumulation dtype and cast once.

    ``whole`` keeps all of d_weight in the accumulation dtype, for loops with tokens outermost, or the dlogits of all rows
    :class:`Waiting` where they take no more memory, and leaves float16 gradients in it, for a loss scale that is not known yet;
    otherwise one vocabulary tile's slab at a time is enough. ``scattered`` starts it from zero, for :meth:`add_columns` instead
    of :meth:`add`, which leaves in ``rest (N,)`` the part of each row's dlogits that no column has taken.
    """

    def __init__(
        self,
        tiles: Tiles,
        weight: Tensor,
        need_hidden: bool,
        need_weight: bool,
        need_bias: bool,
        *,
        whole: bool = False,
        scattered: bool = False,
    ) -> None:
        new = tiles.inv_temp.new_empty
        self.tiles, self._scattered = tiles, scattered
        self.dtype = held_dtype(weight.dtype) if whole else weight.dtype
        zeros = tiles.inv_temp.new_zeros
        some_rows = whole or scattered or not tiles.vocab  # not all of them may send any gradient
        self.hidden = (zeros if some_rows else new)(tiles.n, weight.shape[1]) if need_hidden else None
        self.bias = zeros(weight.shape[0]) if need_bias else None
        self.rest = zeros(tiles.n) if scattered else new(0)
        self.weight, self._whole, self._slab, self._waiting, self._row = None, None, None, None, None
        if need_weight:
            exact = self.dtype == tiles.acc
            if tiles.waits:
                self._waiting, whole = Waiting(tiles), False
            self._whole = empty(tiles.inv_temp, *weight.shape) if whole or scattered or exact else None
            self.weight = self._whole if exact else empty(weight, *weight.shape)
            empty_rows = 0 if scattered or tiles.n == 0 else tiles.vocab  # from here on nothing else writes
            for x in (self.weight, self._whole):
                if x is not None and empty_rows < len(x):
                    x[empty_rows:].zero_()

    def add(self, g: Tensor, w: Tensor, c0: int, rows: slice | Tensor, *, first: bool, unscale: Tensor | None) -> None:
        """Add dlogits ``g`` of ``rows`` and the columns from c0, with weight rows ``w``; ``first`` overwrites d_weight there."""
        c1 = c0 + g.shape[1]
        self._add_hidden(g, w, rows, unscale, first=c0 == 0)
        if self.weight is not None and self._waiting is None:
            if self._whole is not None:
                slab = self._whole[c0:c1]
            elif first or self._slab is None:
                slab = self._slab = self.tiles.inv_temp.new_empty(c1 - c0, self.weight.shape[1])
            else:
                slab = self._slab
            self.tiles.add_product(slab, g.t(), self.tiles.hidden[rows], unscale, first=first)
        if self.bias is not None:
            total = g.sum(0, dtype=self.bias.dtype)
            self.bias[c0:c1] += total if unscale is None else total * unscale

    def add_columns(self, g: Tensor, w: Tensor, columns: Tensor, rows: Tensor, rest: Tensor, unscale: Tensor | None) -> None:
        """Add dlogits ``g`` of ``rows`` and the scattered ``columns``; ``rest`` is the sum of a row's other dlogits."""
        self.leave(rows, rest, unscale)
        self._add_hidden(g, w, rows, unscale)
        if self._whole is not None:
            part = self._whole.new_empty(len(columns), self._whole.shape[1])
            self.tiles.add_product(part, g.t(), self.tiles.hidden.index_select(0, rows), unscale, first=True)
            self._whole.index_add_(0, columns, part)
        if self.bias is not None:
            total = g.sum(0, dtype=self.bias.dtype)
            self.bias.index_add_(0, columns, total if unscale is None else total * unscale)

    def leave(self, rows: Tensor, rest: Tensor, unscale: Tensor | None) -> None:
        """Keep the sum of those dlogits of ``rows`` that no column has taken."""
        self.rest[rows] = rest if unscale is None else rest * unscale

    def close(self, cot: Cotangents | None, rows: slice | Tensor, c0: int, c1: int, *, last: bool) -> None:
        """Add to these columns' d_weight what rounding has taken from ``rows``, all of whose dlogits are in; ``last`` casts it."""
        if self.weight is None or self.tiles.n == 0 or self._waiting is not None:
            return
        slab = self._slab if self._whole is None else self._whole[c0:c1]
        assert slab is not None
        if cot is not None and cot.lost is not None:
            sorted_ids, order = cot.sorted()
            torch.ops.rlad.gather_dweight_(slab, cot.lost, self.tiles.hidden[rows], order, sorted_ids, True, c0)
        if last and self._whole is not self.weight:
            self.weight[c0:c1] = slab

    def close_rows(self, cot: Cotangents, rows: slice | Tensor) -> None:
        """Add to d_hidden and d_bias what rounding has taken from ``rows``, all of whose dlogits are in."""
        if cot.lost is None:
            return
        if self.hidden is not None:
            part = self.hidden[rows]
            torch.ops.rlad.gather_dhidden_(part, cot.lost, self.tiles.weight, cot.target, True)
            if not isinstance(rows, slice):
                self.hidden[rows] = part
        if self.bias is not None:
            sorted_ids, order = cot.sorted()
            ones = self.tiles.hidden.new_ones(len(cot.target), 1)
            into = self.bias[: self.tiles.vocab].unsqueeze(1)
            torch.ops.rlad.gather_dweight_(into, cot.lost, ones, order, sorted_ids, True)

    def add_to_all(self, row: Tensor, bias: Tensor) -> None:
        """Add the same to every row of d_weight and d_bias, all of whose dlogits are in."""
        whole, vocab = self._whole, self.tiles.vocab
        if self.weight is not None and whole is not None:
            whole[:vocab] += row
            if whole is not self.weight:
                self.weight[:vocab] = whole[:vocab]
        self._row = row
        if self.bias is not None:
            self.bias[:vocab] += bias

    def add_chunk(
        self, at: slice, rows: slice | Tensor, tile: Callable[[int, int], Tensor], unscale: Tensor | None, cot: Cotangents | None
    ) -> None:
        """Add all dlogits of ``rows``, those of the chunk ``at`` that send any: ``tile(c0, c1)`` makes a tile's."""
        for c0, c1, w in self.tiles.columns():
            self.add(tile(c0, c1), w, c0, rows, first=at.start == 0, unscale=unscale)
            self.close(cot, rows, c0, c1, last=at.stop == self.tiles.n)
        if cot is not None:
            self.close_rows(cot, rows)
        if self._waiting is not None:
            self._waiting.close(rows, None if cot is None else cot.target, None if cot is None else cot.lost)

    def room(self, rows: int, c0: int, c1: int) -> Tensor:
        """Where dlogits of the next ``rows`` and these columns go that do not take their logits' place."""
        if self._waiting is not None:
            return self._waiting.tile(rows, c0, c1)
        return self.tiles.buffer(rows, c1 - c0, self.tiles.grad_dtype)

    def _add_hidden(self, g: Tensor, w: Tensor, rows: slice | Tensor, unscale: Tensor | None, *, first: bool = False) -> None:
        if self.hidden is None:
            return
        if isinstance(rows, slice):
            self.tiles.add_product(self.hidden[rows], g, w, unscale, first=first)
        else:
            part = self.hidden.index_select(0, rows)
            self.tiles.add_product(part, g, w, unscale)
            self.hidden.index_copy_(0, rows, part)

    def lent(self) -> Iterator[Tensor]:
        """Memories for a chunk's logits, until :meth:`finish`."""
        return iter(()) if self._waiting is None or self.weight is None else self._waiting.lent(self.weight)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """d_hidden, d_weight, d_bias in the head's dtype, or the one they wait in; empty where not asked for."""
        if self._scattered and self.weight is not None and self._whole is not None and self._whole is not self.weight:
            self.weight.copy_(self._whole)
        if self._waiting is not None and self.weight is not None and self.tiles.n > 0:
            self._waiting.finish(self.weight, self._row)
        hidden = None if self.hidden is None else self.tiles.shard.summed(self.hidden).to(self.dtype)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        absent = self.tiles.weight.new_empty  # an op's outputs may not alias: each absent one is a tensor of its own
        return tuple(absent(0) if x is None else x for x in (hidden, self.weight, bias))  # type: ignore[return-value]


def backward_tile(
    tiles: Tiles, cot: Cotangents, x: Tensor, c0: int, inv_temp: Tensor, grads: Gradients | None = None, *, whole: bool = False
) -> Tensor:
    """dlogits of one tile of raw logits ``x``, in place where the dtype allows and ``x`` need not stay ``whole``.

    ``cot`` and ``inv_temp`` are its rows'; ``grads`` has room for them where they are to be added to it.
    """
    n, cols = x.shape
    if tiles.grad_dtype == x.dtype and not whole:
        g = x
    else:
        g = tiles.buffer(n, cols, tiles.grad_dtype) if grads is None else grads.room(n, c0, c0 + cols)
    head = (tiles.bias_tile(c0, c0 + x.shape[1]), inv_temp, tiles.logit_scale, tiles.softcap)
    torch.ops.rlad.dlogits_(g, x, c0, *head, cot.slots, cot.slot_dz, cot.rows, cot.target, cot.lost, cot.entropy, cot.tail)
    return g
