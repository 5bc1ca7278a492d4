"""The registered token losses: name → pure per-token function ``(scores, **inputs) → (loss, metrics)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TOKEN_LOSSES: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a token loss known by name, so that it compiles fullgraph inside ``fused_linear_loss``."""

    def add(token_loss: Callable[..., Any]) -> Callable[..., Any]:
        TOKEN_LOSSES[name] = token_loss
        return token_loss

    return add
