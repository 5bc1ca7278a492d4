"""Losses: one small file a method, each a pure per-token function and its public wrapper."""

from importlib import import_module
from pkgutil import iter_modules


def load() -> None:
    """Import every file of this folder: a method is in ``METHODS`` because its file exists."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
