"""Which dtype is used for what."""

from __future__ import annotations

import torch


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype logits, sums and outputs are held in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a fused loss's finished gradients wait for the loss's own: float16 loses them before a loss scale."""
    return torch.float32 if dtype == torch.float16 else dtype
