"""Products whose gradient autograd would take apart into 0·∞ or ∞ − ∞."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class WithSlope(torch.autograd.Function):
    """``value`` with the derivative ``slope`` by ``x``, for products that autograd would take apart into 0·∞ or ∞ − ∞."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return times(grad, ctx.saved_tensors[0]), None, None


def times(a: Tensor, b: Tensor) -> Tensor:
    """a·b with 0·∞ = 0."""
    return torch.where((a == 0) | (b == 0), 0, a * b)


def weighted_slope(log_w: Tensor, x: Tensor) -> Tensor:
    """w·(1 − e^{−x}), the slope of w·k3(x), from log w: w and e^{−x} alone may leave float32 where their product does not."""
    return torch.where(x >= 0, times(log_w.exp(), -torch.expm1(-x)), times((log_w - x).exp(), torch.expm1(x)))
