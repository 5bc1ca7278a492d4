"""transformers: the loss of a causal LM from its hidden states, without logits, in ``Trainer`` or a loop of one's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlad_kernels.core.check import integers
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.probe import unwrapped
from rlad_kernels.core.reduction import Reduction
from rlad_kernels.integrations.backbone import add_loss, drop_loss, head_of, without_logits
from rlad_kernels.integrations.wiring import check_head, check_plain_head, framework
from rlad_kernels.linear.loss import linear_loss
from rlad_kernels.losses.cross_entropy import CrossEntropy

framework("rlad_kernels.integrations.transformers", "transformers", "'transformers>=5'")
from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402

NAME = "use_rlad_loss"
LOSS = CrossEntropy()


def causal_lm_loss(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    filter_eps: float = 0.0,
) -> Tensor:
    """Next-token cross-entropy −Σ log π(y)/n of transformers' ``ForCausalLMLoss``, from hidden states ``(B, T, D)``; 3 products.

    Args:
        hidden: the backbone's last hidden states, after its final norm.
        head: :class:`LMHead`, for example ``LMHead.from_model(model)``.
        labels: ``(B, T)``, not shifted; ``ignore_index`` is left out.
        shift_labels: ``(B, T)``, already the next tokens; instead of labels.
        num_items_in_batch: n, the kept tokens of all accumulated batches, as ``Trainer`` counts them; None: of this one. Where
            there are none the loss is 0.
        filter_eps: as in :func:`rlad_kernels.linear_logp`.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> from rlad_kernels.integrations.transformers import causal_lm_loss
        >>> causal_lm_loss(torch.zeros(1, 3, 8), rk.LMHead(torch.ones(4, 8)), torch.tensor([[1, 2, 3]]))
        tensor(1.3863)
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_lm_loss: labels and shift_labels are None; pass one of them")
        shift_labels = F.pad(integers("causal_lm_loss", "labels", labels), (0, 1), value=ignore_index)[..., 1:]
    target = integers("causal_lm_loss", "shift_labels", shift_labels).to(hidden.device)
    keep = target != ignore_index
    n = num_items_in_batch
    if isinstance(n, Tensor) or n == 0:  # an accumulation window without one label: 0/0 in transformers, here a loss of 0
        n = torch.as_tensor(n, device=hidden.device)
        n = n.masked_fill((n == 0) & ~keep.any(), 1)
    target = torch.where(keep, target, 0)
    reduction = Reduction("token-mean", denominator=n)
    return linear_loss(hidden, head, target, LOSS, mask=keep, reduction=reduction, filter_eps=filter_eps).loss


class _Use:
    """What ``use_rlad_loss`` gives: ``.undo()``, or leaving the ``with`` block, takes the patch off the model it was given."""

    def __init__(self, model: Any, loss: Callable[..., Any]) -> None:
        self._model, self._loss = model, loss

    def undo(self) -> None:
        """Take this patch off; a model patched twice is as it was when both are off, in any order. Undoing twice does nothing."""
        if self._model is not None:
            drop_loss(self._model, self._loss)
            self._model = None

    def __enter__(self) -> _Use:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def use_rlad_loss(model: Any, *, filter_eps: float = 0.0, check: bool = True) -> _Use:
    """Let ``model(…, labels=…)`` in training compute its loss without logits; ``Trainer`` then needs nothing else.

    While the model trains and has labels, its own forward runs with two changes: the head computes no logits, and ``loss_function``
    is :func:`causal_lm_loss`. Everything else is as the model gives it (a mixture of experts' load-balancing loss within the loss,
    hidden states if asked for), but ``logits`` is None, and there is no cache unless ``use_cache=True``. Without labels and in
    evaluation nothing changes. A copy of the model is patched as well, and runs the copy's weights.

    Args:
        model: a transformers causal LM, or a PEFT model of one with no adapter on the head. Patch it before ``Trainer`` takes it.
        filter_eps: as in :func:`rlad_kernels.linear_logp`; 0.0 is the exact backward.
        check: compare our loss with the model's own on sixteen tokens, some of them padding, so that a head that does more than
            :class:`LMHead` knows is refused here and does not train on something else.

    Returns:
        A handle with ``.undo()``, also a context manager.

    Raises:
        ValueError: if the head is not one plain linear layer, the model computes its loss by itself (Qwen2-Audio), or the losses
            differ.

    Example:
        >>> import torch, transformers
        >>> from rlad_kernels.integrations.transformers import use_rlad_loss
        >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).train()
        >>> ids = torch.arange(8).view(1, 8)
        >>> with use_rlad_loss(model):  # or keep the handle: it stays until .undo()
        ...     out = model(input_ids=ids, labels=ids)
        >>> out.logits is None, torch.allclose(out.loss, model(input_ids=ids, labels=ids).loss)
        (True, True)
    """
    model = unwrapped(model)
    check_plain_head(NAME, model)
    if check:
        _compare(model)
    loss = functools.partial(_train_forward, filter_eps=filter_eps)
    add_loss(model, loss)
    return _Use(model, loss)


def _train_forward(model: Any, forward: Callable[..., Any], given: Mapping[str, Any], *, filter_eps: float = 0.0) -> Any:
    """The model's forward with our loss in it."""
    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"{NAME}: {type(model).__name__}.loss_function is {model.loss_function!r}, wanted transformers' ForCausalLMLoss; keep "
            "the model's own loss"
        )
    head = head_of(model)

    def loss(
        hidden: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        check_head(NAME, hidden, head.weight)
        return causal_lm_loss(
            hidden,
            head,
            labels,
            shift_labels=shift_labels,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            filter_eps=filter_eps,
        )

    labels = given.get("labels")
    labels = given.get("shift_labels") if labels is None else labels  # without labels the forward would not ask for a loss
    _, out = without_logits(NAME, model, forward, {**given, "labels": labels}, loss)
    out = type(out)(**{k: v for k, v in out.items() if k != "logits"})
    wanted = given.get("return_dict")
    return out if (model.config.return_dict if wanted is None else wanted) else out.to_tuple()


@torch.no_grad()
def _compare(model: Any) -> None:
    """Our loss against the model's own, on two rows of eight tokens, one of them padded but with all its labels."""
    head, training = model.get_output_embeddings().weight, model.training
    ids = (torch.arange(16, device=head.device) * 7 % min(len(head), 1000)).view(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    model.eval()
    try:
        theirs = float(model(**given).loss)
        ours = float(_train_forward(model, model.forward, given).loss)
    finally:
        model.train(training)
    if abs(ours - theirs) > (1e-3 if head.dtype == torch.float32 else 3e-2) * max(1.0, abs(theirs)):
        raise ValueError(
            f"{NAME}: on sixteen tokens {type(model).__name__}'s own loss is {theirs:.5f}, from hidden states and head {ours:.5f}; "
            "its forward does more than LMHead knows, so keep the model's own loss (or call causal_lm_loss with the right LMHead)"
        )
