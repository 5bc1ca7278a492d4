"""The sweep of the full-vocabulary divergences: chunks of rows with all logits of both sides, one row pass, one gradient.

A chunk costs a product for the student and one for each teacher; the row pass then puts the chunk's dlogits in the place of the
student's logits, and two more products finish the gradient. Neither side ever has N×V logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.dtypes import held_dtype
from rlad_kernels.core.modes import autograd_inside, without_autocast
from rlad_kernels.engine.call import Call
from rlad_kernels.engine.gradients import Gradients
from rlad_kernels.engine.loss import Fused
from rlad_kernels.engine.op import CALL, HEAD, NEED, define, given, gradients, no_double_backward, result, scaled, wanted
from rlad_kernels.engine.rows import Kept, checked_finite, kept_inv_temp
from rlad_kernels.engine.tiles import Tiles, empty
from rlad_kernels.losses.divergence_kinds import DIVERGENCES, Kind

OnChunk = Callable[[Tensor, Tensor], Tensor]  # a user's divergence: log-probs (C, V) of student and teacher → (C,)
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

    def to(self, dtype: torch.dtype) -> Chunk:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Chunk(self.logits.to(dtype), bias, self.inv_temp.to(dtype), *self.args[3:5], self.norm.to(dtype))

    def temper(self, raw: Tensor, rows: slice) -> Tensor:
        """Tempered logits of some rows."""
        z = (raw if self.bias is None else raw + self.bias) * self.logit_scale
        z = self.softcap * torch.tanh(z / self.softcap) if self.softcap else z
        return z * self.inv_temp[rows].unsqueeze(1)

    def log_probs(self, rows: slice) -> Tensor:
        # not by ``norm``: its maximum is of the row pass's logits, an ulp of which, at 100, is 1e-5 in the largest probability
        return self.temper(self.logits[rows], rows).log_softmax(1)

    def blocks(self) -> Iterator[slice]:
        rows = max(1, _BLOCK_BYTES // (self.logits.element_size() * self.logits.shape[1]))
        return (slice(r, min(r + rows, len(self.logits))) for r in range(0, len(self.logits), rows))


class _Model:
    """The kept rows of one model, and its chunks."""

    def __init__(self, name: str, kept: Kept, call: Call, buffers: int) -> None:
        rows = call.hidden.shape[0]
        self.name = name
        inv_temp = kept_inv_temp(name, kept, call.inv_temp, rows)
        self.tiles = Tiles(kept.take(call.hidden), *call[1:3], inv_temp, *call[4:], keep_logits=buffers)
        self.stats, self.slot_logits = self.tiles.new_stats(0)
        self.slots = torch.empty(self.tiles.n, 0, dtype=torch.int32, device=call.hidden.device)

    def buffer(self) -> Tensor:
        return empty(self.tiles.inv_temp, self.tiles.rows * self.tiles.vocab)

    def chunk(self, r0: int, r1: int, buffer: Tensor) -> Chunk:
        tiles = self.tiles
        x = view(buffer, r1 - r0, tiles.vocab)
        tiles.fold_rows(x, r0, r1, self.slots, self.stats, self.slot_logits, entropy=False, extras=False)
        top, rest = self.stats[:2, r0:r1]
        log_total = rest.log()
        checked_finite(self.name, top + log_total)
        return Chunk(x, tiles.bias, tiles.inv_temp[r0:r1], tiles.logit_scale, tiles.softcap, torch.stack([top, log_total]))


def view(buffer: Tensor, rows: int, cols: int) -> Tensor:
    return buffer[: rows * cols].view(rows, cols)


@without_autocast
def run(
    name: str, student: Call, teachers: Sequence[Call], weights: Tensor, kind: Kind | OnChunk, keep: Tensor | None,
    cotangent: Tensor, need: tuple[bool, bool, bool], *, slope: bool = False,
) -> Fused:  # fmt: skip
    """Σ_i weights[i]·D(p_i, q) of each row, Σ_rows cotangent·value as the loss, and the loss's gradients.

    ``weights (T, N)``, ``cotangent (N,)``. ``slope`` leaves d_hidden in the accumulation dtype.
    """
    kept = Kept(keep)
    buffers = 2 + (len(teachers) > 1 and any(need))
    model = _Model(name, kept, student, buffers)
    tiles = model.tiles
    others = [_Model(f"{name} (teacher)", kept, t, buffers) for t in teachers]
    for other in others:
        other.tiles.rows = tiles.rows
    weights, pull = (kept.take(x.t()).to(tiles.acc).t() for x in (weights, cotangent.expand(1, -1)))
    grads = Gradients(tiles, student.weight, *need, whole=True) if any(need) else None
    logits = model.buffer()
    space = {other.tiles.acc: other.buffer() for other in others}
    total = model.buffer() if buffers > 2 else logits  # with several teachers their dlogits add up, and q is wanted each time
    values = weights.new_zeros(tiles.n)
    for r0, r1 in tiles.row_ranges():
        chunk, first = model.chunk(r0, r1, logits), True
        g = view(total, r1 - r0, tiles.vocab) if grads else None
        for other, w in zip(others, weights[:, r0:r1], strict=True):
            if not w.is_cuda and not bool((w != 0).any()):
                continue
            teacher = other.chunk(r0, r1, space[other.tiles.acc])
            teacher = teacher if other.tiles.acc == tiles.acc else teacher.to(tiles.acc)
            rows = torch.stack([w, w * pull[0, r0:r1]])
            (_apply if isinstance(kind, Kind) else _call)(kind, values[r0:r1], g, chunk, teacher, rows, first)  # type: ignore[arg-type]
            first = False
        if grads is not None and g is not None:
            _send(tiles, grads, g.zero_() if first else g, r0, r1)
    token = kept.put(values)
    loss = (cotangent * token).sum()
    d_hidden, d_weight, d_bias = grads.finish() if grads else [student.weight.new_empty(0)] * 3
    if need[0]:
        d_hidden = kept.put(grads.hidden if slope and grads and grads.hidden is not None else d_hidden)
    return Fused(loss, token, {}, d_hidden, d_weight, d_bias)


def _apply(kind: Kind, values: Tensor, g: Tensor | None, student: Chunk, teacher: Chunk, rows: Tensor, first: bool) -> None:
    """One chunk against one teacher by the row pass; ``rows`` holds the weights of value and gradient."""
    shares = torch.stack([torch.full_like(rows[0], kind.forward), torch.full_like(rows[0], kind.reverse)])
    if kind.coefficients is not None:
        found = [kind.coefficients(student.log_probs(b), teacher.log_probs(b)) for b in student.blocks()]
        shares = torch.cat(found, 1)
    torch.ops.rlad.divergence_(
        values, g, *student.args, *teacher.args, torch.cat([rows * kind.factor, shares]), kind.family, *kind.numbers, not first
    )


def _call(kind: OnChunk, values: Tensor, g: Tensor | None, student: Chunk, teacher: Chunk, rows: Tensor, first: bool) -> None:
    """One chunk against one teacher by a user's function, differentiated by autograd."""
    for b in student.blocks():
        with autograd_inside() if g is not None else torch.no_grad():
            raw = student.logits[b].clone().requires_grad_(g is not None)
            found = kind(student.temper(raw, b).log_softmax(1), teacher.log_probs(b))
            if found.shape != rows[0, b].shape:
                raise ValueError(
                    f"linear_divergence_loss: divergence must return one value a row, shape {tuple(rows[0, b].shape)}, "
                    f"got {tuple(found.shape)}"
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


def _send(tiles: Tiles, grads: Gradients, g: Tensor, r0: int, r1: int) -> None:
    """d_hidden, d_weight and d_bias of one chunk's dlogits; float16 ones are brought into its range by a power of two."""
    scale = unscale = None
    if tiles.grad_dtype == torch.float16:
        largest = torch.linalg.vector_norm(g, torch.inf)
        scale = torch.exp2(torch.floor(torch.log2(4096 / torch.where(largest > 0, largest, 1))))
        unscale = 1 / scale
    for c0, c1, w in tiles.columns():
        part = g[:, c0:c1]
        if part.dtype != tiles.grad_dtype:
            narrow = tiles.buffer(r1 - r0, c1 - c0, tiles.grad_dtype)
            part = narrow.copy_(part if scale is None else part * scale)
        grads.add(part, w, c0, slice(r0, r1), first=r0 == 0, unscale=unscale)
        grads.close(None, slice(r0, r1), c0, c1, last=r1 == tiles.n)


def _calls(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head: tuple[Any, ...], teachers: list[Tensor], heads: list[float]
) -> tuple[Call, list[Call]]:  # fmt: skip
    """Student and teachers from an op's flat arguments; see ``flat_teachers``."""
    student = Call(hidden, weight, bias, *head)
    found = []
    for i in range(len(teachers) // 4):
        h, w, b, inv_temp = teachers[4 * i : 4 * i + 4]
        found.append(Call(h, w, b if b.numel() else None, inv_temp, heads[2 * i], heads[2 * i + 1], student.vocab_size))
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
    vocab_size: int, teachers: list[Tensor], teacher_heads: list[float], weights: Tensor, divergence: str, params: Tensor,
    ahead: bool, caller: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Implements ``rlad::linear_divergence``; with ``ahead`` also ∂value/∂hidden, from which the backward needs no product."""
    calls = _calls(hidden, weight, bias, (inv_temp, logit_scale, softcap, vocab_size), teachers, teacher_heads)
    one = weights.new_ones(hidden.shape[0])
    out = run(caller, *calls, weights, DIVERGENCES[divergence].kind(*params.tolist()), mask, one, (ahead, False, False), slope=True)
    return out.token_loss, out.d_hidden if ahead else weights.new_empty(0)


def linear_divergence_bwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, inv_temp: Tensor, logit_scale: float, softcap: float,
    vocab_size: int, teachers: list[Tensor], teacher_heads: list[float], weights: Tensor, divergence: str, params: Tensor,
    slope: Tensor, g: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements ``rlad::linear_divergence_bwd``: both sides' logits again, chunk by chunk, for the rows that have a cotangent."""
    live = g != 0 if mask is None else (g != 0) & mask
    if slope.numel():
        d_hidden = torch.where(live.unsqueeze(1), g.unsqueeze(1) * slope, 0).to(hidden.dtype)
        return d_hidden, weight.new_empty(0), weight.new_empty(0)
    calls = _calls(hidden, weight, bias, (inv_temp, logit_scale, softcap, vocab_size), teachers, teacher_heads)
    kind, need = DIVERGENCES[divergence].kind(*params.tolist()), (need_hidden, need_weight, need_bias)
    out = run("linear_divergence", *calls, weights, kind, live, g, need)
    return out.d_hidden.to(hidden.dtype), out.d_weight.to(weight.dtype), out.d_bias.to(weight.dtype)


def linear_divergence_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, inv_temp: Tensor, logit_scale: float, softcap: float,
    vocab_size: int, teachers: list[Tensor], teacher_heads: list[float], weights: Tensor, divergence: str, params: Tensor,
    row_weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool, caller: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements ``rlad::linear_divergence_loss``: the loss with its gradients finished in one sweep, for ``torch.compile``."""
    calls = _calls(hidden, weight, bias, (inv_temp, logit_scale, softcap, vocab_size), teachers, teacher_heads)
    kind, need = DIVERGENCES[divergence].kind(*params.tolist()), (need_hidden, need_weight, need_bias)
    out = run(caller, *calls, weights, kind, mask, row_weight, need)
    return out.loss, out.token_loss, *out[3:]


_TEACHERS = "Tensor[] teachers, float[] teacher_heads, Tensor weights, str divergence, Tensor params"
_ARGS = f"({HEAD}, Tensor? mask, {CALL}, {_TEACHERS}, "


def _no_gradient(ctx: Any) -> list[Any]:
    """For mask, call and teachers' arguments."""
    return [*[None] * 5, [None] * ctx.teachers, *[None] * 4]


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
    ctx.dtype, ctx.need, ctx.teachers = inputs[0].dtype, tuple(inputs[-4:-1]), len(inputs[8])
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
