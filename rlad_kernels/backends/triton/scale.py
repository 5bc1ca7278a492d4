"""scale_: a finished gradient times the loss's own, which is nearly always 1."""

from collections.abc import Iterator
from math import inf

import torch
import triton
import triton.language as tl

from ._kernel import HALVES, Case, D, R, add_kernel, meta
from ._launch import config, launch, multiprocessors, pick, require_dtype
from ._math import cast

# The scalar is read on the device: where it is 1 the launch moves nothing, and the host waits for nothing. Otherwise two bytes of
# memory traffic for each of the gradient, which bounds it.
TABLE = (config(inf, 8, BLOCK=2048),)
PROGRAMS = 8  # an SM


@triton.jit(do_not_specialize=["N"])
def scale_kernel(x, factor, N, BLOCK: tl.constexpr):
    """x ← factor·x."""
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, N, step):
            p_x = x + start + tl.arange(0, BLOCK)
            m_x = start + tl.arange(0, BLOCK) < N
            tl.store(p_x, cast(tl.load(p_x, mask=m_x, other=0.0).to(tl.float32) * f, x.dtype.element_ty), mask=m_x)


def scale_(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply the contiguous `x` by the 0-dim `factor`, in place."""
    require_dtype("scale_", HALVES, x=x, factor=factor)
    if not x.is_contiguous():
        raise ValueError(f"scale_: x must be contiguous, got strides {x.stride()} for shape {tuple(x.shape)}")
    row = pick(TABLE, x.numel())
    programs = min(triton.cdiv(x.numel(), dict(row.blocks)["BLOCK"]), PROGRAMS * multiprocessors(x.device))
    launch(scale_kernel, (programs,), row, x, factor, x.numel())


def cases() -> Iterator[Case]:
    for dtype in HALVES:
        yield Case(f"{dtype}", scale_, (meta(R, D, dtype=dtype), torch.empty((), device="meta")))


add_kernel(scale_kernel, scale_, TABLE, cases, max_registers=64)
