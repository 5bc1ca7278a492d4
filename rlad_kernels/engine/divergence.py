"""The sweep of the full-vocabulary divergences: chunks of rows with all logits of both sides, one row pass, one gradient.

A chunk costs a product for the student and one for each teacher; the row pass then puts the chunk's dlogits in the place of the
student's logits, and two more products finish the gradient. Neither side ever has N×V logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.backends.contract import HEAD
from rlad_kernels.core.divergence import Divergence, Kind
from rlad_kernels.core.dtypes import acc_dtype, held_dtype
from rlad_kernels.core.modes import autograd_inside, without_autocast
from rlad_kernels.core.options import revived
from rlad_kernels.engine.call import Call
from rlad_kernels.engine.chunks import Chunks
from rlad_kernels.engine.gradients import Gradients, half_scale
from rlad_kernels.engine.loss import Fused
from rlad_kernels.engine.op import CALL, NEED, define, given, gradients, no_double_backward, result, scaled, wanted
from rlad_kernels.engine.rows import Kept, checked_finite, kept_inv_temp
from rlad_kernels.engine.shards import Shard
from rlad_kernels.engine.tiles import Tiles

_BLOCK_BYTES = 32 << 20  # logits that plain PyTorch, with all its temporaries, is given at a time


@dataclass
class Chunk:
    """Raw logits of some rows of one model; log-probs are temper(logits) − max − log_total, ``norm`` = (max, log_total).

    Not z − lse: at logits of 150 the rounding of a float32 lse alone would be 1e-5 in every log-prob.
    """

    logits: Tensor
    bias: Tensor | None
    inv_temp: Tensor
    logit_scale: float
    softcap: float
    norm: Tensor

    @property
    def args(self) -> tuple[Tensor, Tensor | None, Tensor, float, float, Tensor]:
        return self.logits, self.bias, self.inv_temp, self.logit_scale, self.softcap, self.norm

    def read_by(self, tiles: Tiles) -> Chunk:
        """For a student in another dtype: log-probs, made in float64. Logits that are rounded again miss their norm by an ulp."""
        if self.logits.dtype == tiles.acc:
            return self
        logp = torch.empty_like(self.logits, dtype=tiles.acc)
        for b in self.blocks(tiles.total):
            logp[b] = tiles.shard.log_softmax(self.temper(self.logits[b].double(), b))
        one, norm = (x.to(tiles.acc) for x in (torch.ones_like(self.inv_temp), torch.zeros_like(self.norm)))
        return Chunk(logp, None, one, 1.0, 0.0, norm)

    def temper(self, raw: Tensor, rows: slice) -> Tensor:
        """Tempered logits of some rows."""
        z = (raw if self.bias is None else raw + self.bias) * self.logit_scale
        z = self.softcap * torch.tanh(z / self.softcap) if self.softcap else z
        return z * self.inv_temp[rows].unsqueeze(1)

    def log_probs(self, rows: slice, shard: Shard) -> Tensor:
        # not by ``norm``: its maximum is of the row pass's logits, an ulp of which, at 100, is 1e-5 in the largest probability
        return shard.log_softmax(self.temper(self.logits[rows], rows))

    def blocks(self, vocab_size: int) -> Iterator[slice]:
        rows = max(1, _BLOCK_BYTES // (self.logits.element_size() * vocab_size))  # as many on every rank of a head
        return (slice(r, min(r + rows, len(self.logits))) for r in range(0, len(self.logits), rows))


class _Model(Chunks):
    """The kept rows of one model, chunk by chunk."""

    def __init__(self, name: str, tiles: Tiles, lent: Iterator[Tensor] | None, space: Tensor | None = None) -> None:
        super().__init__(tiles, space=space, lent=lent)
        self.name = name

    def chunk(self, at: slice) -> Chunk:
        tiles, x = self.tiles, self.logits(at)
        top, rest = tiles.shard.merged(self.stats[:, at], self.slot_logits[at])[0][:2]
        log_total = rest.log()
        checked_finite(self.name, top + log_total)
        return Chunk(x, tiles.bias, tiles.inv_temp[at], tiles.logit_scale, tiles.softcap, torch.stack([top, log_total]))


def _tiles(name: str, kept: Kept, call: Call, buffers: int, *, whole: bool = False) -> Tiles:
    inv_temp = kept_inv_temp(name, kept, call.inv_temp, call.hidden.shape[0])
    return Tiles(kept.take(call.hidden), *call[1:3], inv_temp, *call[4:], keep_logits=buffers, whole=whole)


@without_autocast
def run(
    name: str, student: Call, teachers: Sequence[Call], weights: Tensor, divergence: Divergence, keep: Tensor | None,
    cotangent: Tensor, need: tuple[bool, bool, bool], *, slope: bool = False,
) -> Fused:  # fmt: skip
    """Σ_i weights[i]·D(p_i, q) of each row, Σ_rows cotangent·value as the loss, and the loss's gradients.

    ``weights (T, N)``, ``cotangent (N,)``. ``slope`` leaves d_hidden in the accumulation dtype.
    """
    kept, kind = Kept(keep), divergence.kind()
    buffers = 2 + (len(teachers) > 1 and any(need))
    tiles = _tiles(name, kept, student, buffers, whole=need[1])
    grads = Gradients(tiles, student.weight, *need, whole=True) if any(need) else None
    lent = grads.lent() if grads else None
    model = _Model(name, tiles, lent)
    others: list[_Model] = []
    spaces: dict[torch.dtype, Tensor] = {}
    for teacher in teachers:
        acc, its = acc_dtype(teacher.hidden.dtype), _tiles(f"{name} (teacher)", kept, teacher, buffers)
        its.rows = tiles.rows
        others.append(_Model(f"{name} (teacher)", its, lent if acc == tiles.acc else None, spaces.get(acc)))
        spaces[acc] = others[-1].shared
    weights, pull = (kept.take(x.t()).to(tiles.acc).t() for x in (weights, cotangent.expand(1, -1)))
    several = buffers > 2  # then dlogits add up, and q is wanted each time
    total = model.space() if several else model.shared
    values = weights.new_zeros(tiles.n)
    for at in model:
        chunk, first = model.chunk(at), True
        g = None
        if grads is not None:
            g = grads.room(at.stop - at.start, 0, tiles.vocab) if tiles.waits and not several else model.view(total, at)
        for other, w in zip(others, weights[:, at], strict=True):
            if not w.is_cuda and not bool((w != 0).any()):
                continue
            side = other.chunk(at).read_by(tiles)
            rows = torch.stack([w, w * pull[0, at]])
            if kind is not None:
                _apply(kind, values[at], g, chunk, side, rows, first, tiles)
            else:
                _call(divergence, values[at], g, chunk, side, rows, first, tiles)
            first = False
        if grads is not None and g is not None:
            _send(grads, at, g.zero_() if first else g)
    token = kept.put(values)
    loss = (cotangent * token).sum()
    d_hidden, d_weight, d_bias = grads.finish() if grads else [student.weight.new_empty(0)] * 3
    if need[0]:
        d_hidden = kept.put(grads.hidden if slope and grads and grads.hidden is not None else d_hidden)
    return Fused(loss, token, {}, d_hidden, d_weight, d_bias)


def _apply(
    kind: Kind, values: Tensor, g: Tensor | None, student: Chunk, teacher: Chunk, rows: Tensor, first: bool, tiles: Tiles
) -> None:  # fmt: skip
    """One chunk against one teacher by the row pass; ``rows`` holds the weights of value and gradient."""
    shard, sides = tiles.shard, (*student.args, *teacher.args)
    if kind.coefficients is not None:
        blocks = student.blocks(tiles.total)
        shares = torch.cat([kind.coefficients(student.log_probs(b, shard), teacher.log_probs(b, shard), shard) for b in blocks], 1)
    elif kind.family == "taid":
        parts = rows.new_zeros(4, len(values))
        torch.ops.rlad.divergence_(values, None, *sides, rows.repeat(2, 1), "taid_norm", *kind.numbers, False, parts)
        shares = taid_normaliser(shard.gathered(parts[:3]))
    else:
        shares = torch.stack([torch.full_like(rows[0], kind.forward), torch.full_like(rows[0], kind.reverse)])
    rows = torch.cat([rows * kind.factor, shares])
    given = (*sides, rows, kind.family, *kind.numbers, not first)
    if shard.group is None:
        torch.ops.rlad.divergence_(values, g, *given)
        return
    sums = rows.new_empty(4, len(values))  # a column's gradient has to wait for the sums over all of them
    torch.ops.rlad.divergence_(values, None, *given, sums)
    values += torch.where(rows[0] == 0, 0, rows[0] * shard.summed(sums)[0])
    if g is not None:
        torch.ops.rlad.divergence_(values, g, *given, sums)


def taid_normaliser(parts: Tensor) -> Tensor:
    """(log_z, top) of rows, ``(2, R)``: log Σq^{1−τ}·p^τ = log_z + top, from what "taid_norm" found of each part ``(P, 3, R)``.

    log(1 + Σ tilt), exact for close models, and top 0; from the largest term, top, where that sum is small.
    """
    tilt, top, scaled = parts.unbind(1)
    tilt, most = tilt.sum(0), top.amax(0)
    far = tilt < -0.5
    scaled = torch.where(scaled == 0, 0, scaled * (top - most).exp()).sum(0)
    return torch.stack([torch.where(far, scaled.log(), tilt.log1p()), torch.where(far, most, 0)])


def _call(
    divergence: Divergence, values: Tensor, g: Tensor | None, student: Chunk, teacher: Chunk, rows: Tensor, first: bool,
    tiles: Tiles,
) -> None:  # fmt: skip
    """One chunk against one teacher by :meth:`Divergence.values`, differentiated by autograd."""
    for b in student.blocks(tiles.total):
        with autograd_inside() if g is not None else torch.no_grad():
            raw = student.logits[b].clone().requires_grad_(g is not None)
            found = divergence.values(student.temper(raw, b).log_softmax(1), teacher.log_probs(b, tiles.shard))
            if not isinstance(found, Tensor) or found.shape != rows[0, b].shape:
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"{divergence.name}: values must return one value a row, shape {tuple(rows[0, b].shape)}, got {got}"
                )
            grad = None
            if g is not None and found.requires_grad:
                (grad,) = torch.autograd.grad((found * rows[1, b]).sum(), raw)
        values[b] += torch.where(rows[0, b] == 0, 0, rows[0, b] * found.detach())
        if g is not None:
            part = torch.zeros_like(raw)
            if grad is not None:  # an infinite divergence without a finite gradient sends none
                live = (rows[1, b] != 0) & (~found.isinf() | grad.isfinite().all(1))
                part = torch.where(live.unsqueeze(1), grad, 0)
            g[b] = part if first else g[b] + part


def _send(grads: Gradients, at: slice, g: Tensor) -> None:
    """d_hidden, d_weight and d_bias of one chunk's dlogits; float16 ones are brought into its range by a power of two."""
    tiles, scale = grads.tiles, None
    if tiles.grad_dtype == torch.float16:
        scale = half_scale(torch.linalg.vector_norm(g, torch.inf))

    def tile(c0: int, c1: int) -> Tensor:
        part = g[:, c0:c1]
        if part.dtype == tiles.grad_dtype:
            return part
        return grads.room(len(g), c0, c1).copy_(part if scale is None else part * scale)

    grads.add_chunk(at, at, tile, None if scale is None else 1 / scale, None)


def _calls(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head: tuple[Any, ...], teachers: list[Tensor], heads: list[float]
) -> tuple[Call, list[Call]]:  # fmt: skip
    """Student and teachers from an op's flat arguments; see ``flat_teachers``."""
    student = Call(hidden, weight, bias, *head)
    found = []
    for i in range(len(teachers) // 4):
        h, w, b, inv_temp = teachers[4 * i : 4 * i + 4]
        found.append(Call(h, w, b if b.numel() else None, inv_temp, heads[2 * i], heads[2 * i + 1], *student[6:]))
    return student, found


def flat_teachers(teachers: Sequence[Call]) -> tuple[list[Tensor], list[float]]:
    """Teachers as an op's arguments: four tensors each, an empty one for no bias, and two numbers."""
    tensors, numbers = [], []
    for t in teachers:
        tensors += [t.hidden, t.weight, t.weight.new_empty(0) if t.bias is None else t.bias, t.inv_temp]
        numbers += [t.logit_scale, t.softcap]
    return tensors, numbers


def linear_divergence(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, inv_temp: Tensor, logit_scale: float, softcap: float,
    vocab_size: int, first: int, group: str,
    teachers: list[Tensor], teacher_heads: list[float], weights: Tensor, divergence: str, params: Tensor,
    ahead: bool, caller: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Implements ``rlad::linear_divergence``; with ``ahead`` also ∂value/∂hidden, from which the backward needs no product."""
    calls = _calls(hidden, weight, bias, (inv_temp, logit_scale, softcap, vocab_size, first, group), teachers, teacher_heads)
    one = weights.new_ones(hidden.shape[0])
    out = run(caller, *calls, weights, revived(divergence, params.tolist()), mask, one, (ahead, False, False), slope=True)
    return out.token_loss, out.d_hidden if ahead else weights.new_empty(0)


def linear_divergence_bwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, inv_temp: Tensor, logit_scale: float, softcap: float,
    vocab_size: int, first: int, group: str,
    teachers: list[Tensor], teacher_heads: list[float], weights: Tensor, divergence: str, params: Tensor,
    slope: Tensor, g: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements ``rlad::linear_divergence_bwd``: both sides' logits again, chunk by chunk, for the rows that have a cotangent."""
    live = g != 0 if mask is None else (g != 0) & mask
    if slope.numel():
        d_hidden = torch.where(live.unsqueeze(1), g.unsqueeze(1) * slope, 0).to(hidden.dtype)
        return d_hidden, weight.new_empty(0), weight.new_empty(0)
    calls = _calls(hidden, weight, bias, (inv_temp, logit_scale, softcap, vocab_size, first, group), teachers, teacher_heads)
    kind, need = revived(divergence, params.tolist()), (need_hidden, need_weight, need_bias)
    out = run("linear_divergence", *calls, weights, kind, live, g, need)
    return out.d_hidden.to(hidden.dtype), out.d_weight.to(weight.dtype), out.d_bias.to(weight.dtype)


def linear_divergence_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, inv_temp: Tensor, logit_scale: float, softcap: float,
    vocab_size: int, first: int, group: str,
    teachers: list[Tensor], teacher_heads: list[float], weights: Tensor, divergence: str, params: Tensor,
    row_weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool, caller: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements ``rlad::linear_divergence_loss``: the loss with its gradients finished in one sweep, for ``torch.compile``."""
    calls = _calls(hidden, weight, bias, (inv_temp, logit_scale, softcap, vocab_size, first, group), teachers, teacher_heads)
    need = (need_hidden, need_weight, need_bias)
    out = run(caller, *calls, weights, revived(divergence, params.tolist()), mask, row_weight, need)
    return out.loss, out.token_loss, *out[3:]


_TEACHERS = "Tensor[] teachers, float[] teacher_heads, Tensor weights, str divergence, Tensor params"
_ARGS = f"({HEAD}, Tensor? mask, {CALL}, {_TEACHERS}, "


def _no_gradient(ctx: Any) -> list[Any]:
    """For mask, call and teachers' arguments."""
    return [*[None] * 7, [None] * ctx.teachers, *[None] * 4]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *head, teachers, ctx.teacher_heads, weights, ctx.divergence, params, _, _ = inputs
    ctx.head, ctx.teachers = head[5:], len(teachers)
    ctx.save_for_backward(*head[:5], weights, params, output[1], *teachers)


def _backward(ctx: Any, g: Tensor, _: Tensor) -> Any:
    hidden, weight, bias, mask, inv_temp, weights, params, slope, *teachers = ctx.saved_tensors
    need = wanted(ctx, bias)
    sides = (teachers, ctx.teacher_heads, weights, ctx.divergence, params)
    grads = divergence_bwd_op(hidden, weight, bias, mask, inv_temp, *ctx.head, *sides, slope, g, *need)
    return *given(grads, need), *_no_gradient(ctx), None, None


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.need, ctx.teachers = inputs[0].dtype, tuple(inputs[-4:-1]), len(inputs[10])
    ctx.save_for_backward(*output[2:])


def _loss_backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> Any:
    return *scaled(ctx, g_loss, ctx.saved_tensors), *_no_gradient(ctx), *[None] * 5


def _fake(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return result(hidden, hidden.shape[:1]), result(hidden, hidden.shape, args[-2])


def _loss_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    made = gradients(hidden, weight, bias, args[-4:-1], held_dtype(weight.dtype))
    return result(hidden, ()), result(hidden, hidden.shape[:1]), *made


divergence_op = define("linear_divergence", f"{_ARGS}bool ahead, str caller) -> (Tensor, Tensor)", linear_divergence)
divergence_bwd_op = define(
    "linear_divergence_bwd", f"{_ARGS}Tensor slope, Tensor g, {NEED}) -> (Tensor, Tensor, Tensor)", linear_divergence_bwd
)
divergence_loss_op = define(
    "linear_divergence_loss",
    f"{_ARGS}Tensor row_weight, {NEED}, str caller) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    linear_divergence_loss,
)
torch.library.register_fake("rlad::linear_divergence", _fake)
torch.library.register_fake(
    "rlad::linear_divergence_bwd", lambda hidden, weight, bias, *args: gradients(hidden, weight, bias, args[-3:])
)
torch.library.register_fake("rlad::linear_divergence_loss", _loss_fake)
torch.library.register_autograd("rlad::linear_divergence", _backward, setup_context=_setup)
torch.library.register_autograd("rlad::linear_divergence_loss", _loss_backward, setup_context=_loss_setup)
no_double_backward("linear_divergence_bwd")
