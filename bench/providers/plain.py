"""PyTorch alone: eager, compiled, and its own linear cross entropy."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inputs import Inputs
from bench.providers.base import Loss, Provider, policy_gradient


@cache
def _compiled() -> Loss:
    return torch.compile(policy_gradient, dynamic=True)  # dynamic: the small gate compiles it, not the measured step


def compiled(x: Inputs) -> Tensor:
    return _compiled()(x)


def lce(x: Inputs) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return (F.linear_cross_entropy(x.hidden, x.weight, x.target, reduction="none") * x.advantage).mean()


PROVIDERS = (
    Provider("naive", policy_gradient, "PyTorch, eager, all logits", 3, 12, logits=True),
    Provider("compiled", compiled, "PyTorch, torch.compile, all logits", 3, 6, logits=True),
    Provider("lce", lce, "torch F.linear_cross_entropy", 3, 6),
)
