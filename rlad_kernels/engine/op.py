"""How a sweep becomes a PyTorch op: its definition, the shapes of its results, the gradients that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.core.modes import without_autocast

# arguments of every sweep op, after HEAD
CALL = "Tensor inv_temp, float logit_scale, float softcap, int vocab_size, int first, str group"
NEED = "bool need_hidden, bool need_weight, bool need_bias"


SWEEP_OPS: list[str] = []


def define(name: str, schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The op ``rlad::name``, one Python function for every device: the backends differ in the row ops alone."""
    SWEEP_OPS.append(name)
    torch.library.define(f"rlad::{name}", schema)
    torch.library.impl(f"rlad::{name}", ("cpu", "cuda"), without_autocast(function))
    return getattr(torch.ops.rlad, name)


def no_double_backward(name: str) -> None:
    """Make the gradient of a backward op an error that says so."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"rlad::{name}: double backward is not supported")

    torch.library.register_autograd(f"rlad::{name}", backward)


def result(like: Tensor, shape: Sequence[int] | torch.Size, wanted: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """A fake result in the accumulation dtype; empty where it was not asked for."""
    return like.new_empty(shape if wanted else (0,), dtype=dtype or acc_dtype(like.dtype))


def gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need: Sequence[bool], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Fake d_hidden, d_weight, d_bias."""
    given = zip((hidden, weight, bias), need, strict=True)
    return tuple(weight.new_empty(0) if x is None or not n else x.new_empty(x.shape, dtype=dtype) for x, n in given)


def wanted(ctx: Any, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Which of the gradients by hidden, weight and bias autograd asks for."""
    return ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]


def given(grads: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
    """The gradients, None where they were not asked for."""
    return [g if n else None for g, n in zip(grads, need, strict=True)]


def scaled(ctx: Any, g_loss: Tensor, grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Finished gradients of a loss times the loss's own, in the operands' dtype; ``ctx`` holds need and dtype."""
    return [(g_loss * d).to(ctx.dtype) if n else None for d, n in zip(grads, ctx.need, strict=True)]
