"""A token-level loss inside the sweep: three matrix products for forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rlad_kernels.core.check import check_eps, check_k
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.metrics import METRICS
from rlad_kernels.core.modes import numbers
from rlad_kernels.core.reduction import keep_mask, token_weights
from rlad_kernels.core.registry import TOKEN_LOSSES
from rlad_kernels.core.types import LossOutput
from rlad_kernels.engine.call import Call, flat, flat_call, flat_rows, maybe_rows, target_shape
from rlad_kernels.engine.loss import Fused, FusedLoss, TokenLoss, _made, _no_tokens, loss_op, run
from rlad_kernels.engine.rows import IGNORE


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
    values = {k: v for k, v in inputs.items() if isinstance(v, int | float)}
    words = {k: v for k, v in inputs.items() if isinstance(v, str)}
    names = [*tensors, *values, *words]
    total, token, metrics, *_ = loss_op(
        *call[:3], target, ids, keep, *call[3:], weights, filter_eps, name, loss, names,
        [*tensors.values()], numbers(*values.values()), [*words.values()], *need,
    )  # fmt: skip
    found = _no_tokens(name, TOKEN_LOSSES[loss], weights, None if ids is None else ids.shape[1], {**tensors, **values, **words})
    made = _made(any(need), filter_eps)
    keys = [k for k in METRICS if k in found or k in made]
    return LossOutput(total, token.detach().view(shape), {k: metrics[METRICS.index(k)].detach() for k in keys})
