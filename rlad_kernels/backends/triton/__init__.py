"""Triton backend: one module per operation, each a kernel and its launcher. Imported only when an operation first runs."""

from .clipped_ratio import clipped_ratio
from .columns import column_stats_
from .divergence import divergence_
from .dlogits import dlogits_
from .fold import fold_
from .gather import gather_dhidden, gather_dot, gather_dweight_
from .score import score_partials
from .topk import fold_topk_
from .topk_kl import topk_kl

__all__ = [
    "clipped_ratio",
    "column_stats_",
    "divergence_",
    "dlogits_",
    "fold_",
    "fold_topk_",
    "gather_dhidden",
    "gather_dot",
    "gather_dweight_",
    "score_partials",
    "topk_kl",
]
