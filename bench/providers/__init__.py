"""Who is measured, and what it costs by count. A module a framework, each imported by the functions that use it."""

from __future__ import annotations

from importlib.util import find_spec

from bench.providers import cce, liger, ours, plain, quack, trl, verl
from bench.providers.base import Provider

ROOMS = (plain, ours, trl, liger, verl, cce, quack)
PROVIDERS: dict[str, Provider] = {p.name: p for room in ROOMS for p in room.PROVIDERS}


def absent(provider: Provider, device: str) -> str | None:
    """Why it cannot run here, as far as that can be told without importing it."""
    missing = [m for m in provider.needs if find_spec(m) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "needs a GPU" if provider.gpu and device != "cuda" else None
