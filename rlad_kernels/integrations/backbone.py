"""A transformers causal LM without logits: its own forward, in which the head computes nothing, and what the head was given.

The model gets a subclass of its class, so that a copy runs the copy's weights; nothing of the model sits in a closure.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from rlad_kernels.core.head import LMHead
from rlad_kernels.core.probe import head_map, unwrapped
from rlad_kernels.integrations.wiring import check_plain_head


class HeadOutput(NamedTuple):
    """What a call with ``head_call`` returns."""

    result: Any  # of head_call
    aux_loss: Tensor | None  # a mixture of experts' load-balancing loss as the model gives it, not weighted


HeadCall = Callable[[Tensor, Any], Any]  # (hidden (B, T, D), model) → anything


def head_of(model: Any, *, temperature: float | Tensor = 1.0, vocab_size: int | None = None) -> LMHead:
    """``LMHead.from_model``, of what the head is given: MiniCPM3 has scaled its last hidden state by then."""
    head = LMHead.from_model(model, temperature=temperature, vocab_size=vocab_size)
    factor = head_map(unwrapped(model), model.get_output_embeddings()).factor
    return head if factor == 1 else replace(head, logit_scale=head.logit_scale / factor)


def add_head_call(name: str, model: Any) -> None:
    """Let ``model.forward`` take ``head_call``. It runs inside the forward, where wrappers (DDP, FSDP) expect the work.

    Without ``head_call`` the forward is as before.

    Raises:
        ValueError: if the model's head is not one plain linear layer.
    """
    model = unwrapped(model)
    check_plain_head(name, model)
    patch(model)
    model._rlad_head_call = True


def patch(model: Any) -> None:
    """Make the model one of :func:`_subclass`; a forward of its own (TRL's, accelerate's) stays below ours."""
    if not hasattr(type(model), "_rlad_class"):
        own = vars(model).pop("forward", None)
        model.__class__ = _subclass(type(model))
        if own is not None:
            model._rlad_below = own


def add_loss(model: Any, loss: Callable[..., Any]) -> None:
    """``loss(model, forward, arguments)`` becomes the forward of training calls with labels; the last one added counts."""
    patch(model)
    model._rlad_losses = (*getattr(model, "_rlad_losses", ()), loss)


def drop_loss(model: Any, loss: Callable[..., Any]) -> None:
    """Take one of :func:`add_loss` back, in any order. The class goes back unless someone's forward, put on since, calls ours."""
    model._rlad_losses = tuple(x for x in model._rlad_losses if x is not loss)
    mine = vars(type(model)).get("_rlad_class")
    if mine and not model._rlad_losses and not hasattr(model, "_rlad_head_call") and "forward" not in vars(model):
        model.__class__ = mine
        del model._rlad_losses
        if "_rlad_below" in vars(model):
            model.forward = vars(model).pop("_rlad_below")


@functools.cache
def _subclass(cls: Any) -> type:
    """``cls`` with our forward, under its name: configurations are saved with the name of the class."""
    signature = inspect.signature(cls.forward)
    names = [k for k, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    more = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    no_cache = {"use_cache": False} if more or "use_cache" in names else {}

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, head_call: HeadCall | None = None, **kwargs: Any) -> Any:
        below = getattr(self, "_rlad_below", None) or functools.partial(cls.forward, self)
        losses = getattr(self, "_rlad_losses", ())
        given = {**no_cache, **dict(zip(names, args, strict=False)), **kwargs}
        if head_call is not None:
            return _with_head_call(self, below, head_call, given)
        if losses and self.training and (given.get("labels") is not None or given.get("shift_labels") is not None):
            return losses[-1](self, below, given)
        return below(*args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]  # generate() and Trainer read it
    del forward.__wrapped__  # accelerate's unwrap_model would put what is wrapped in our place

    def reduce(self: Any, protocol: Any) -> Any:
        made = super(ours, self).__reduce_ex__(protocol)
        return (_new, (cls,), *made[2:]) if type(self) is ours else made

    named = {k: getattr(cls, k) for k in ("__module__", "__qualname__", "__doc__")}
    ours = type(cls.__name__, (cls,), {**named, "_rlad_class": cls, "forward": forward, "__reduce_ex__": reduce})
    return ours


def _new(cls: Any) -> Any:
    """An empty model of the subclass, for pickle and copy."""
    made: Any = _subclass(cls)
    return made.__new__(made)


def _with_head_call(model: Any, forward: Callable[..., Any], head_call: HeadCall, given: dict[str, Any]) -> HeadOutput:
    hidden, out = without_logits("head_call", model, forward, given)
    return HeadOutput(head_call(hidden, model), out.get("aux_loss"))


def without_logits(
    name: str, model: Any, forward: Callable[..., Any], given: Mapping[str, Any], loss: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Any]:
    """Run the model's forward with these arguments, its head giving the logits of no token.

    Args:
        loss: what ``loss_function`` is for this call, with hidden states instead of logits.

    Returns:
        The hidden states that the head was given, on its device, and what the forward returned: a ModelOutput, never a tuple.

    Raises:
        ValueError: if the forward does not call its head once, or computes its loss by itself.
    """
    head = model.get_output_embeddings()
    rows, device = len(head.weight), head.weight.device
    seen: list[Tensor] = []
    losses: list[str] = []
    if "return_dict" in given or not model.config.return_dict:
        given = {**given, "return_dict": True}

    def no_rows(hidden: Tensor) -> Tensor:
        seen.append(hidden.to(device))
        return hidden.new_zeros(*hidden.shape[:-2], 0, rows)

    def loss_function(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert loss is not None
        losses.append(name)
        return loss(seen[-1], *args, **kwargs)

    own_loss = (
        f"{name}: {type(model).__name__} computes its loss from logits by itself and not by loss_function, so that it may leave "
        "out or weigh tokens otherwise; keep the model's own loss, or call causal_lm_loss with its hidden states"
    )
    try:
        with _set(head, "forward", no_rows), _set(model, "_loss_function", loss_function):
            out = forward(**given)
    except (IndexError, RuntimeError, ValueError) as error:
        if loss is None or not seen or losses:
            raise
        raise ValueError(own_loss) from error
    if len(seen) != 1:
        raise ValueError(f"{name}: {type(model).__name__} calls its head {len(seen)} times for its logits, wanted once")
    if loss is not None and len(losses) != 1:
        raise ValueError(own_loss)
    return seen[0], out


@contextmanager
def _set(module: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one instance for the time of a block."""
    mine, was = name in module.__dict__, module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if mine:
            module.__dict__[name] = was
        else:
            module.__dict__.pop(name)  # delattr of what hides a method does not compile
