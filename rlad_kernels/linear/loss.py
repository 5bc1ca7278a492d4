"""A token-level loss from hidden states, inside the sweep: three matrix products for forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_eps, check_k, needed_grad
from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.modes import numbers
from rlad_kernels.core.reduction import Reduction, keep_mask
from rlad_kernels.core.token_loss import Tensors, TokenLoss
from rlad_kernels.core.types import LossOutput, TokenScores
from rlad_kernels.engine.call import Call, flat_call, flat_rows, target_shape
from rlad_kernels.engine.loss import (
    Fused,
    FusedLoss,
    flattened,
    loss_op,
    made_metrics,
    metric_names,
    reads_mean,
    run,
    support_of,
)
from rlad_kernels.engine.mean import check_no_softcap
from rlad_kernels.engine.rows import IGNORE
from rlad_kernels.linear.gather import gather
from rlad_kernels.linear.logp import score


def linear_loss(
    hidden: Tensor,
    head: LMHead,
    target: Tensor,
    loss: TokenLoss,
    *,
    mask: Tensor | None = None,
    reduction: str | Reduction | None = None,
    filter_eps: float = 0.0,
    **tensors: Any,
) -> LossOutput:
    """Σ weight·loss(scores of the token), from hidden states, with gradients from the same sweep: ``loss.products`` products.

    Args:
        hidden: ``(…, D)`` float32, bfloat16 or float16 (float64 on CPU), the head's dtype (or under autocast).
        head: :class:`LMHead`.
        target: ``(…)`` ints; −100 is masked.
        loss: a method of :mod:`rlad_kernels.losses`, ``METHODS[name].loss``, or your own :class:`TokenLoss`.
        mask: bool or 0/1 ``(…)``; masked rows are never computed and exactly 0 in gradients.
        reduction: a name, or :class:`Reduction`; None is the loss's own.
        filter_eps: as in :func:`linear_logp`; metrics then also have dropped_mass_mean and dropped_mass_max.
        tensors: what the loss needs and takes, by name, as in ``loss(scores, **tensors)``; ``teacher`` (a :class:`TopK`) brings
            the support on which the student's log-probs are read.

    Returns:
        LossOutput. ``loss.backward()`` can run once. With grad disabled the call costs one product and allocates no gradient.
        Metrics: those of the loss, ``entropy``, and ``rows_skipped``, the fraction of kept rows that had no gradient and were
        skipped. A loss whose ``rowwise`` is False runs on :func:`linear_logp` instead, and has no metrics of the sweep itself;
        one that reads support logits alone on :func:`linear_gather`, which does not tell the entropy either.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> hidden, head, target = torch.zeros(2, 8, requires_grad=True), rk.LMHead(torch.ones(4, 8)), torch.tensor([0, 3])
        >>> out = rk.linear_loss(hidden, head, target, rk.losses.CrossEntropy())
        >>> out.loss
        tensor(1.3863, grad_fn=<FusedLossBackward>)
    """
    name = "linear_loss"
    if not isinstance(loss, TokenLoss):
        raise ValueError(f"{name}: loss must be a TokenLoss (rk.losses.GRPO(), METHODS['grpo'].loss, your own), got {loss!r}")
    call = flat_call(name, hidden, head)
    shape = target_shape(name, hidden, target)
    check_eps(name, filter_eps)
    flat_target = flat_rows(name, "target", target, shape, hidden.device, ids=True)
    keep = keep_mask(name, mask, target) & (flat_target.view(shape) != IGNORE)
    if "target" in loss.needs:
        tensors = {**tensors, "target": target}
    like = torch.empty(shape, dtype=acc_dtype(call.hidden.dtype), device=hidden.device)
    arranged, support = loss.arrange(like, keep, reduction, tensors), tensors.get("teacher")
    if support is None and "topk_logp" in loss.read():
        raise ValueError(f"{loss.name}: teacher is None, wanted a TopK, on whose ids topk_logp is read")
    if support is not None:
        check_k(name, support.ids.shape[-1], call.vocab_size, "teacher.ids (…, K)")
    if reads_mean(loss):
        check_no_softcap(name, call)
    if loss.products == 0:
        z = gather(name, hidden, head, tensors["teacher"].ids, mask=keep, ids_name="teacher.ids")
        return loss.reduced(TokenScores(topk_logp=z), arranged)
    if not loss.rowwise:
        topk = support_of(loss, tensors)
        scores = score(
            name,
            hidden,
            head,
            target,
            topk_ids=topk,
            entropy=True,
            tail=topk is not None,
            mean_logits=reads_mean(loss),
            mask=keep,
            filter_eps=filter_eps,
            ids_name="teacher.ids",
        )
        return loss.reduced(scores, arranged)
    need = needed_grad(*call[:3])
    args = (flat_target, keep.reshape(-1), arranged.weights.reshape(-1), loss, arranged.tensors)
    if torch.compiler.is_compiling():
        return _compiled(name, call, *args, filter_eps, need, shape)
    if any(need):

        def sweep(h: Tensor, w: Tensor, b: Tensor | None, need: tuple[bool, bool, bool]) -> Fused:
            return run(name, call._replace(hidden=h, weight=w, bias=b), *args, filter_eps, need)

        total, token, keys, *values = FusedLoss.apply(*call[:3], name, sweep)
        return LossOutput(total, token.view(shape), dict(zip(keys, values, strict=True)))
    out = run(name, call, *args, 0.0, need)
    return LossOutput(out.loss, out.token_loss.view(shape), out.metrics)


def _compiled(
    name: str,
    call: Call,
    target: Tensor,
    keep: Tensor,
    weights: Tensor,
    loss: TokenLoss,
    tensors: Tensors,
    filter_eps: float,
    need: tuple[bool, bool, bool],
    shape: torch.Size,
) -> LossOutput:
    """The same call as one op; which metrics exist is found by tracing the loss on no tokens."""
    names, values = flattened(tensors)
    keys = [*metric_names(loss, weights, tensors), *made_metrics(any(need), filter_eps)]
    total, token, metrics, *_ = loss_op(
        *call[:3], target, keep, *call[3:], weights, filter_eps, name, loss.key, numbers(*loss.numbers), names, values, keys, *need
    )
    return LossOutput(total, token.detach().view(shape), {k: metrics[i].detach() for i, k in enumerate(keys)})
