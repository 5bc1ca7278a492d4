"""What a public call may be given. Each check raises a ValueError: function, argument, what came, what was wanted, the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from math import inf
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

from rlad_kernels.core.config import settings

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOPK_MAX = 1024  # of a top-K that is searched for
SUPPORT_MAX = 4096  # of a support that is given: its slots lie in one block of a kernel


def check_tensor(name: str, argument: str, x: Any) -> None:
    """Raise a ValueError unless ``x`` is one whole, dense tensor."""
    if not isinstance(x, Tensor):
        fix = "" if x is None else f"; torch.as_tensor({argument}) makes one"
        raise ValueError(f"{name}: {argument} must be a torch.Tensor, got {'None' if x is None else type(x).__name__}{fix}")
    if type(x) is not Tensor and hasattr(x, "full_tensor"):
        raise ValueError(f"{name}: {argument} is a DTensor, wanted a whole tensor; pass {argument}.full_tensor()")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: {argument} has layout {x.layout}, wanted a dense tensor; pass {argument}.to_dense()")


def check_floats(name: str, argument: str, x: Any) -> None:
    """Raise a ValueError unless ``x`` holds floats of at least 16 bits: a cast would take codes of a quantised head for weights."""
    check_tensor(name, argument, x)
    if x.dtype not in FLOATS:
        fix = "; of a quantised head these are codes: dequantise it, and pass the result" if argument in ("weight", "bias") else ""
        raise ValueError(f"{name}: {argument} must be float32, bfloat16, float16 or float64, got {x.dtype}{fix}")


def integers(name: str, argument: str, x: Any) -> Tensor:
    """``x`` as int32 or int64: in a narrower or unsigned type −1, −100 and the vocabulary's size would wrap.

    Raises:
        ValueError: for anything but integers.
    """
    check_tensor(name, argument, x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name}: {argument} must be integers, got {x.dtype}")
    if x.dtype in (torch.int64, torch.int32):
        return x
    wide = x.to(torch.int64)
    return wide if x.dtype != torch.uint64 else torch.where(wide < 0, torch.iinfo(torch.int64).max, wide)


def is_number(x: Any) -> TypeGuard[float]:
    """Whether ``x`` is a real number, numpy's and 0-dim tensors among them; a bool is none."""
    if isinstance(x, bool):
        return False
    return isinstance(x, int | float) or (isinstance(x, Tensor) and x.dim() == 0) or isinstance(x, Real)


def is_pair(x: Any) -> TypeGuard[tuple[float, float]]:
    """Whether ``x`` is a tuple of two numbers."""
    return isinstance(x, tuple) and len(x) == 2 and all(map(is_number, x))


def is_integer(x: Any) -> TypeGuard[int]:
    """Whether ``x`` is an integer, numpy's among them; a bool is none."""
    return not isinstance(x, bool) and isinstance(x, int | Integral)


def check_numbers(name: str, **numbers: Any) -> None:
    """Raise a ValueError unless each is a finite number. 0-dim tensors are not read."""
    for argument, x in numbers.items():
        if not is_number(x) or not (isinstance(x, Tensor) or -torch.inf < x < torch.inf):
            raise ValueError(f"{name}: {argument} must be a finite number, got {x!r}")


def check_eps(name: str, filter_eps: float) -> None:
    """Raise a ValueError unless 0 ≤ filter_eps < 1."""
    if not (is_number(filter_eps) and 0 <= filter_eps < 1):
        raise ValueError(f"{name}: filter_eps must be a probability in [0, 1), 0.0 for the exact backward; got {filter_eps!r}")


def check_k(name: str, k: int, vocab_size: int | None, argument: str = "k", *, most: int = SUPPORT_MAX) -> None:
    """Raise a ValueError unless 1 ≤ K ≤ min(most, vocab_size)."""
    if not is_integer(k):
        raise ValueError(f"{name}: {argument} must be an int, got {k!r}")
    if not 1 <= k <= min(most, vocab_size or most):
        bound = f"min({most}, vocab_size={vocab_size})" if vocab_size else f"{most}"
        raise ValueError(f"{name}: {argument} must have 1 <= K <= {bound}, got K={k}")


def check_range(name: str, argument: str, x: Any, low: float, high: float, ends: str = "[]") -> None:
    """Raise a ValueError unless ``x`` is finite and between ``low`` and ``high``, ``[`` and ``]`` for ends that belong to it."""
    above = is_number(x) and (x >= low if ends[0] == "[" else x > low)
    if not (is_number(x) and -inf < x < inf and above and (x <= high if ends[1] == "]" else x < high)):
        raise ValueError(f"{name}: {argument} must be in {ends[0]}{low:g}, {high:g}{ends[1]}, got {x!r}")


def check_positive(name: str, argument: str, x: Any) -> None:
    """Raise a ValueError unless ``x`` is a positive number or None."""
    if x is not None and not (is_number(x) and x > 0):
        raise ValueError(f"{name}: {argument} must be positive or None, got {x!r}")


def check_choice(name: str, argument: str, x: Any, known: Iterable[str]) -> None:
    """Raise a ValueError unless ``x`` is one of the ``known`` words."""
    known = tuple(known)
    if not isinstance(x, str) or x not in known:
        raise ValueError(f"{name}: {argument} must be one of {known}, got {x!r}")


def refuse(name: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise a TypeError, as Python does, for an argument that ``name`` does not have."""
    for wrong in given:
        if wrong not in known:
            close = get_close_matches(wrong, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}" if known else "it takes none"
            raise TypeError(f"{name}: got an unexpected argument {wrong!r}; {hint}")


def token_rows(name: str, argument: str, x: Any, like: Tensor, *, spread: bool = False, wide: bool = False) -> Tensor:
    """``x`` detached, in the log-probs' shape; with ``spread`` ``(B,)`` goes over ``(B, T)``; with ``wide`` it is ``(…, K)``.

    Raises:
        ValueError: for another shape or device.
    """
    check_tensor(name, argument, x)
    spread = spread and like.dim() == 2
    if spread and x.shape == like.shape[:1]:
        x = x.unsqueeze(1).expand_as(like)
    if x.device != like.device:
        raise ValueError(f"{name}: {argument} is on {x.device}, wanted {like.device}; all tensors must share a device")
    if (x.shape[:-1] if wide and x.dim() else x.shape) != like.shape:
        shape = f"({', '.join(map(str, (*like.shape, 'K')))})" if wide else f"{tuple(like.shape)}"
        wanted = shape + (f" or ({like.shape[0]},)" if spread else "")
        raise ValueError(f"{name}: {argument} has shape {tuple(x.shape)}, wanted {wanted}")
    return x.detach()


def flat_tokens(x: Tensor, dims: int) -> Tensor:
    """``x`` with its first ``dims`` dimensions flattened to one: a single token's has none, and gets it."""
    return x.flatten(0, dims - 1) if dims else x.unsqueeze(0)


def needed_grad(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Which of a call's operands receive gradient."""
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))  # type: ignore


def may_read(x: Tensor) -> bool:
    """Whether the values of ``x`` may be looked at: on CUDA that synchronises, and wants ``set_checks(True)``."""
    return settings.checks or not x.is_cuda


RULES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "binary": (lambda x: x[(x != 0) & (x != 1)], "must hold bools, or numbers equal to 0 or 1, got {}"),
    "ordered": (lambda x: (step := x.diff())[step < 0], "must be non-decreasing, got a step of {}"),
    "positive": (lambda x: x[~(x > 0)], "must be positive, got {}"),
    "temperature": (lambda x: x[~((x > 0) & (x < inf))], "must be positive and finite, got {}"),
    "weight": (lambda x: x[x < 0], "must be at least 0, got {:g}"),
}


def checked(x: Tensor, rule: str, what: str) -> Tensor:
    """Implements ``rlad::checked``: a copy of ``x`` whose values obey the rule; an op, so that compiled calls check as well.

    Raises:
        ValueError: ``what`` (the public function and its argument) and the first value that does not (on CUDA with
            ``set_checks(True)``).
    """
    if may_read(x):
        find, text = RULES[rule]
        wrong = find(x)
        if wrong.numel():
            raise ValueError(f"{what} {text.format(wrong.flatten()[0].item())}")
    return x.clone()


torch.library.define("rlad::checked", "(Tensor x, str rule, str what) -> Tensor")
torch.library.impl("rlad::checked", ("cpu", "cuda"), checked)
torch.library.register_fake("rlad::checked", lambda x, rule, what: torch.empty_like(x))
