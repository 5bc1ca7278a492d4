"""``model(…, head_call=f)`` of a transformers causal LM: the backbone alone, then ``f`` with hidden states and head."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from rlad_kernels.integrations.wiring import check_plain_head


class HeadOutput(NamedTuple):
    """What a call with ``head_call`` returns."""

    result: Any  # of head_call
    aux_loss: Tensor | None  # a mixture of experts' load-balancing loss, not weighted


HeadCall = Callable[[Tensor, Any], Any]  # (hidden (B, T, D), model) → anything


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def add_head_call(name: str, model: Any) -> None:
    """Let ``model.forward`` take ``head_call``. It runs inside the forward, where wrappers (DDP, FSDP) expect the work.

    Without ``head_call`` the forward is as before.

    Raises:
        ValueError: if the model's head is not one plain linear layer.
    """
    model = base_model(model)
    check_plain_head(name, model)
    forward = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def with_head_call(self: Any, *args: Any, head_call: HeadCall | None = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if head_call is None else run_backbone(self, head_call, *args, **kwargs)

    model.forward = types.MethodType(with_head_call, model)


def run_backbone(model: Any, head_call: HeadCall, *args: Any, **kwargs: Any) -> HeadOutput:
    """The backbone with these arguments, then ``head_call`` on what it gives."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    kwargs["use_cache"] = False
    out = model.base_model(*args, **kwargs)
    aux = None
    if kwargs.get("output_router_logits"):
        loss = sys.modules[type(model).__module__].load_balancing_loss_func
        aux = loss(out.router_logits, model.num_experts, model.num_experts_per_tok, kwargs.get("attention_mask"))
    return HeadOutput(head_call(out.last_hidden_state.to(model.get_output_embeddings().weight.device), model), aux)
