"""Losses: one small file a method, each a pure per-token function and its public wrapper."""

from importlib import import_module
from pkgutil import walk_packages


def load() -> None:
    """Import every file of this folder: a method is in ``METHODS`` because its file exists."""
    for module in walk_packages(__path__, f"{__name__}."):
        import_module(module.name)
