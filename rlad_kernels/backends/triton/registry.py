"""Every kernel of the backend: what the tests count, and what the compile gate must cover and hold to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .clipped_ratio import clipped_ratio, clipped_ratio_kernel
from .columns import column_stats_, column_stats_kernel
from .divergence import divergence_, divergence_kernel
from .dlogits import dlogits_, dlogits_kernel
from .fold import fold_, fold_kernel
from .gather import (
    gather_dhidden,
    gather_dhidden_kernel,
    gather_dot,
    gather_dot_kernel,
    gather_dweight_,
    gather_dweight_kernel,
)
from .score import score_kernel, score_partials
from .topk import fold_topk_, fold_topk_kernel
from .topk_kl import topk_kl, topk_kl_kernel


@dataclass(frozen=True)
class Kernel:
    """A kernel, the public launcher that runs it, its register ceiling per thread, and the PTX accesses it must contain."""

    fn: Any
    launcher: Callable[..., Any]
    max_registers: int
    wide: tuple[str, ...] = ()  # regular expressions
    dots: bool = False  # its products must run on tensor cores in the 16-bit types, and never in float32
    tempers: bool = False  # it makes z of raw logits, whose last product must be rounded before it is used


# 16 bytes a thread for float32, and for the 16-bit types wherever eight neighbours belong to one thread
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v4\.b32", r"st\.global\S*\.v4\.b32"

REGISTRY: dict[str, Kernel] = {
    kernel.fn.__name__: kernel
    for kernel in (
        Kernel(fold_kernel, fold_, 64, (WIDE_LOAD,), tempers=True),
        Kernel(fold_topk_kernel, fold_topk_, 128, (WIDE_LOAD,), tempers=True),
        Kernel(dlogits_kernel, dlogits_, 80, (WIDE_LOAD, WIDE_STORE), tempers=True),
        Kernel(column_stats_kernel, column_stats_, 64, tempers=True),
        Kernel(divergence_kernel, divergence_, 96, (WIDE_LOAD, WIDE_STORE), tempers=True),
        Kernel(gather_dot_kernel, gather_dot, 80, (WIDE_LOAD,)),
        Kernel(gather_dhidden_kernel, gather_dhidden, 72),
        Kernel(gather_dweight_kernel, gather_dweight_, 96),
        Kernel(score_kernel, score_partials, 255, dots=True, tempers=True),
        Kernel(clipped_ratio_kernel, clipped_ratio, 40),
        Kernel(topk_kl_kernel, topk_kl, 128),
    )
}
