"""Metrics: per-token values in, means (or maxima) over the kept tokens out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

METRICS = (
    "clip_frac_low", "clip_frac_high", "ratio_mean", "ratio_max", "kl_old", "kl_teacher", "kl_ref", "entropy", "student_mass",
    "teacher_mass", "rows_skipped", "invalid_teacher", "tail_clamped", "dropped_mass_mean", "dropped_mass_max",
    "rollout_weight_mean", "rollout_clip_frac",
)  # fmt: skip


class MetricSums:
    """Running sums over chunks of tokens; keys ending in ``_max`` are maxima of non-negative values, all others means."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor], keep: Tensor | None) -> None:
        """Add per-token values ``(…)``; only tokens in ``keep`` count."""
        for name, x in metrics.items():
            x = x.detach() if keep is None else torch.where(keep, x.detach(), 0)
            total = self._values.get(name, x.new_zeros(()))
            if name.endswith("_max"):
                self._values[name] = torch.maximum(total, x.max()) if x.numel() else total
            else:
                self._values[name] = total + x.sum()

    def result(self, count: Tensor) -> dict[str, Tensor]:
        """0-dim tensors: means over ``count`` tokens (0 where there is none) and maxima."""
        return {k: v if k.endswith("_max") else v / count.clamp_min(1) for k, v in self._values.items()}
