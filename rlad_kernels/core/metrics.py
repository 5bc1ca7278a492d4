"""Metrics: per-token values in, means (or maxima) over the kept tokens out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class MetricSums:
    """Running sums over chunks of tokens; keys ending in ``_max`` are maxima, all others means."""

    def __init__(self, names: Iterable[str], like: Tensor) -> None:
        self._values = {k: like.new_full((), -torch.inf if k.endswith("_max") else 0) for k in names}

    def add(self, metrics: Mapping[str, Tensor], keep: Tensor | None) -> None:
        """Add per-token values ``(…)``; only tokens in ``keep`` count."""
        for name, x in metrics.items():
            largest, total = name.endswith("_max"), self._values[name]
            x = x.detach() if keep is None else torch.where(keep, x.detach(), -torch.inf if largest else 0)
            if largest:
                self._values[name] = torch.maximum(total, x.max()) if x.numel() else total
            else:
                self._values[name] = total + x.sum()

    def result(self, count: Tensor) -> dict[str, Tensor]:
        """0-dim tensors: means over ``count`` tokens and maxima; 0 where there is no token."""
        return {k: torch.where(count > 0, v, 0) if k.endswith("_max") else v / count.clamp_min(1) for k, v in self._values.items()}
