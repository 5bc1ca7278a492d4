"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from numbers import Integral
from typing import Any

UNITS = {"": 1, "B": 1} | {f"{p}{i}B": (1024 if i else 1000) ** e for e, p in enumerate("KMGT", 1) for i in ("I", "")}


def byte_size(name: str, argument: str, x: Any) -> int:
    """``x`` in bytes: an int of at least 0, or a number with a unit, ``"2GiB"`` (1,024³), ``"24 GB"`` (1,000³).

    Raises:
        ValueError: naming the argument and what came.
    """
    if isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= 0:
        return int(x)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", x) if isinstance(x, str) else None
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"{name}: {argument} must be a number of bytes, or one with a unit such as 80GiB, got {x!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])
