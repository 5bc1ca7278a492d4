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

from rlad_kernels import sparse
from rlad_kernels.backward import Cotangents, Gradients, backward_tile
from rlad_kernels.check import check_eps, check_k
from rlad_kernels.head import LMHead
from rlad_kernels.losses.metrics import METRICS, MetricSums
from rlad_kernels.losses.reduction import LossOutput, keep_mask, token_weights
from rlad_kernels.modes import autograd_inside, ordinary, without_autocast
from rlad_kernels.moments import Stats
from rlad_kernels.ops import numbers as _numbers
from rlad_kernels.registry import TOKEN_LOSSES
from rlad_kernels.rows import IGNORE, Kept, checked_finite, kept_inv_temp
from rlad_kernels.scores import Call, TokenScores, flat, flat_call, flat_rows, maybe_rows, target_shape
from rlad_kernels.sweep import outputs, row_slots
from rlad_kernels.tiles import Tiles, empty

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


def fused_linear_loss(
    hidden: Tensor, head: LMHead, target: Tensor, token_loss: TokenLoss, *, inputs: Mapping[str, Any], mask: Tensor | None = None,
    topk_ids: Tensor | None = None, filter_eps: float = 0.0, reduction: str = "token-mean", seq_ids: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """Σ weight·token_loss(scores, **inputs) with gradients from the same sweep: three matrix products instead of four.

    Args:
        hidden, head, target, topk_ids, mask: as in :func:`linear_logp`.
        token_loss: ``token_loss(scores: TokenScores, **inputs) -> (…,)`` or ``((…,), metrics)``: pure, row-wise, unreduced,
            differentiable PyTorch on flat tokens. ``scores`` has logp, lse, entropy, and with ``topk_ids`` topk_logp and tail_logp.
            A loss that needs other rows (a sequence-level ratio) belongs to :func:`linear_logp`.
        inputs: what ``token_loss`` needs. Tensors have the target's leading shape and are cut with the rows; 0-dim tensors
            and everything else pass through.
        filter_eps: as in :func:`linear_logp`; metrics then also have dropped_mass_mean and dropped_mass_max.
        reduction, seq_ids, denominator: as in :func:`grpo_loss`.

    Returns:
        LossOutput. ``loss.backward()`` can run once. With grad disabled the call costs one product and allocates no gradient.
        Metrics: those of ``token_loss`` and ``rows_skipped``, the fraction of kept rows that had no gradient and were skipped.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    return fuse(
        "fused_linear_loss", hidden, head, target, token_loss, inputs=inputs, mask=mask, topk_ids=topk_ids, filter_eps=filter_eps,
        reduction=reduction, seq_ids=seq_ids, denominator=denominator,
    )  # fmt: skip


def fuse(
    name: str, hidden: Tensor, head: LMHead, target: Tensor, token_loss: TokenLoss, *, inputs: Mapping[str, Any],
    mask: Tensor | None, topk_ids: Tensor | None, filter_eps: float, reduction: str, seq_ids: Tensor | None,
    denominator: float | Tensor | None,
) -> LossOutput:  # fmt: skip
    """:func:`fused_linear_loss` for a public function ``name``."""
    call = flat_call(name, hidden, head)
    shape = target_shape(name, hidden, target)
    check_eps(name, filter_eps)
    if not callable(token_loss):
        raise ValueError(f"{name}: token_loss must be a function of (scores, **inputs), got {token_loss!r}")
    if not isinstance(inputs, Mapping):
        raise ValueError(f"{name}: inputs must be a dict of token_loss's arguments, got {type(inputs).__name__}")
    if not getattr(token_loss, "rowwise", True):
        raise ValueError(f"{name}: token_loss needs other rows (a sequence-level loss); compute it from linear_logp instead")
    ids = maybe_rows(name, "topk_ids", topk_ids, shape, hidden.device, ids=True, extra=1)
    if ids is not None:
        check_k(name, ids.shape[1], call.vocab_size, "topk_ids (…, K)")
    flat_target = flat_rows(name, "target", target, shape, hidden.device, ids=True)
    keep = keep_mask(name, mask, target).reshape(-1) & (flat_target != IGNORE)
    acc = torch.float64 if call.hidden.dtype == torch.float64 else torch.float32
    weights = token_weights(name, keep.view(shape), reduction, seq_ids, denominator, acc).reshape(-1)

    def cut(x: Tensor) -> Tensor:
        if x.dim() and x.shape[: len(shape)] != shape:
            raise ValueError(f"{name}: inputs hold a tensor of shape {tuple(x.shape)}, wanted leading shape {tuple(shape)}")
        return flat(x, len(shape)) if x.dim() or not shape else x.detach()  # of a single token, 0-dim tensors are its own

    given = tree_map_only(Tensor, cut, dict(inputs))
    need = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in call[:3])
    args = (flat_target, ids, keep, weights)
    registered = next((k for k, f in TOKEN_LOSSES.items() if f is token_loss), None)
    if registered is not None and torch.compiler.is_compiling():
        return _compiled(name, call, *args, registered, given, filter_eps, need, shape)
    if any(need):

        def sweep(h: Tensor, w: Tensor, b: Tensor | None, need: tuple[bool, bool, bool]) -> Fused:
            return run(name, call._replace(hidden=h, weight=w, bias=b), *args, token_loss, given, filter_eps, need)

        loss, token, keys, *values = FusedLoss.apply(*call[:3], name, sweep)
    else:
        out = run(name, call, *args, token_loss, given, 0.0, (False, False, False))
        loss, token, keys, values = out.loss, out.token_loss, tuple(out.metrics), list(out.metrics.values())
    return LossOutput(loss, token.view(shape), dict(zip(keys, values, strict=True)))


def _compiled(
    name: str, call: Call, target: Tensor, ids: Tensor | None, keep: Tensor, weights: Tensor, loss: str, inputs: Mapping[str, Any],
    filter_eps: float, need: tuple[bool, ...], shape: torch.Size,
) -> LossOutput:  # fmt: skip
    """The same call as one op; which metrics exist is found by tracing the loss on no tokens."""
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    numbers = {k: v for k, v in inputs.items() if isinstance(v, int | float)}
    words = {k: v for k, v in inputs.items() if isinstance(v, str)}
    names = [*tensors, *numbers, *words]
    total, token, metrics, *_ = torch.ops.rlad.fused_linear_loss(
        *call[:3], target, ids, keep, *call[3:], weights, filter_eps, name, loss, names,
        [*tensors.values()], _numbers(*numbers.values()), [*words.values()], *need,
    )  # fmt: skip
    found = _no_tokens(name, TOKEN_LOSSES[loss], weights, None if ids is None else ids.shape[1], {**tensors, **numbers, **words})
    made = _made(any(need), filter_eps)
    keys = [k for k in METRICS if k in found or k in made]
    return LossOutput(total, token.detach().view(shape), {k: metrics[METRICS.index(k)].detach() for k in keys})
