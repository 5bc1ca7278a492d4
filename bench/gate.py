"""Nothing is timed before it is right: errors against float64 at a small shape."""

from __future__ import annotations

import torch

from bench.inputs import Inputs
from bench.providers.base import Provider


class Wrong(Exception):
    """Ours has left its contract: there is nothing to time."""


def gate(provider: Provider, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Error of the loss, and of each gradient in relative Frobenius norm."""
    x = Inputs.make(512, 64, 4096, dtype, device, provider.peaked)
    exact = x.to(torch.float64)
    truth = provider.truth(exact)
    errors = {"loss": abs(provider.step(x).item() - truth.item())}
    if truth.requires_grad:
        truth.backward()
        for name in ("hidden", "weight"):
            mine, want = getattr(x, name).grad, getattr(exact, name).grad
            if (mine is None) != (want is None):
                raise Wrong(f"{provider.name} in {dtype}: d_{name} is {'missing' if mine is None else 'unasked for'}")
            if want is not None:
                errors[f"d_{name}"] = ((mine.double() - want).norm() / want.norm()).item()
    if provider.bound is not None and not max(errors.values()) <= provider.bound[dtype != torch.float32]:
        raise Wrong(f"{provider.name} in {dtype} is wrong, not slow: {errors}")
    return errors
