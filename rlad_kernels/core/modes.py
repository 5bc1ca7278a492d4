"""What torch may be doing around a call, and what the library does about it: autocast, inference mode, autograd, torch.func."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with autocast off: what runs inside the ops has chosen its dtypes, and autocast would cast products again."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return call


T = TypeVar("T", Tensor, Tensor | None)


def ordinary(x: T) -> T:
    """``x``; outside ``inference_mode`` a copy of a tensor that was made inside it, which autograd would refuse to save."""
    if x is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return x
    return x.clone() if x.is_inference() else x


def transformed(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD or a ``torch.func`` transform follows one of the tensors; no op here has rules for them."""
    if torch.compiler.is_compiling():  # which cannot ask a tensor
        return forward_ad._current_level >= 0
    given = [x for x in tensors if x is not None]
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given):  # pyright: ignore[reportAttributeAccessIssue]
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given)


@contextmanager
def autograd_inside() -> Iterator[None]:
    """Let autograd record inside an op's implementation, where the dispatcher has switched it off for this thread.

    Not under ``inference_mode``, whose tensors cannot be recorded; those made there go through :func:`ordinary` first.
    """
    keys, hidden = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.ADInplaceOrView, keys.AutogradOther, keys.AutogradNestedTensor):
        hidden = hidden.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), hidden), torch.enable_grad():
        yield


def numbers(*values: float) -> Tensor:
    """An op's numbers, float64 on the CPU. An op that took a float would be compiled anew for each value of it.

    Under ``torch.compile`` by arithmetic on a tensor: what fills one with a number is compiled for its value, too.
    """
    if not (torch.compiler.is_compiling() and values):
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([x.to(one) if isinstance(x, Tensor) else one * x for x in values])
