"""fused_linear_loss: a token-level loss inside the sweep, three matrix products for forward and backward.

Rows go chunk by chunk with all their logits. The loss's own autograd runs on the chunk's ``(C,)`` and ``(C, K)`` tensors,
and the chunk's dlogits replace its logits in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rlad_kernels.core.dtypes import held_dtype
from rlad_kernels.core.metrics import METRICS, MetricSums
from rlad_kernels.core.modes import autograd_inside, ordinary, without_autocast
from rlad_kernels.core.registry import TOKEN_LOSSES
from rlad_kernels.core.types import TokenScores
from rlad_kernels.engine import sparse
from rlad_kernels.engine.call import Call
from rlad_kernels.engine.gradients import Cotangents, Gradients, backward_tile
from rlad_kernels.engine.op import CALL, HEAD, NEED, define, gradients, result, scaled
from rlad_kernels.engine.outputs import outputs, row_slots
from rlad_kernels.engine.rows import Kept, checked_finite, kept_inv_temp
from rlad_kernels.engine.statistics import Stats
from rlad_kernels.engine.tiles import Tiles, empty

TokenLoss = Callable[..., Any]


class Fused(NamedTuple):
    """What one fused sweep leaves: the loss, per-token losses, metrics and the finished gradients."""

    loss: Tensor
    token_loss: Tensor
    metrics: dict[str, Tensor]
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


def _token_loss(
    name: str, token_loss: TokenLoss, scores: TokenScores, inputs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    try:
        out = token_loss(scores, **inputs)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise TypeError(f"{name}: token_loss does not take inputs {sorted(inputs)}: {error}") from error
    loss, metrics = out if isinstance(out, tuple) else (out, {})
    if not isinstance(loss, Tensor) or loss.shape != scores.logp.shape:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{name}: token_loss must return one loss a token, shape {tuple(scores.logp.shape)}, got {got}")
    return loss, metrics


def _no_tokens(name: str, token_loss: TokenLoss, like: Tensor, k: int | None, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The metrics of no tokens: which there are never depends on the data. ``k`` is the size of the support."""
    none, none_k = like.new_empty(0), None if k is None else like.new_empty(0, k)
    scores = TokenScores(none, none, none, none_k, None if k is None else none, {})
    cut = tree_map_only(Tensor, lambda x: x[:0] if x.dim() else x, dict(inputs))
    return _token_loss(name, token_loss, scores, cut)[1]


@without_autocast
def run(
    name: str, call: Call, target: Tensor, topk_ids: Tensor | None, keep: Tensor, row_weight: Tensor, token_loss: TokenLoss,
    inputs: Mapping[str, Any], filter_eps: float, need: tuple[bool, bool, bool],
) -> Fused:  # fmt: skip
    """The fused sweep on flat arguments; ``inputs`` hold ``(N, …)`` tensors, or scalars."""
    kept = Kept(keep)
    slots = row_slots(name, kept, target, topk_ids, call.vocab_size)
    inv_temp = kept_inv_temp(name, kept, call.inv_temp, target.shape[0])
    multiple = sparse.BLOCK if filter_eps else 1
    tiles = Tiles(kept.take(call.hidden), *call[1:3], inv_temp, *call[4:], keep_logits=1, multiple=multiple)
    weight = kept.take(row_weight)
    inputs = tree_map_only(Tensor, lambda x: ordinary(kept.take(x) if x.dim() else x), dict(inputs))
    grads = Gradients(tiles, call.weight, *need, whole=True, scattered=filter_eps > 0) if any(need) else None
    logits = empty(tiles.inv_temp, tiles.rows * tiles.vocab)
    losses, sums = weight.new_zeros(tiles.n), MetricSums()
    stats, z = tiles.new_stats(slots.shape[1])
    means = sparse.Means(tiles, sparse.blocks_of(tiles.n)) if filter_eps else None
    for r0, r1 in tiles.row_ranges():
        rows = slice(r0, r1)
        x = logits[: (r1 - r0) * tiles.vocab].view(r1 - r0, tiles.vocab)
        tiles.fold_rows(x, r0, r1, slots, stats, z, entropy=True, extras=False)
        flags = (True, topk_ids is not None, False)
        out = outputs(Stats(*stats[:, rows]), z[rows], slots[rows], tiles.vocab, *flags)
        checked_finite(name, out[1])
        leaves = [v.detach().requires_grad_(grads is not None) for v in out[:5]]
        scores = TokenScores(leaves[0], leaves[1], leaves[2], *(leaves[3:5] if topk_ids is not None else (None, None)), extras={})
        cut = tree_map_only(Tensor, lambda v, rows=rows: v[rows] if v.dim() else v, inputs)
        with autograd_inside() if grads is not None else torch.no_grad():
            loss, metrics = _token_loss(name, token_loss, scores, cut)
            losses[rows] = loss.detach()
            if grads is not None:
                found = _backward(tiles, grads, slots, leaves, loss, weight, x, r0, r1, out[8], filter_eps, means)
                metrics = {**metrics, **found}
        sums.add(metrics, None if kept.dense is None else kept.dense[rows])
    if not tiles.n:
        with torch.no_grad():
            metrics = _no_tokens(name, token_loss, weight, None if topk_ids is None else topk_ids.shape[1], inputs)
        sums.add({**metrics, **dict.fromkeys(_made(grads is not None, filter_eps), weight)}, None)
    if means is not None and grads is not None:
        sparse.add_means(grads, means.finish())
    count = keep.sum() if kept.index is None else torch.tensor(tiles.n, device=keep.device)
    token = kept.put(losses)
    d_hidden, d_weight, d_bias = grads.finish() if grads else (call.weight.new_empty(0) for _ in need)
    d_hidden = kept.put(d_hidden) if need[0] else d_hidden
    return Fused((row_weight * token).sum(), token, sums.result(count), d_hidden, d_weight, d_bias)


def _backward(
    tiles: Tiles, grads: Gradients, slots: Tensor, leaves: list[Tensor], loss: Tensor, weight: Tensor, x: Tensor, r0: int, r1: int,
    lse_error: Tensor, filter_eps: float, means: sparse.Means | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Send one chunk's gradient back through its logits ``x``; returns its metrics, per row."""
    total = (loss * weight[r0:r1]).sum()
    found = [None] * len(leaves)
    if total.requires_grad:
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    with torch.no_grad():
        logp, lse, entropy, topk_logp, tail_logp = (x.detach() for x in leaves)
        sends = (weight[r0:r1] != 0).unsqueeze(1)  # a masked row that is computed sends nothing, whatever the loss made of it
        a, l, b, c, t = (None if g is None else torch.where(sends, g.view(r1 - r0, -1), 0).view_as(g) for g in found)
        a, l = (torch.zeros_like(lse) if g is None else g for g in (a, l))
        cot = Cotangents.of(slots[r0:r1], logp, topk_logp, lse, lse_error, a, l, b, c, t, entropy, tail_logp)
        dead = (cot.rows[[1, 2, 4]] == 0).all(0) & (cot.slot_dz == 0).all(1)
        rows: slice | Tensor = slice(r0, r1)
        if not x.is_cuda and bool(dead.any()):  # dropping needs the host to know how many, a synchronisation on CUDA
            live = (~dead).nonzero().squeeze(1)
            rows, cot = live + r0, cot.take(live)
        cot.fit(tiles, rows)
        skipped = torch.zeros_like(dead, dtype=lse.dtype) if isinstance(rows, slice) else dead.to(lse.dtype)
        if means is not None:
            columns = sparse.choose(tiles, means, x, r0, lse, slots[r0:r1], filter_eps)
            alive = torch.arange(r1 - r0, device=x.device) if isinstance(rows, slice) else live
            sparse.backward(tiles, grads, cot, alive, columns.keep, r0, columns.raw)
            grads.close(cot, rows, 0, tiles.vocab, last=False)
            grads.close_rows(cot, rows)
            return {"rows_skipped": skipped, "dropped_mass_mean": columns.dropped, "dropped_mass_max": columns.dropped}
        for c0, c1, w in tiles.columns():
            part = x[:, c0:c1] if isinstance(rows, slice) else x[:, c0:c1].index_select(0, live)
            g = backward_tile(tiles, cot, part, c0, tiles.inv_temp[rows])
            grads.add(g, w, c0, rows, first=r0 == 0, unscale=cot.unscale)
            grads.close(cot, rows, c0, c1, last=r1 == tiles.n)
        grads.close_rows(cot, rows)
        return {"rows_skipped": skipped}


def _made(gradient: bool, filter_eps: float) -> tuple[str, ...]:
    """Metrics of the sweep itself."""
    dropped = ("dropped_mass_mean", "dropped_mass_max") if filter_eps else ()
    return ("rows_skipped", *dropped) if gradient else ()


class FusedLoss(torch.autograd.Function):
    """Gradients are finished in the forward; backward scales them in place and gives them away, so it runs once.

    float16 ones wait in float32: the scale may be a loss scale, without which they underflow.

    ``sweep(hidden, weight, bias, need)`` computes the loss with the gradients that are needed.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, name: str, sweep: Callable[..., Fused]
    ) -> tuple[Any, ...]:
        ctx.dtype, need = hidden.dtype, tuple(ctx.needs_input_grad[:3])
        out = sweep(hidden, weight, bias, need)
        ctx.name, ctx.gradients = name, [g if n else None for g, n in zip(out[3:], need, strict=True)]
        ctx.mark_non_differentiable(out.token_loss, *out.metrics.values())
        return out.loss, out.token_loss, tuple(out.metrics), *out.metrics.values()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(f"{ctx.name}: backward has run already; its gradients were given away, call the loss again")
        if g_loss.is_cuda or g_loss != 1:  # the usual 1 saves a pass over d_weight; reading it on CUDA would synchronise
            gradients = [None if g is None else g.mul_(g_loss) for g in gradients]
        return *(None if g is None else g.to(ctx.dtype) for g in gradients), None, None


def fused_linear_loss_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, topk_ids: Tensor | None, mask: Tensor | None,
    inv_temp: Tensor, logit_scale: float, softcap: float, vocab_size: int, row_weight: Tensor, filter_eps: float, caller: str,
    loss: str, names: list[str], tensors: list[Tensor], numbers: Tensor, words: list[str],
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Implements ``rlad::fused_linear_loss``, for registered losses under ``torch.compile``."""
    call = Call(hidden, weight, bias, inv_temp, logit_scale, softcap, vocab_size)
    given = dict(zip(names, [*tensors, *numbers.tolist(), *words], strict=True))
    keep = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    need = (need_hidden, need_weight, need_bias)
    out = run(caller, call, target, topk_ids, keep, row_weight, TOKEN_LOSSES[loss], given, filter_eps, need)
    metrics = torch.stack([out.metrics.get(k, out.loss.new_zeros(())) for k in METRICS])
    return out.loss, out.token_loss, metrics, *out[3:]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.need, ctx.tensors = inputs[0].dtype, tuple(inputs[-3:]), len(inputs[15])
    ctx.lists = [None if x else [] for x in (inputs[14], inputs[17])]  # an empty list counts as one of tensors: it wants one back
    ctx.save_for_backward(*output[3:])


def _backward_op(ctx: Any, g_loss: Tensor, *_: Tensor) -> Any:
    names, words = ctx.lists
    return *scaled(ctx, g_loss, ctx.saved_tensors), *[None] * 11, names, [None] * ctx.tensors, None, words, *[None] * 3


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    made = gradients(hidden, weight, bias, args[-3:], held_dtype(weight.dtype))
    return result(hidden, ()), result(hidden, target.shape), result(hidden, (len(METRICS),)), *made


loss_op = define(
    "fused_linear_loss",
    f"({HEAD}, Tensor target, Tensor? topk_ids, Tensor? mask, {CALL}, Tensor row_weight, float filter_eps, str caller, str loss, "
    f"str[] names, Tensor[] tensors, Tensor numbers, str[] words, {NEED}) -> ({', '.join(['Tensor'] * 6)})",
    fused_linear_loss_op,
)
torch.library.register_fake("rlad::fused_linear_loss", _fake)
torch.library.register_autograd("rlad::fused_linear_loss", _backward_op, setup_context=_setup)
