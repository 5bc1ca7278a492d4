"""``rlad::linear_loss``: a token-level loss inside the sweep, three matrix products for forward and backward.

Rows go chunk by chunk with all their logits. The loss's own autograd runs on the chunk's ``(C,)`` and ``(C, K)`` tensors,
and the chunk's dlogits replace its logits in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rlad_kernels.backends.contract import HEAD, on_cpu
from rlad_kernels.core.dtypes import held_dtype
from rlad_kernels.core.metrics import MetricSums
from rlad_kernels.core.modes import autograd_inside, ordinary, without_autocast
from rlad_kernels.core.options import revived
from rlad_kernels.core.token_loss import Tensors, TokenLoss
from rlad_kernels.core.types import TokenScores, TopK
from rlad_kernels.engine import sparse
from rlad_kernels.engine.call import Call
from rlad_kernels.engine.chunks import Chunks
from rlad_kernels.engine.gradients import Cotangents, Gradients, backward_tile
from rlad_kernels.engine.mean import MeanLogits
from rlad_kernels.engine.op import CALL, NEED, define, gradients, result, scaled
from rlad_kernels.engine.outputs import row_slots
from rlad_kernels.engine.rows import Kept, checked_finite, kept_inv_temp
from rlad_kernels.engine.tiles import Tiles


class Fused(NamedTuple):
    """What one fused sweep leaves: the loss, per-token losses, metrics and the finished gradients."""

    loss: Tensor
    token_loss: Tensor
    metrics: dict[str, Tensor]
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


def metric_names(loss: TokenLoss, like: Tensor, tensors: Tensors) -> list[str]:
    """The metrics of ``loss`` on no tokens: which there are never depends on the data."""
    none, support = like.new_empty(0), support_of(loss, tensors)
    none_k = None if support is None else like.new_empty(0, support.shape[1])
    scores = TokenScores(none, none, none, none_k, None if support is None else none, none if reads_mean(loss) else None)
    return [*loss.evaluate(scores, tree_map_only(Tensor, lambda x: x[:0], tensors))[1]]


_METRICS: dict[Any, list[str]] = {}


def _known_metrics(loss: TokenLoss, like: Tensor, tensors: Tensors) -> list[str]:
    """:func:`metric_names`, asked once for a loss and what it is given."""
    given = (loss, *flattened(tensors)[0])
    if given not in _METRICS:
        if len(_METRICS) >= 256:  # a coefficient that changes makes a loss a step
            _METRICS.clear()
        _METRICS[given] = metric_names(loss, like, tensors)
    return _METRICS[given]


def support_of(loss: TokenLoss, tensors: Tensors) -> Tensor | None:
    """The ids ``(N, K)`` at which the loss reads the student's log-probs."""
    return tensors["teacher"].ids if "topk_logp" in loss.read() else None


def reads_mean(loss: TokenLoss) -> bool:
    """Whether the loss reads the mean of a row's logits."""
    return "mean_logits" in loss.read()


@without_autocast
def run(
    name: str,
    call: Call,
    target: Tensor,
    keep: Tensor,
    row_weight: Tensor,
    loss: TokenLoss,
    tensors: Tensors,
    filter_eps: float,
    need: tuple[bool, bool, bool],
) -> Fused:
    """The fused sweep on flat arguments; ``tensors`` are those of ``loss.tokens``, ``(N,)`` or ``(N, K)``."""
    kept = Kept(keep)
    support = support_of(loss, tensors)
    slots = row_slots(name, kept, target, support, call.vocab_size, "teacher.ids")
    inv_temp = kept_inv_temp(name, kept, call.inv_temp, target.shape[0])
    multiple = sparse.block_of(row_weight) if filter_eps else 1
    whole = need[1] and not filter_eps
    tiles = Tiles(kept.take(call.hidden), *call[1:3], inv_temp, *call[4:], keep_logits=1, multiple=multiple, whole=whole)
    weight = kept.take(row_weight)
    names = _known_metrics(loss, weight, tensors)
    tensors = tree_map_only(Tensor, lambda x: ordinary(kept.take(x)), tensors)
    grads = Gradients(tiles, call.weight, *need, whole=True, scattered=filter_eps > 0) if any(need) else None
    losses, sums = weight.new_zeros(tiles.n), MetricSums((*names, *made_metrics(grads is not None, filter_eps)), weight)
    chunks = Chunks(tiles, slots, lent=grads.lent() if grads else None)
    mean = MeanLogits(tiles) if reads_mean(loss) else None
    means = sparse.Means(tiles, sparse.blocks_of(weight, tiles.n)) if filter_eps else None
    for at in chunks:
        x = chunks.logits(at, entropy=True)
        out = chunks.outputs(at, entropy=True, tail=support is not None)
        checked_finite(name, out.lse)
        read = out[:5] if mean is None else (*out[:5], mean.values[at])
        leaves = [v.detach().requires_grad_(grads is not None) for v in read]
        scores = TokenScores(*leaves[:3], *(leaves[3:5] if support is not None else (None, None)), *leaves[5:])
        cut = tree_map_only(Tensor, lambda v, at=at: v[at], tensors)
        with autograd_inside() if grads is not None else torch.no_grad():
            found, metrics = loss.evaluate(scores, cut)
            if metrics.keys() != set(names):
                got = f"{sorted(metrics)}, on no tokens {sorted(names)}"
                raise ValueError(f"{loss.name}: tokens gave the metrics {got}; which there are must not depend on data")
            losses[at] = found.detach()
            if grads is not None:
                made = _backward(grads, chunks, x, at, leaves, out.lse_error, found, weight[at], means, mean, filter_eps)
                metrics = {**metrics, **made}
        sums.add(metrics, None if kept.dense is None else kept.dense[at])
    if means is not None and grads is not None:
        sparse.add_means(grads, means.finish())
    if mean is not None and grads is not None:
        mean.finish(grads)
    count = keep.sum() if kept.index is None else torch.tensor(tiles.n, device=keep.device)
    token = kept.put(losses)
    d_hidden, d_weight, d_bias = grads.finish() if grads else (call.weight.new_empty(0) for _ in need)
    d_hidden = kept.put(d_hidden) if need[0] else d_hidden
    return Fused((row_weight * token).sum(), token, sums.result(count), d_hidden, d_weight, d_bias)


def _backward(
    grads: Gradients,
    chunks: Chunks,
    x: Tensor,
    at: slice,
    leaves: list[Tensor],
    lse_error: Tensor,
    loss: Tensor,
    weight: Tensor,
    means: sparse.Means | None,
    mean: MeanLogits | None,
    filter_eps: float,
) -> dict[str, Tensor]:
    """Send the gradient of the rows ``at`` back through their logits ``x``; all else of these rows. Returns metrics, per row."""
    total, tiles = (loss * weight).sum(), grads.tiles
    found = [None] * len(leaves)
    if total.requires_grad:
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    with torch.no_grad():
        logp, lse, entropy, topk_logp, tail_logp = (v.detach() for v in leaves[:5])
        sends = (weight != 0).unsqueeze(1)  # a masked row that is computed sends nothing, whatever the loss made of it
        a, l, b, c, t, *m = (None if g is None else torch.where(sends, g.view(len(x), -1), 0).view_as(g) for g in found)
        if mean is not None and m[0] is not None:
            mean.send(at, m[0])
        cot = Cotangents.of(chunks.slots[at], logp, topk_logp, lse, lse_error, a, l, b, c, t, entropy, tail_logp)
        dead = (cot.rows[[1, 2, 4]] == 0).all(0) & (cot.slot_dz == 0).all(1)
        rows: slice | Tensor = at
        live: Tensor | None = None
        if not x.is_cuda and bool(dead.any()):  # dropping needs the host to know how many, a synchronisation on CUDA
            live = (~dead).nonzero().squeeze(1)
            rows, cot = live + at.start, cot.take(live)
        cot.fit(tiles, rows)
        skipped = torch.zeros_like(lse) if live is None else dead.to(lse.dtype)
        if means is not None:
            columns = sparse.choose(chunks, means, x, at, lse, filter_eps)
            sparse.backward(tiles, grads, cot, live, columns.keep, sparse.counts(columns.keep, tiles.shard), at.start, x)
            grads.close(cot, rows, 0, tiles.vocab, last=False)
            grads.close_rows(cot, rows)
            return {"rows_skipped": skipped, "dropped_mass_mean": columns.dropped, "dropped_mass_max": columns.dropped}

        def tile(c0: int, c1: int) -> Tensor:
            part = x[:, c0:c1] if live is None else x[:, c0:c1].index_select(0, live)
            return backward_tile(tiles, cot, part, c0, tiles.inv_temp[rows], grads)

        grads.add_chunk(at, rows, tile, cot.unscale, cot)
        return {"rows_skipped": skipped}


def made_metrics(gradient: bool, filter_eps: float) -> tuple[str, ...]:
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
        for g in gradients:
            if g is not None:
                torch.ops.rlad.scale_(g, g_loss)
        return *(None if g is None else g.to(ctx.dtype) for g in gradients), None, None


def scale_cpu(x: Tensor, factor: Tensor) -> None:
    """Implements ``rlad::scale_`` on CPU: the usual 1 saves a pass over d_weight."""
    if factor != 1:
        x.mul_(factor)


on_cpu("scale_", scale_cpu)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    inv_temp: Tensor,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    first: int,
    group: str,
    row_weight: Tensor,
    filter_eps: float,
    caller: str,
    loss: str,
    numbers: Tensor,
    names: list[str],
    tensors: list[Tensor],
    metrics: list[str],
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """Implements ``rlad::linear_loss``, for ``torch.compile``; ``loss`` and ``numbers`` are a TokenLoss's own."""
    call = Call(hidden, weight, bias, inv_temp, logit_scale, softcap, vocab_size, first, group)
    need = (need_hidden, need_weight, need_bias)
    chosen = revived(loss, numbers.tolist())
    out = run(caller, call, target, mask, row_weight, chosen, gathered(names, tensors), filter_eps, need)
    if missing := [k for k in metrics if k not in out.metrics]:
        raise RuntimeError(
            f"{chosen.name}: tokens has the metrics {missing} on no tokens only; which there are must not depend on data"
        )
    rows = torch.stack([out.metrics[k] for k in metrics]) if metrics else out.loss.new_empty(0)
    return out.loss, out.token_loss, rows, *out[3:]


def flattened(tensors: Tensors) -> tuple[list[str], list[Tensor]]:
    """Names and tensors for an op: those of a TopK under ``teacher.ids`` and so on."""
    found: dict[str, Tensor] = {}
    for k, x in tensors.items():
        parts = {f"{k}.{f}": y for f, y in x._asdict().items() if y is not None} if isinstance(x, TopK) else {k: x}
        found = {**found, **parts}
    return [*found], [*found.values()]


def gathered(names: list[str], tensors: list[Tensor]) -> Tensors:
    """The inverse of :func:`flattened`."""
    found: Tensors = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, x in zip(names, tensors, strict=True):
        k, _, field = name.partition(".")
        if field:
            parts.setdefault(k, {})[field] = x
        else:
            found[k] = x
    return {**found, **{k: TopK(**fields) for k, fields in parts.items()}}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.need = inputs[0].dtype, tuple(inputs[-3:])
    # one None for each tensor of a list; an empty list counts as one of tensors and wants one back
    ctx.lists = [None if names else [] for names in (inputs[16], inputs[18])]
    ctx.tensors = len(inputs[17])
    ctx.save_for_backward(*output[3:])


def _backward_op(ctx: Any, g_loss: Tensor, *_: Tensor) -> Any:
    names, metrics = ctx.lists
    return *scaled(ctx, g_loss, ctx.saved_tensors), *[None] * 13, names, [None] * ctx.tensors, metrics, *[None] * 3


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    made = gradients(hidden, weight, bias, args[-3:], held_dtype(weight.dtype))
    return result(hidden, ()), result(hidden, target.shape), result(hidden, (len(args[-4]),)), *made


loss_op = define(
    "linear_loss",
    f"({HEAD}, Tensor target, Tensor mask, {CALL}, Tensor row_weight, float filter_eps, str caller, str loss, Tensor numbers, "
    f"str[] names, Tensor[] tensors, str[] metrics, {NEED}) -> ({', '.join(['Tensor'] * 6)})",
    linear_loss,
)
torch.library.register_fake("rlad::linear_loss", _fake)
torch.library.register_autograd("rlad::linear_loss", _backward_op, setup_context=_setup)
