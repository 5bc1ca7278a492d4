"""transformers: the loss of a causal LM from its hidden states, without logits, in ``Trainer`` or a loop of one's own."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from rlad_kernels.head import LMHead
from rlad_kernels.integrations.backbone import base_model, run_backbone
from rlad_kernels.integrations.wiring import check_head, check_plain_head
from rlad_kernels.losses.cross_entropy import linear_cross_entropy_loss

NAME = "use_rlad_loss"


def causal_lm_loss(
    hidden: Tensor, head: LMHead, labels: Tensor | None = None, *, shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None, ignore_index: int = -100, filter_eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """Next-token cross-entropy −Σ log π(y)/n of transformers' ``ForCausalLMLoss``, from hidden states ``(B, T, D)``; 3 products.

    Args:
        hidden: the backbone's last hidden states, after its final norm.
        head: :class:`LMHead`, for example ``LMHead.from_model(model)``.
        labels: ``(B, T)``, not shifted; ``ignore_index`` is left out.
        shift_labels: ``(B, T)``, already the next tokens; instead of labels.
        num_items_in_batch: n, the kept tokens of all accumulated batches, as ``Trainer`` counts them; None: of this one.
        filter_eps: as in :func:`rlad_kernels.linear_logp`.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_lm_loss: labels and shift_labels are None; pass one of them")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.to(hidden.device)
    keep = target != ignore_index
    n = num_items_in_batch.to(hidden.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    target = torch.where(keep, target, 0)
    return linear_cross_entropy_loss(hidden, head, target, mask=keep, denominator=n, filter_eps=filter_eps).loss


class _Use:
    """What ``use_rlad_loss`` gives: ``.undo()``, or leaving the ``with`` block, restores the model's forward."""

    def __init__(self, model: Any, forward: Any) -> None:
        self._model, self._forward = model, forward

    def undo(self) -> None:
        """Restore the forward the model had. Undoing twice does nothing."""
        if self._forward is not None:
            self._model.forward, self._forward = self._forward, None

    def __enter__(self) -> _Use:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def use_rlad_loss(model: Any, *, filter_eps: float = 0.0, check: bool = True) -> _Use:
    """Let ``model(…, labels=…)`` in training compute its loss without logits; ``Trainer`` then needs nothing else.

    While the model trains and has labels, the output has the loss (a mixture of experts' load-balancing loss included, as the model
    weights it) and ``logits`` is None. Without labels and in evaluation the forward is the model's own.

    Args:
        model: a transformers causal LM, or a PEFT model of one with no adapter on the head. Patch it before ``Trainer`` takes it.
        filter_eps: as in :func:`rlad_kernels.linear_logp`; 0.0 is the exact backward.
        check: compare our loss with the model's own on eight tokens, so that a head that does more than :class:`LMHead` knows is
            refused here and does not train on something else.

    Returns:
        A handle with ``.undo()``, also a context manager.

    Raises:
        ValueError: if the head is not one plain linear layer, or the losses differ.
    """
    model = base_model(model)
    check_plain_head(NAME, model)
    forward = model.forward

    @functools.wraps(type(model).forward)  # generate() and Trainer read the signature
    def without_logits(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels"), kwargs.get("shift_labels")
        if not self.training or (labels[0] is None and labels[1] is None):
            return forward(*args, **kwargs)
        return _train_forward(self, filter_eps, *args, **kwargs)

    if check:
        _compare(model)
    model.forward = types.MethodType(without_logits, model)
    return _Use(model, forward)


def _train_forward(
    model: Any, filter_eps: float, *args: Any, labels: Tensor | None = None, shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None, logits_to_keep: Any = 0, return_dict: Any = None, **kwargs: Any,
) -> MoeCausalLMOutputWithPast:  # fmt: skip
    def loss_of(hidden: Tensor, model: Any) -> Tensor:
        check_head(NAME, hidden, model.get_output_embeddings().weight)
        return causal_lm_loss(
            hidden, LMHead.from_model(model), labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch,
            filter_eps=filter_eps,
        )  # fmt: skip

    loss, aux = run_backbone(model, loss_of, *args, **kwargs)
    if aux is not None:
        loss = loss + model.router_aux_loss_coef * aux.to(loss.device)
    return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux)


@torch.no_grad()
def _compare(model: Any) -> None:
    """Our loss against the model's own, on eight tokens."""
    head, training = model.get_output_embeddings().weight, model.training
    ids = (torch.arange(8, device=head.device) * 7 % min(len(head), 1000)).unsqueeze(0)
    model.eval()
    try:
        theirs = float(model(input_ids=ids, labels=ids).loss)
        loss: Any = _train_forward(model, 0.0, input_ids=ids, labels=ids).loss
        ours = float(loss)
    finally:
        model.train(training)
    if abs(ours - theirs) > (1e-3 if head.dtype == torch.float32 else 3e-2) * max(1.0, abs(theirs)):
        raise ValueError(
            f"{NAME}: on eight tokens {type(model).__name__}'s own loss is {theirs:.5f}, from hidden states and head {ours:.5f}; "
            "its forward does more than LMHead knows, so keep the model's own loss (or call causal_lm_loss with the right LMHead)"
        )
