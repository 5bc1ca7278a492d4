"""Per-token quantities from hidden states and a head: log-probs, top-K, gathered logits. Checks, flattens, calls the op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlad_kernels.core.check import check_floats, check_tensor, flat_tokens, integers
from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.modes import ordinary, transformed


class Call(NamedTuple):
    """The flat arguments that every sweep op takes."""

    hidden: Tensor  # (N, D)
    weight: Tensor
    bias: Tensor | None
    inv_temp: Tensor  # (N,) or (1,)
    logit_scale: float
    softcap: float
    vocab_size: int  # of the whole head
    first: int = 0  # the head's row that the weight begins with
    group: str = ""  # whose ranks have the others


def check_states(name: str, hidden: Tensor, head: LMHead) -> None:
    """Raise a ValueError unless these are hidden states and a head."""
    if not isinstance(head, LMHead):
        fix = "pass LMHead(weight, bias) or LMHead.from_model(model)"
        raise ValueError(f"{name}: head must be an LMHead, got {type(head).__name__}; {fix}")
    check_floats(name, "hidden", hidden)


def flat_call(name: str, hidden: Tensor, head: LMHead) -> Call:
    """Check hidden states against the head and flatten them to ``(N, D)``.

    Raises:
        ValueError: for a shape, dtype or device that does not fit.
    """
    check_states(name, hidden, head)
    weight, bias = head.local()
    if transformed(hidden, weight, bias):
        raise NotImplementedError(
            f"{name}: hidden or the head is followed by forward-mode AD or a torch.func transform (jvp, grad, vmap), which this "
            "call does not support; use reverse-mode autograd on ordinary tensors, with the batch as leading dimensions"
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        got = tuple(hidden.shape)[-1:] or "no dimension"
        raise ValueError(f"{name}: weight (V, D) has D={weight.shape[1]}, hidden has D={got[0] if got != 'no dimension' else got}")
    if hidden.device != weight.device:
        raise ValueError(f"{name}: hidden is on {hidden.device}, weight on {weight.device}; they must share a device")
    if torch.is_autocast_enabled(hidden.device.type):
        low = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = (x if x.dtype == torch.float64 else x.to(low) for x in (hidden, weight))  # as in torch's own products
        bias = None if bias is None else bias.to(weight.dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{name}: hidden has dtype {hidden.dtype}, weight {weight.dtype}; they must match (or use autocast)")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"{name}: bias has dtype {bias.dtype}, weight {weight.dtype}; they must match (or use autocast)")
    hidden, shape, t = ordinary(hidden), hidden.shape[:-1], head.temperature
    if isinstance(t, Tensor) and t.numel() != 1 and t.shape != shape:
        raise ValueError(f"{name}: temperature has shape {tuple(t.shape)}, wanted the target's shape {tuple(shape)}")
    hidden = flat_tokens(hidden, len(shape))
    hidden = hidden if hidden.stride(-1) == 1 or hidden.shape[-1] == 1 else hidden.contiguous()
    place = (head.vocab_size or 0, head.first, head.group.group_name if head.group is not None else "")
    return Call(hidden, weight, bias, _inv_temp(name, hidden, head), head.logit_scale, head.softcap or 0.0, *place)


def _inv_temp(name: str, hidden: Tensor, head: LMHead) -> Tensor:
    """1/temperature, one for all rows or one a row; a row's own is checked where it is known which rows count."""
    dtype = acc_dtype(hidden.dtype)
    if not isinstance(head.temperature, Tensor):
        return torch.ones(1, dtype=dtype, device=hidden.device) * (1.0 / head.temperature)
    temperature = head.temperature.detach().to(hidden.device, dtype).reshape(-1)
    if len(temperature) == 1 and len(hidden) > 1:
        temperature = torch.ops.rlad.checked(temperature, "temperature", f"{name}: temperature")
    return 1 / temperature


def flat_rows(
    name: str, argument: str, x: Tensor, shape: torch.Size, device: torch.device, *, ids: bool = False, extra: int = 0
) -> Tensor:
    """``x`` with the leading ``shape`` flattened; ``extra`` trailing dimensions are kept; ``ids`` are int32 or int64.

    Raises:
        ValueError: for another shape or device, or with ``ids`` for a dtype that is not an integer.
    """
    check_tensor(name, argument, x)
    if x.device != device:
        raise ValueError(f"{name}: {argument} is on {x.device}, hidden on {device}; they must share a device")
    leading = x.shape[: x.dim() - extra] if x.dim() >= extra else None
    if leading != shape:
        wanted = f"{tuple(shape)}" if not extra else f"({', '.join(map(str, (*shape, 'K')))})"
        raise ValueError(f"{name}: {argument} has shape {tuple(x.shape)}, wanted {wanted}")
    return flat_tokens(ordinary((integers(name, argument, x) if ids else x).detach()), len(shape))


def maybe_rows(
    name: str, argument: str, x: Tensor | None, shape: torch.Size, device: torch.device, *, ids: bool = False, extra: int = 0
) -> Tensor | None:
    """:func:`flat_rows` of an optional argument."""
    return None if x is None else flat_rows(name, argument, x, shape, device, ids=ids, extra=extra)


def target_shape(name: str, hidden: Tensor, target: Tensor) -> torch.Size:
    check_tensor(name, "hidden", hidden)
    check_tensor(name, "target", target)
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"{name}: target has shape {tuple(target.shape)}, hidden (…, D) {tuple(hidden.shape)}")
    return target.shape
