"""What a causal LM does around its head, found by asking it: one forward of four tokens with chosen values put in by hooks.

The backbone's last hidden state is replaced by chosen rows: what the head is then given shows what stands between the two. The
head's output is replaced by known values: the model's logits show what becomes of them. No name in a configuration is read for it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlad_kernels.core.headmap import SIZES, HeadMap, check_product, chosen, factor_of, fit, refused


def head_map(model: Any, linear: Any) -> HeadMap:
    """What ``model`` does around its head ``linear``: asked once and kept with the model, as it does not depend on the weights.

    Raises:
        ValueError: if no LMHead gives the model's logits from its last hidden state, or the model cannot be asked.
    """
    kept: Any = vars(model).get("_rlad_head_map")
    if kept is not None and torch.compiler.is_compiling():
        return HeadMap(*kept[1])
    state = _state(model, linear)
    if kept is None or kept[0] != state:
        found: HeadMap = _ask(model, linear)  # pyright: ignore[reportCallIssue]
        kept = vars(model)["_rlad_head_map"] = state, tuple(found)  # a copy of the model has it too
    return HeadMap(*kept[1])


def unwrapped(model: Any) -> Any:
    """The model inside ``torch.compile`` and PEFT; any other model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def output_layer(model: Any) -> Any:
    """The layer whose weight ``(V, D)`` gives the model's logits.

    Raises:
        ValueError: if it is not one weight matrix that can be read here and now.
    """
    ask: Any = getattr(model, "get_output_embeddings", None)
    if not isinstance(model, nn.Module) or ask is None:
        raise ValueError(f"LMHead.from_model: model must be a module with get_output_embeddings(), got {type(model).__name__}")
    linear: Any = ask()
    if linear is None:
        raise refused(model, "has no output embeddings")
    weight = getattr(linear, "weight", None)
    if hasattr(linear, "base_layer"):
        raise refused(
            model,
            f"has a PEFT adapter on its head ({type(linear).__name__}), which the fused head does not read",
            "remove it from target_modules, or train the whole head with modules_to_save",
        )
    if hasattr(weight, "ds_id"):
        raise refused(model, "has a head that DeepSpeed ZeRO-3 has partitioned", "use ZeRO-2 or FSDP2")
    if hasattr(weight, "placements"):
        raise refused(model, "has a sharded head (DTensor)", "read it before fully_shard, or in a head_call inside of the forward")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise refused(model, f"gave a {type(linear).__name__} for its output embeddings, wanted a linear layer")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise refused(model, f"has a quantised head ({weight.dtype})", "keep the head out of the quantisation")
    if weight.is_meta:
        raise refused(model, "has a head without values, on the meta device", "load it, or keep lm_head out of what is offloaded")
    return linear


def backbone_of(model: Any) -> nn.Module:
    """The module whose ``last_hidden_state`` the head reads: ``model.base_model``, or ``model.model`` where that is no other.

    Raises:
        ValueError: if there is none.
    """
    for part in (getattr(model, "base_model", None), getattr(model, "model", None)):
        if isinstance(part, nn.Module) and part is not model:
            return part
    raise refused(model, "has no backbone: its base_model is the model itself")


def _state(model: Any, linear: Any) -> tuple[Any, ...]:
    """What the answer may depend on: the configuration's fractions, and what the head does beside its weight."""
    config: Any = getattr(model, "config", SimpleNamespace())
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    fractions = [{k: v for k, v in vars(c).items() if isinstance(v, float)} for c in configs]
    hooks = (*linear._forward_hooks, *linear._forward_pre_hooks)
    return fractions, type(linear).__qualname__, hooks, tuple(linear.weight.shape)


@torch._disable_dynamo  # a compiled graph would keep the chosen values; torch.compiler.disable imports the compiler
@torch.no_grad()
def _ask(model: Any, linear: Any) -> HeadMap:
    backbone = backbone_of(model)
    try:
        try:
            seen, out = _forward(model, backbone, linear)
        except RuntimeError:  # dtypes that only meet under autocast
            with torch.autocast(linear.weight.device.type, torch.bfloat16):
                seen, out = _forward(model, backbone, linear)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        raise refused(model, f"cannot be asked what it does around its head, it fails on four tokens with {text}") from error
    logits = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
    if not seen.heads or not isinstance(logits, Tensor):
        raise refused(model, f"does not call its head ({type(linear).__name__}) for its logits")
    if len(seen.heads) > 1 or seen.called.count(backbone) > 1:
        raise refused(model, "calls its backbone or its head more than once")
    if not seen.called or seen.called[-1] is not backbone or not seen.same:
        raise refused(model, f"does not give its head the last hidden state of its backbone ({type(backbone).__name__})")
    given, output = seen.heads[0]
    factor = factor_of(model, seen.hidden, given)
    check_product(model, linear, given, output)
    return HeadMap(factor, *fit(model, seen.values, logits))


def _forward(model: Any, backbone: nn.Module, linear: Any) -> tuple[_Seen, Any]:
    """One forward with the hooks in it, of which nothing stays."""
    seen = _Seen(*chosen(linear))
    with _undisturbed(model), seen.hooked(model, backbone, linear), torch.compiler.set_stance("force_eager"):
        inputs = _inputs(model, linear.weight.device)
        out = model(**inputs)
        if backbone not in seen.called:  # OPT calls model.model.decoder: is it the same?
            backbone(**inputs)
    return seen, out


class _Seen:
    """The hooks of one forward: what they put in, and what they saw."""

    def __init__(self, hidden: Tensor, values: Tensor) -> None:
        self.hidden, self.values = hidden, values
        self.called: list[nn.Module] = []
        self.same = True
        self.heads: list[tuple[Tensor, Tensor]] = []

    @contextlib.contextmanager
    def hooked(self, model: Any, backbone: nn.Module, linear: nn.Module) -> Iterator[None]:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else backbone
        hooks = [part.register_forward_hook(self.backbone) for part in {backbone, decoder} - {model, linear}]
        hooks.append(linear.register_forward_hook(self.head))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def backbone(self, module: nn.Module, args: Any, out: Any) -> Any:
        was = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", None)
        if not isinstance(was, Tensor):
            return None
        if self.heads:  # asked on its own: what the head was given is to come out again
            self.same = torch.equal(was, self.hidden)
        self.called.append(module)
        if was.numel() != self.hidden.numel():  # of another width: something comes before the head
            return None
        self.hidden = self.hidden.to(was).view_as(was)
        put = self.hidden.clone()  # the model may write into it
        if isinstance(out, tuple):
            return (put, *out[1:])
        out.last_hidden_state = put
        return out

    def head(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        self.heads.append((args[0].clone(), out))
        return self.values.to(out.device, copy=True).view_as(out) if out.numel() == self.values.numel() else None


def _inputs(model: Any, device: torch.device) -> dict[str, Any]:
    """Arguments of one forward: an id that no configuration names, lest it stand for an image or an end."""
    embedding: Any = model.get_input_embeddings()
    taken = set(_named_ids(vars(getattr(model, "config", SimpleNamespace()))))
    free = next((i for i in range(3, len(embedding.weight)) if i not in taken), 0)
    ids = torch.full((1, len(SIZES)), free, device=device if embedding.weight.is_meta else embedding.weight.device)
    accepted = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {}
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        more["use_cache"] = False
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        more["decoder_input_ids"] = ids
    return {"input_ids": ids, **more}


def _named_ids(config: dict[Any, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict) or (str(name).endswith("_config") and value is not None):
            yield from _named_ids(value if isinstance(value, dict) else vars(value))
        elif str(name).endswith(("_id", "_ids", "_index")):
            yield from (x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int))


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; then each module's attributes (its mode, what its forward keeps) and the RNG as they were."""
    before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    with torch.random.fork_rng(sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})):
        try:
            for m, *_ in before:
                m.training = False
            yield
        finally:
            for m, own, buffers in before:
                now: Any = vars(m)
                for name in now.keys() - own.keys():
                    del now[name]
                now.update(own)
                m._buffers.clear()
                m._buffers.update(buffers)
