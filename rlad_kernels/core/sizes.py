"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from numbers import Integral
from typing import Any

UNITS = {"": 0, "B": 0} | {f"{p}{rest}": e for e, p in enumerate("KMGT", 1) for rest in ("", "B", "IB")}


def byte_size(name: str, argument: str, x: Any, unit: str = "B") -> int:
    """``x`` in bytes: an int of at least 0, or a number with a unit, ``"2GiB"``, ``"2GB"`` or ``"2G"``, all of them 2·1,024³.

    Memory is sold and reported in powers of 1,024, whatever the letters say. ``unit`` is that of text without one.

    Raises:
        ValueError: naming the argument and what came.
    """
    if isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= 0:
        return int(x)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", x) if isinstance(x, str) else None
    if match is None or match[2].upper() not in UNITS:
        plain = "bytes" if unit == "B" else unit
        raise ValueError(f"{name}: {argument} must be a number of {plain}, or one with a unit such as 80GiB, got {x!r}")
    return int(float(match[1]) * 1024 ** UNITS[(match[2] or unit).upper()])
