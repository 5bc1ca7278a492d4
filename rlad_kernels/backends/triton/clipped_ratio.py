"""clipped_ratio: the token loss of GRPO and TRRD with its gradient and metrics, in one pass over (N,) vectors."""

from collections.abc import Iterator
from math import inf

import torch
import triton
import triton.language as tl

from ._kernel import Case, R, add_kernel, meta
from ._launch import config, launch, pick, require_dtype
from ._math import excess, exp, expm1

# By N. A few thousand tokens: one a thread, so that even small batches reach every SM.
TABLE = (config(inf, 4, BLOCK=128),)

ESTIMATORS = ("k1", "k2", "k3", "k3+", "k3++", "k4", "k5")
METRICS = ("clip_low", "clip_high", "ratio", "kl_old", "kl_teacher", "kl_ref", "invalid_teacher")


@triton.jit
def _estimate(b_x, ESTIMATOR: tl.constexpr):
    """(value, d/ds) of the named estimator of KL to the reference, x = s − b."""
    if ESTIMATOR == "k1":
        return b_x, tl.zeros_like(b_x)
    elif ESTIMATOR == "k2":
        return 0.5 * b_x * b_x, b_x
    elif ESTIMATOR == "k3":
        return excess(-b_x), -expm1(-b_x)
    elif ESTIMATOR == "k3+" or ESTIMATOR == "k3++":
        return excess(-b_x), b_x
    elif ESTIMATOR == "k4":
        return b_x, b_x
    else:
        return -b_x * exp(-b_x), -expm1(-b_x)


@triton.jit(do_not_specialize=["N"])
def clipped_ratio_kernel(
    logp,
    old_logp,
    teacher_logp,
    advantages,
    ref_logp,
    loss,
    d_logp,
    metrics,
    N,
    alpha,
    clip_low,
    clip_high,
    teacher_clamp,
    dual_clip,
    kl_coef,
    DUAL: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """−min(rA, clip(r)A) (+ dual clip, + kl_coef·k), r = e^{α(s−o) + (1−α)·clamp(s−t)}; its derivative by s; metric rows."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_s = tl.load(logp + o_n, mask=m_n, other=0.0)
    b_a = tl.load(advantages + o_n, mask=m_n, other=0.0)
    b_old = b_s - tl.load(old_logp + o_n, mask=m_n, other=0.0)
    b_log_r = b_old
    b_slope = tl.full([BLOCK], 1.0, tl.float32)
    b_d = tl.zeros([BLOCK], tl.float32)
    b_invalid = tl.zeros([BLOCK], tl.float32)
    b_kl_ref = tl.zeros([BLOCK], tl.float32)
    if teacher_logp is not None:
        b_t = tl.load(teacher_logp + o_n, mask=m_n, other=0.0)
        m_finite = tl.abs(b_t) < float("inf")  # false for NaN
        b_d = tl.where(m_finite, b_s - b_t, 0.0)
        m_bound = m_finite & (tl.abs(b_d) > teacher_clamp)
        b_clamped = tl.where(m_bound, tl.where(b_d > 0, teacher_clamp, -teacher_clamp), b_d)
        b_part = (1.0 - alpha) * b_clamped
        b_part = tl.where(alpha == 1.0, 0.0, b_part)  # 0·(−inf) where the student gives the token no mass
        b_kept = tl.where(alpha == 0.0, 0.0, alpha * b_old)
        b_log_r = tl.where(m_finite, b_kept + b_part, b_old)
        b_slope = tl.where(m_bound, alpha, 1.0)
        b_invalid = tl.where(m_finite, 0.0, 1.0)
    b_r = exp(b_log_r)

    m_high = (b_a > 0) & (b_r > 1.0 + clip_high)
    m_low = (b_a < 0) & (b_r < 1.0 - clip_low)
    b_used = tl.where(m_high, 1.0 + clip_high, tl.where(m_low, 1.0 - clip_low, b_r))
    b_loss = -b_a * b_used
    b_grad = tl.where(m_high | m_low | (b_slope == 0), 0.0, -b_a * b_r * b_slope)  # a slope of 0 also where r is inf
    if DUAL:
        m_dual = (b_a < 0) & (-dual_clip * b_a < b_loss)
        b_loss = tl.where(m_dual, -dual_clip * b_a, b_loss)
        b_grad = tl.where(m_dual, 0.0, b_grad)
    b_loss = tl.where(b_a == 0, 0.0, b_loss)  # also where r is inf
    b_grad = tl.where(b_a == 0, 0.0, b_grad)
    if ref_logp is not None:
        b_kl_ref, b_dk = _estimate(b_s - tl.load(ref_logp + o_n, mask=m_n, other=0.0), ESTIMATOR)
        b_loss += tl.where(kl_coef == 0, 0.0, kl_coef * b_kl_ref)  # a mere metric may be inf
        b_grad += tl.where(kl_coef == 0, 0.0, kl_coef * b_dk)

    tl.store(loss + o_n, b_loss, mask=m_n)
    tl.store(d_logp + o_n, b_grad, mask=m_n)
    p_row = metrics + o_n
    stride = N.to(tl.int64)
    tl.store(p_row, m_low.to(tl.float32), mask=m_n)
    tl.store(p_row + stride, m_high.to(tl.float32), mask=m_n)
    tl.store(p_row + 2 * stride, b_r, mask=m_n)
    tl.store(p_row + 3 * stride, b_old, mask=m_n)
    tl.store(p_row + 4 * stride, b_d, mask=m_n)
    tl.store(p_row + 5 * stride, b_kl_ref, mask=m_n)
    tl.store(p_row + 6 * stride, b_invalid, mask=m_n)


def clipped_ratio(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    teacher_logp: torch.Tensor | None,
    advantages: torch.Tensor,
    ref_logp: torch.Tensor | None,
    numbers: torch.Tensor,
    kl_estimator: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss (N,), d loss/d logp (N,), metrics (7, N) in the order of METRICS).

    `numbers`, on the CPU: alpha, clip_low, clip_high, teacher_clamp (inf is none), dual_clip (0 is none), kl_coef.
    """
    require_dtype(
        "clipped_ratio", logp=logp, old_logp=old_logp, teacher_logp=teacher_logp, advantages=advantages, ref_logp=ref_logp
    )
    alpha, clip_low, clip_high, teacher_clamp, dual_clip, kl_coef = numbers.tolist()
    if ref_logp is not None and kl_estimator not in ESTIMATORS:
        raise ValueError(f"clipped_ratio: kl_estimator={kl_estimator!r}, want one of {', '.join(ESTIMATORS)}")
    n = logp.numel()
    row = pick(TABLE, n)
    loss, d_logp = torch.empty_like(logp), torch.empty_like(logp)
    metrics = logp.new_empty((len(METRICS), n))
    launch(
        clipped_ratio_kernel,
        (triton.cdiv(n, dict(row.blocks)["BLOCK"]),),
        row,
        logp.contiguous(),
        old_logp.contiguous(),
        None if teacher_logp is None else teacher_logp.contiguous(),
        advantages.contiguous(),
        None if ref_logp is None else ref_logp.contiguous(),
        loss,
        d_logp,
        metrics,
        n,
        alpha,
        clip_low,
        clip_high,
        teacher_clamp,
        dual_clip,
        kl_coef,
        DUAL=dual_clip > 0,
        ESTIMATOR=kl_estimator if ref_logp is not None else "none",
    )
    return loss, d_logp, metrics


def cases() -> Iterator[Case]:
    plain = [(teacher, None, dual) for teacher in (False, True) for dual in (0.0, 3.0)]
    for teacher, estimator, dual in (*plain, *((True, name, 3.0) for name in ESTIMATORS)):
        numbers = torch.tensor([0.5, 0.2, 0.2, inf, dual, 0.1])
        tensors = (meta(R), meta(R), meta(R) if teacher else None, meta(R), meta(R) if estimator else None)
        yield Case(f"teacher={teacher} {estimator} dual={dual}", clipped_ratio, (*tensors, numbers, estimator or "k3"))


add_kernel(clipped_ratio_kernel, clipped_ratio, TABLE, cases, max_registers=40)
