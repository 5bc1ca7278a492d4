"""Products over gathered rows of the LM head: K rows of W a token, no sweep over the vocabulary."""

from collections.abc import Iterator
from math import inf

import torch
import triton
import triton.language as tl

from ._kernel import HALVES, WIDE_LOAD, Case, D, J, R, V, add_kernel, ids, meta, sizes
from ._launch import config, launch, pick, require_dtype
from ._math import cast

# A gathered weight costs its 2 or 4 bytes and one multiply-add: memory bounds all three, a H200 did 3.0 TB/s in the first two
# and 1.4 in the last. By D. Rows of W are far apart, so a program keeps BLOCK_K of them in flight; 512 columns of bf16 are one
# 16-byte load for each of 2 warps' lanes.
DOT_TABLE = (
    config(512, 4, BLOCK_K=8, BLOCK_D=256),
    config(inf, 4, BLOCK_K=4, BLOCK_D=1024),
)
DHIDDEN_TABLE = (
    config(512, 4, BLOCK_K=8, BLOCK_D=256),
    config(inf, 4, BLOCK_K=8, BLOCK_D=512),
)
# Most programs leave at once (they do not start a run), so wide D blocks: fewer programs to launch.
DWEIGHT_TABLE = (
    config(512, 4, BLOCK_P=8, BLOCK_D=256),
    config(inf, 4, BLOCK_P=4, BLOCK_D=1024),
)


@triton.jit(do_not_specialize=["V", "K"])
def gather_dot_kernel(out, hidden, stride_h, weight, stride_w, ids, V, D, K, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[i, k] = Σ_d hidden[i, d] · weight[ids[i, k], d], 0 for an id outside [0, V)."""
    i_n = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_id = tl.load(ids + i_n * K + o_k, mask=o_k < K, other=-1)
    m_id = (b_id >= 0) & (b_id < V)
    p_w = weight + b_id.to(tl.int64)[:, None] * stride_w
    b_acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        o_d = d0 + tl.arange(0, BLOCK_D)
        b_h = tl.load(hidden + i_n * stride_h + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_w = tl.load(p_w + o_d[None, :], mask=m_id[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        b_acc += b_w * b_h[None, :]
    b_dot = tl.where(m_id, tl.sum(b_acc, 1), 0.0)  # a NaN in hidden must not reach an empty entry
    tl.store(out + i_n * K + o_k, b_dot, mask=o_k < K)


@triton.jit(do_not_specialize=["V", "K"])
def gather_dhidden_kernel(
    out, stride_o, grad, weight, stride_w, ids, V, D, K, ADD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[i, d] (+)= Σ_k grad[i, k] · weight[ids[i, k], d] over the ids in [0, V)."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        o_k = k0 + tl.arange(0, BLOCK_K)
        b_id = tl.load(ids + i_n * K + o_k, mask=o_k < K, other=-1)
        m_id = (b_id >= 0) & (b_id < V)
        b_g = tl.load(grad + i_n * K + o_k, mask=m_id, other=0.0)
        p_w = weight + b_id.to(tl.int64)[:, None] * stride_w + o_d[None, :]
        b_w = tl.load(p_w, mask=m_id[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        b_acc += b_g[:, None] * b_w
    p_out = out + i_n * stride_o + o_d
    b_sum = tl.sum(b_acc, 0)
    if ADD:
        b_sum += tl.load(p_out, mask=o_d < D, other=0.0).to(tl.float32)
    tl.store(p_out, cast(b_sum, out.dtype.element_ty), mask=o_d < D)


@triton.jit(do_not_specialize=["V", "K", "P", "col0"])
def gather_dweight_kernel(
    d_weight,
    stride_w,
    grad,
    hidden,
    stride_h,
    order,
    sorted_ids,
    V,
    D,
    K,
    P,
    col0,
    ADD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_weight[v, d] (+)= Σ grad[order[p]] · hidden[order[p] // K, d] over the run of col0 + v in sorted_ids: a program a run."""
    i_p = tl.program_id(0).to(tl.int64)
    v = tl.load(sorted_ids + i_p)
    before = tl.load(sorted_ids + i_p - 1, mask=i_p > 0, other=-1)
    if (v >= col0) & (v - col0 < V) & (before != v):
        o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        b_acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        o_p = i_p + tl.arange(0, BLOCK_P)
        m_p = (o_p < P) & (tl.load(sorted_ids + o_p, mask=o_p < P, other=-1) == v)
        running = tl.sum(m_p.to(tl.int32), 0)
        while running > 0:
            b_at = tl.load(order + o_p, mask=m_p, other=0)
            b_g = tl.load(grad + b_at, mask=m_p, other=0.0)
            p_h = hidden + (b_at // K)[:, None] * stride_h + o_d[None, :]
            b_h = tl.load(p_h, mask=m_p[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
            b_acc += b_g[:, None] * b_h
            o_p += BLOCK_P
            m_p = (o_p < P) & (tl.load(sorted_ids + o_p, mask=o_p < P, other=-1) == v)
            running = tl.sum(m_p.to(tl.int32), 0)
        p_out = d_weight + (v - col0).to(tl.int64) * stride_w + o_d
        b_sum = tl.sum(b_acc, 0)
        if ADD:
            b_sum += tl.load(p_out, mask=o_d < D, other=0.0).to(tl.float32)
        tl.store(p_out, cast(b_sum, d_weight.dtype.element_ty), mask=o_d < D)


def gather_dot(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Raw dot products (N, K) float32 of `hidden (N, D)` with the rows `ids (N, K)` of `weight (V, D)`; 0 for a bad id."""
    require_dtype("gather_dot", HALVES, hidden=hidden, weight=weight)
    n, k = ids.shape
    row = pick(DOT_TABLE, hidden.shape[1])
    out = torch.empty((n, k), dtype=torch.float32, device=hidden.device)
    grid = (n, triton.cdiv(k, dict(row.blocks)["BLOCK_K"]))
    launch(
        gather_dot_kernel,
        grid,
        row,
        out,
        hidden,
        hidden.stride(0),
        weight,
        weight.stride(0),
        ids.contiguous(),
        weight.shape[0],
        hidden.shape[1],
        k,
    )
    return out


def gather_dhidden_(out: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, add: bool) -> None:
    """Write (or `add`) into `out (N, D)`, float32 or 16 bits, Σ_k grad[i, k] · weight[ids[i, k]], made in float32; no bad ids."""
    require_dtype("gather_dhidden_", HALVES, out=out, weight=weight)
    require_dtype("gather_dhidden_", grad=grad)
    n, k = ids.shape
    d = weight.shape[1]
    row = pick(DHIDDEN_TABLE, d)
    grid = (n, triton.cdiv(d, dict(row.blocks)["BLOCK_D"]))
    launch(
        gather_dhidden_kernel,
        grid,
        row,
        out,
        out.stride(0),
        grad.contiguous(),
        weight,
        weight.stride(0),
        ids.contiguous(),
        weight.shape[0],
        d,
        k,
        ADD=add,
    )


def gather_dweight_(
    d_weight: torch.Tensor,
    grad: torch.Tensor,
    hidden: torch.Tensor,
    order: torch.Tensor,
    sorted_ids: torch.Tensor,
    add: bool,
    col0: int = 0,
) -> None:
    """Write (or `add`) into the rows of `d_weight (V, D)`, ids from `col0` on, that are in `sorted_ids` the sum over the id's run;
    leave others alone."""
    require_dtype("gather_dweight_", HALVES, d_weight=d_weight, hidden=hidden)
    require_dtype("gather_dweight_", grad=grad)
    d = hidden.shape[1]
    row = pick(DWEIGHT_TABLE, d)
    places = sorted_ids.numel()
    grid = (places, triton.cdiv(d, dict(row.blocks)["BLOCK_D"]))
    launch(
        gather_dweight_kernel,
        grid,
        row,
        d_weight,
        d_weight.stride(0),
        grad.contiguous(),
        hidden,
        hidden.stride(0),
        order,
        sorted_ids,
        d_weight.shape[0],
        d,
        grad.shape[1],
        places,
        col0,
        ADD=add,
    )


def dot_cases() -> Iterator[Case]:
    for dtype in HALVES:
        for d in sizes(DOT_TABLE, D):
            yield Case(f"{dtype} D={d}", gather_dot, (meta(R, d, dtype=dtype), meta(V, d, dtype=dtype), ids(R, J)))


def dhidden_cases() -> Iterator[Case]:
    for dtype in HALVES:
        for d in sizes(DHIDDEN_TABLE, D):
            for out, add in {(dtype, False), (torch.float32, False), (torch.float32, True)}:
                args = (meta(R, d, dtype=out), meta(R, J), meta(V, d, dtype=dtype), ids(R, J), add)
                yield Case(f"{dtype} → {out} D={d} add={add}", gather_dhidden_, args)


def dweight_cases() -> Iterator[Case]:
    places = (meta(R * J, dtype=torch.int64), ids(R * J))
    for dtype in HALVES:
        for out in {torch.float32, dtype}:
            for d in sizes(DWEIGHT_TABLE, D):
                args = (meta(V, d, dtype=out), meta(R, J), meta(R, d, dtype=dtype), *places)
                for add in (False, True):
                    yield Case(f"{dtype} → {out} D={d} add={add}", gather_dweight_, (*args, add))


add_kernel(gather_dot_kernel, gather_dot, DOT_TABLE, dot_cases, max_registers=80, wide=(WIDE_LOAD,))
add_kernel(gather_dhidden_kernel, gather_dhidden_, DHIDDEN_TABLE, dhidden_cases, max_registers=72)
add_kernel(gather_dweight_kernel, gather_dweight_, DWEIGHT_TABLE, dweight_cases, max_registers=96)
