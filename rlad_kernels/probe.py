"""What a causal LM does around its head, found by asking it: one forward of four tokens with chosen values put in by hooks.

The backbone's last hidden state is replaced by chosen rows: what the head is then given shows what stands between the two. The head's
output is replaced by known values: the model's logits show what becomes of them. No name in a configuration says anything about it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = (0.1, 1.0, 30.0, 1000.0)  # of the logits that the chosen hidden states give, a row each
GRID = 64  # values from −1000 to 1000 put into the head's output; four rows of them tell 64⁴ columns apart
FIX = "if you know what it does make the head by hand, LMHead(weight, bias, logit_scale=…, softcap=…): docs/wiring.md"


class HeadMap(NamedTuple):
    """logits_v = softcap·tanh(scale·(factor·h·W_v + b_v)/softcap) for v < columns; without softcap, without the tanh."""

    factor: float
    scale: float
    softcap: float | None
    columns: int


def head_map(model: Any, linear: Any) -> HeadMap:
    """What ``model`` does around its head ``linear``. It is asked once and keeps the answer, which does not depend on its weights.

    Raises:
        ValueError: if no LMHead gives the model's logits from its last hidden state, or the model cannot be asked.
    """
    kept = vars(model).get("_rlad_head_map")
    if kept is not None and torch.compiler.is_compiling():
        return HeadMap(*kept[1])
    state = _state(model, linear)
    if kept is None or kept[0] != state:
        kept = vars(model)["_rlad_head_map"] = state, tuple(_ask(model, linear))  # a copy of the model has it too
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
    linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(linear, "weight", None)
    if not isinstance(model, nn.Module) or not isinstance(linear, nn.Module):
        raise ValueError(
            f"LMHead.from_model: model must be a module with a linear get_output_embeddings(), {type(model).__name__} gave {linear!r}"
        )
    if hasattr(linear, "base_layer"):
        raise refused(
            model, f"has a PEFT adapter on its head ({type(linear).__name__}), which the fused head does not read",
            "remove it from target_modules, or train the whole head with modules_to_save",
        )  # fmt: skip
    if hasattr(weight, "ds_id"):
        raise refused(model, "has a head that DeepSpeed ZeRO-3 has partitioned", "use ZeRO-2 or FSDP2")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise refused(model, f"gave {linear!r} for its output embeddings, wanted a linear layer")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise refused(model, f"has a quantised head ({weight.dtype})", "keep the head out of the quantisation")
    if weight.is_meta:
        raise refused(model, "has a head without values, on the meta device", "load it, or keep lm_head out of what is offloaded")
    return linear


def backbone_of(model: Any) -> nn.Module:
    """The module whose ``last_hidden_state`` the head reads: ``model.base_model``, or ``model.model`` where that is the model itself.

    Raises:
        ValueError: if there is none.
    """
    for part in (getattr(model, "base_model", None), getattr(model, "model", None)):
        if isinstance(part, nn.Module) and part is not model:
            return part
    raise refused(model, "has no backbone: its base_model is the model itself")


def refused(model: Any, why: str, fix: str = FIX) -> ValueError:
    """The error that names a model, why no LMHead is its head, and what to do."""
    return ValueError(f"LMHead.from_model: {type(model).__name__} {why}; {fix}")


def _state(model: Any, linear: Any) -> tuple[Any, ...]:
    """What the answer may depend on: the configuration's fractions, and what the head does beside its weight."""
    config = getattr(model, "config", None)
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    fractions = [{k: v for k, v in vars(c).items() if isinstance(v, float)} for c in configs if c is not None]
    hooks = (*linear._forward_hooks, *linear._forward_pre_hooks)
    return fractions, type(linear).__qualname__, hooks, tuple(linear.weight.shape)


@torch.compiler.disable  # a compiled graph would keep the chosen values
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
    if seen.called[-1] is not backbone or not seen.same:
        raise refused(model, f"does not give its head the last hidden state of its backbone ({type(backbone).__name__})")
    given, output = seen.heads[0]
    factor = _factor(model, seen.hidden, given)
    _check_product(model, linear, given, output)
    return HeadMap(factor, *_fit(model, seen.values, logits))


def _forward(model: Any, backbone: nn.Module, linear: Any) -> tuple[_Seen, Any]:
    """One forward with the hooks in it, of which nothing stays."""
    seen = _Seen(*_chosen(linear))
    with _undisturbed(model), seen.hooked(model, backbone, linear), torch.compiler.set_stance("force_eager"):
        inputs = _inputs(model)
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
        hooks = [part.register_forward_hook(self.backbone) for part in {backbone, decoder} - {model}]
        hooks.append(linear.register_forward_hook(self.head))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def backbone(self, module: nn.Module, args: Any, out: Any) -> Any:
        was: Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
        if self.heads:  # asked on its own: what the head was given is to come out again
            self.same = torch.equal(was, self.hidden)
        self.called.append(module)
        self.hidden = self.hidden.to(was).view_as(was)
        if isinstance(out, tuple):
            return (self.hidden, *out[1:])
        out.last_hidden_state = self.hidden
        return out

    def head(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        self.heads.append((args[0], out))
        return self.values.to(out.device).view_as(out)


def _chosen(linear: Any) -> tuple[Tensor, Tensor]:
    """Hidden states ``(4, D)`` whose logits have the sizes of SIZES, and values ``(4, V)`` no two columns of which are equal."""
    weight: Tensor = linear.weight
    (rows, width), n, device = weight.shape, len(SIZES), weight.device
    hidden = torch.sin(torch.arange(1, n * width + 1, device=device).view(n, width) * 1.7)
    largest = F.linear(hidden.to(weight.dtype), weight).float().abs().amax(1, keepdim=True)
    hidden = hidden * (torch.tensor(SIZES, device=device).unsqueeze(1) / largest.clamp_min(1e-6)).clamp(1e-3, 1e4)
    half = torch.logspace(-2, 3, GRID // 2, device=device)
    grid = torch.cat([-half.flip(0), half])[torch.arange(GRID, device=device) * 27 % GRID]  # few columns see all sizes
    column, row = torch.arange(rows, device=device), torch.arange(n, device=device).unsqueeze(1)
    return hidden, grid[(column // GRID**row + 2 * row * column) % GRID]  # row r has the r-th digit, given those before it


def _factor(model: Any, hidden: Tensor, given: Tensor) -> float:
    """f of given = f·hidden."""
    if given.shape[-1] != hidden.shape[-1] or given.numel() != hidden.numel():
        raise refused(model, f"gives its head hidden states {tuple(given.shape)} of {tuple(hidden.shape)}")
    eps = max(torch.finfo(x.dtype).eps for x in (hidden, given))
    x, h = (t.detach().cpu().double().flatten() for t in (given, hidden))
    factor = float((x @ h) / (h @ h))
    if not bool(((x - factor * h).abs() <= 2 * eps * x.abs() + torch.finfo(given.dtype).smallest_normal).all()) or factor == 0:
        raise refused(model, "has a layer between its last hidden state and its head")
    return _shortest(factor)


def _check_product(model: Any, linear: Any, given: Tensor, output: Tensor) -> None:
    """Raise unless the head's output is given·Wᵀ + b, to the rounding of both: adapters, hooks and layers of one's own."""
    weight, bias = linear.weight, getattr(linear, "bias", None)
    want = F.linear(given.to(weight.device, weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    if output.shape == want.shape:
        eps = 4 * max(torch.finfo(x.dtype).eps for x in (want, output, given)) + 2**-24 * weight.shape[1]
        want, output = (x.float().reshape(len(SIZES), -1) for x in (want, output.to(want.device)))
        row = want.square().mean(1, keepdim=True).sqrt()
        column = (want / row.clamp_min(1e-30)).abs().amax(0)
        if bool(((output - want).abs() <= eps * row * (1 + column)).all()):
            return
    raise refused(
        model, f"has a head ({type(linear).__name__}) whose output is not hidden·weightᵀ + bias",
        "merge or remove what was put on it (an adapter, a hook, a parametrisation, quantised weights), or train on the logits",
    )  # fmt: skip


def _fit(model: Any, values: Tensor, logits: Tensor) -> tuple[float, float | None, int]:
    """scale, softcap and columns of logits = softcap·tanh(scale·values/softcap), which must hold for every value."""
    n = len(values)
    if logits.shape[-1] > values.shape[1] or logits.numel() != n * logits.shape[-1]:
        raise refused(model, f"makes logits {tuple(logits.shape)} of a head's output {tuple(values.shape)}")
    eps, y = 8 * max(torch.finfo(logits.dtype).eps, 2**-23), logits.detach().cpu().double().reshape(n, -1)
    z = values.cpu().double()[:, : y.shape[1]]
    scale, softcap = float((y / z)[z.abs() == z.abs().min()].mean()), None
    fitted = scale * z
    if not bool(((y - fitted).abs() <= eps * y.abs()).all()) and y.isfinite().all() and scale:
        for _ in range(4):  # each from the other: large values give the cap, small ones the scale
            softcap = _softcap(abs(scale) * float(z.abs().max()), float(y.abs().max()))
            small = y.abs() < softcap / 2
            scale = float((softcap * torch.atanh(y / softcap) / z)[small].mean())
        scale, softcap = _shortest(scale), _shortest(softcap)
        fitted = softcap * torch.tanh(scale * z / softcap)
    bad = ~((y - fitted).abs() <= eps * y.abs())
    if bad.any() or not scale:
        where = tuple(bad.nonzero()[0].tolist()) if bad.any() else (0, 0)
        raise refused(
            model, f"makes other logits of its head's output than a scale and a softcap do: {float(y[where]):.6g} of "
            f"{float(z[where]):.6g} at id {where[1]}, and so at {int(bad.any(0).sum())} of {y.shape[1]} ids",
        )  # fmt: skip
    return (scale if softcap else _shortest(float((y / z).mean()))), softcap, y.shape[1]


def _softcap(x: float, y: float) -> float:
    """c of y = c·tanh(x/c), which grows with c, by bisection."""
    low, high = y / 2, 1e6 * y
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if middle * math.tanh(x / middle) < y else (low, middle)
    return low


def _shortest(x: float) -> float:
    """The shortest decimal that float32 does not tell from x."""
    return next(y for digits in range(1, 18) if abs((y := float(f"{x:.{digits}g}")) - x) <= 2**-24 * abs(x))


def _inputs(model: Any) -> dict[str, Any]:
    """Arguments of one forward: an id that no configuration names, lest it stand for an image or an end."""
    embedding = model.get_input_embeddings()
    taken = set(_named_ids(model.config.to_dict())) if hasattr(model, "config") else set()
    free = next((i for i in range(3, len(embedding.weight)) if i not in taken), 0)
    ids = torch.full((1, len(SIZES)), free, device=embedding.weight.device)
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        more["decoder_input_ids"] = ids
    return {"input_ids": ids, **more}


def _named_ids(config: dict[Any, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _named_ids(value)
        elif str(name).endswith(("_id", "_ids", "_index")):
            yield from (x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int))


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; then each module's attributes (its mode, what its forward keeps) and the RNG as they were."""
    before = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    with torch.random.fork_rng(sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})):
        try:
            for m, _, _ in before:
                m.training = False
            yield
        finally:
            for m, own, buffers in before:
                for name in vars(m).keys() - own.keys():
                    del vars(m)[name]
                vars(m).update(own)
                m._buffers.clear()
                m._buffers.update(buffers)
