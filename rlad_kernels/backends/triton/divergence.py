"""divergence_: a divergence between two rows of logits, and its gradient with respect to the first's raw logits.

With w = log p − log q every term is q·φ(w), φ ≥ 0, φ(0) = φ'(0) = 0, and u = ∂L/∂log q = q·g(w), g(0) = 0, up to a multiple of
q, which dL/dz = u − q·Σu does not see. Near w = 0 both come from series, so small divergences keep their relative accuracy.
"""

import torch
import triton
import triton.language as tl

from ._columns import load_raw
from ._launch import launch, require_dtype
from ._math import excess, exp_ulp, expm1, log1p, tanh_and_slope, tempered
from .configs import pick

# dz = u − q·Σu. Of the one column with more than half of q, where there is one, it is minus the sum of the others': 1 − q cancels.
DOMINANT = tl.constexpr(0.501)
FAMILIES = ("sym", "mix", "todi", "alpha_beta", "taid", "log_square", "total_variation")


@triton.jit
def _times(b_a, b_b):
    """a·b, 0 where either is 0 though the other may be infinite."""
    return tl.where((b_a == 0) | (b_b == 0), 0.0, b_a * b_b)


@triton.jit
def _power(b_log, s):
    """e^{s·log b}, 1 for s = 0 also where b = 0."""
    return exp_ulp(tl.where(s == 0, 0.0, b_log * s))


@triton.jit
def _mix(b_q, b_p, b_w, a, b, share_p, share_q):
    """a·KL(p‖m) + b·KL(q‖m), m = share_p·p + share_q·q."""
    m_up = b_w > 0
    b_share = tl.where(m_up, share_q, share_p)
    b_other = tl.where(m_up, share_p, share_q)
    b_down = -tl.abs(b_w)
    # log(other + share·e^down) = log(1 + share·(e^down − 1)): the second way near 1, the first where it would cancel
    b_near_one = b_share * expm1(b_down)
    b_l = tl.where(b_near_one > -0.5, log1p(b_near_one), tl.log(b_other + b_share * exp_ulp(b_down)))
    b_mu = tl.where(m_up, b_w + b_l, b_l)  # log(m/q)
    b_nu = tl.where(m_up, b_l, b_l - b_w)  # log(m/p)
    b_qmu = _times(b_q, b_mu)
    b_forward = tl.where(tl.abs(b_nu) < 1.0, b_p * excess(b_nu), (b_q - b_p) * share_q - _times(b_p, b_nu))
    b_reverse = tl.where(tl.abs(b_mu) < 1.0, b_q * excess(b_mu), (b_p - b_q) * share_p - b_qmu)
    b_value = tl.where(a == 0, 0.0, a * b_forward) + tl.where(b == 0, 0.0, b * b_reverse)
    b_u = tl.where(a == 0, 0.0, -a * share_q * b_q * expm1(-b_nu))
    return b_value, b_u - tl.where(b == 0, 0.0, b * (b_qmu + share_q * b_q * expm1(-b_mu)))


@triton.jit
def _alpha_beta(b_lq, b_lp, b_w, m_near, alpha, beta, s, inner, c_own, c_cross, c_base, c_slope, SWAP: tl.constexpr):
    """−1/(αβ)·[p^α·q^β − α/s·p^s − β/s·q^s], s = α + β, and its limits where one of α, β, s is 0; numbers of `_numbers`."""
    b_qs = _power(b_lq, s)
    b_ps = _power(b_lp, s)
    if SWAP:
        b_base, b_own, b_sw = b_ps, b_qs, -b_w
    else:
        b_base, b_own, b_sw = b_qs, b_ps, b_w
    b_lift = -beta * b_w
    m_safe = (tl.abs(b_lift) < 40.0) & (tl.abs(b_lp * s) < 40.0)
    b_cross = exp_ulp(tl.where(alpha == 0, 0.0, b_lp * alpha) + tl.where(beta == 0, 0.0, b_lq * beta))
    # one exponent of large terms would round where two of smaller ones need not
    b_cross = tl.where(m_safe, b_ps * exp_ulp(b_lift), b_cross)
    b_close = tl.where(c_own == 0, 0.0, excess(b_sw * s) * c_own) - tl.where(c_cross == 0, 0.0, excess(b_sw * inner) * c_cross)
    b_far = b_base * c_base + tl.where(c_own == 0, 0.0, b_own * c_own) - tl.where(c_cross == 0, 0.0, b_cross * c_cross)
    b_far -= tl.where(c_slope == 0, 0.0, _times(b_base, b_sw) * c_slope)
    b_far = tl.where((b_far == b_far) | (b_w != b_w), b_far, float("inf"))  # of powers that overflow the largest decides
    b_steep = tl.where(m_near, -_times(b_qs, expm1(b_w * alpha)), b_qs - b_cross) / tl.where(alpha == 0, 1.0, alpha)
    b_u = tl.where(alpha == 0, -_times(b_qs, b_w), b_steep)
    return tl.where(m_near, _times(b_base, b_close), b_far), b_u


def _numbers(family: str, a: float, b: float, c: float) -> tuple[float, ...]:
    """What a family's formula is written in, eight numbers, rounded to float32 once."""
    if family == "mix":
        return a, b, c, 1 - c, 0.0, 0.0, 0.0, 0.0
    if family != "alpha_beta":
        return a, b, c, 0.0, 0.0, 0.0, 0.0, 0.0
    inner, outer = sorted((a, b), key=abs)  # p and α change places with q and β in the value, so that α is the smaller one
    s = a + b
    own, cross = 1 / (outer * s) if s else 0.0, 1 / (inner * outer) if inner else 0.0
    base, slope = (1 / (inner * s), 0.0) if s and inner else (cross - own, own * s - cross * inner)
    return a, b, s, inner, own, cross, base, slope


@triton.jit
def _forward_kl(b_q, b_p, b_w):
    """(value, u) of KL(p‖q)."""
    m_near = tl.abs(b_w) < 1.0
    b_value = tl.where(m_near, b_p * excess(-b_w), b_q - b_p + _times(b_p, b_w))
    return b_value, tl.where(m_near, -b_q * (b_w + excess(b_w)), b_q - b_p)


@triton.jit
def _mixed(b_lq, b_lp, tau):
    """log q^{1−τ}·p^τ, TAID's target before it is normalised."""
    return (1.0 - tau) * b_lq + tau * b_lp


@triton.jit
def _tilt(b_lq, b_lp, tau):
    """q·(e^{τw} − 1): TAID's p_τ ∝ q^{1−τ}·p^τ sums to 1 + Σ of it."""
    m_dead = (b_lq == -float("inf")) & (b_lp == -float("inf"))
    b_w = tau * (tl.where(m_dead, 0.0, b_lp) - tl.where(m_dead, 0.0, b_lq))
    b_q = exp_ulp(b_lq)
    b_far = exp_ulp(_mixed(b_lq, b_lp, tau)) - b_q
    return tl.where(m_dead, 0.0, tl.where(tl.abs(b_w) < 1.0, b_q * (b_w + excess(b_w)), b_far))


@triton.jit
def _part(b_lq, b_lp, forward, reverse, n0, n1, n2, n3, n4, n5, n6, n7, FAMILY: tl.constexpr, SWAP: tl.constexpr):
    """(value, u, q) of one block of columns; a column without mass on either side has no part in anything."""
    m_dead = (b_lq == -float("inf")) & (b_lp == -float("inf"))
    b_lq = tl.where(m_dead, 0.0, b_lq)
    b_lp = tl.where(m_dead, 0.0, b_lp)
    b_q = exp_ulp(b_lq)
    b_p = exp_ulp(b_lp)
    b_w = b_lp - b_lq
    m_near = tl.abs(b_w) < 1.0
    b_grown = b_w + excess(b_w)  # e^w − 1 where near
    if FAMILY == "sym":
        b_qw = _times(b_q, b_w)
        b_forward, b_steep = _forward_kl(b_q, b_p, b_w)
        b_reverse = tl.where(m_near, b_q * excess(b_w), b_p - b_q - b_qw)
        b_value = tl.where(forward == 0, 0.0, forward * b_forward) + tl.where(reverse == 0, 0.0, reverse * b_reverse)
        b_u = tl.where(forward == 0, 0.0, forward * b_steep) - tl.where(reverse == 0, 0.0, reverse * b_qw)
    elif FAMILY == "mix":
        b_value, b_u = _mix(b_q, b_p, b_w, n0, n1, n2, n3)
    elif FAMILY == "todi":
        b_t = tanh_and_slope(b_w * (0.5 * n0))[0]
        b_sigma = 0.5 * (1.0 + b_t)
        b_other = 0.5 * (1.0 - b_t)
        b_gap = tl.where(m_near, b_q * b_grown, b_p - b_q)
        b_value = _times(0.5 * (b_gap + b_t * (b_p + b_q)), b_w)
        b_far = _times(b_other * b_q, 1.0 - b_w) - b_sigma * b_p
        b_u = tl.where(m_near, b_q * (-b_sigma * b_grown - b_t - b_other * b_w), b_far)
    elif FAMILY == "alpha_beta":
        b_value, b_u = _alpha_beta(b_lq, b_lp, b_w, m_near, n0, n1, n2, n3, n4, n5, n6, n7, SWAP)
    elif FAMILY == "taid":  # n1 + n2 = log Σq^{1−τ}·p^τ
        b_target = (_mixed(b_lq, b_lp, n0) - n2) - n1
        b_apart = tl.where(b_target == b_lq, 0.0, b_target - b_lq)
        b_value, b_u = _forward_kl(b_q, exp_ulp(b_target), tl.where(n3 != 0, b_apart, n0 * b_w - n1))
    elif FAMILY == "log_square":
        b_value = 0.5 * b_w * b_w
        b_u = -b_w
    else:
        b_gap = tl.where(m_near, b_q * b_grown, b_p - b_q)
        b_value = 0.5 * tl.abs(b_gap)
        b_u = tl.where(b_w > 0, -0.5 * b_q, tl.where(b_w < 0, 0.5 * b_q, b_w))
    return tl.where(m_dead, 0.0, b_value), tl.where(m_dead, 0.0, b_u), tl.where(m_dead, 0.0, b_q)


@triton.jit
def _log_probs(p_x, p_bias, o_c, C, scale, softcap, it, top, log_total, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """(log-probs, dz/draw) of one block of columns; −inf beyond the last."""
    b_z, b_slope = tempered(load_raw(p_x, p_bias, o_c, o_c < C, MASKED), scale, softcap, it, SOFTCAP)
    b_lp = (b_z - top) - log_total
    return (tl.where(o_c < C, b_lp, -float("inf")) if MASKED else b_lp), b_slope


@triton.jit
def _add(b_sum, b_x):
    """Running sums of a block, each over some neighbouring columns: fewer registers than one of every column."""
    return b_sum + tl.sum(tl.reshape(b_x, [b_sum.shape[0], b_x.shape[0] // b_sum.shape[0]]), 1)


@triton.jit
def _sum_step(
    p_x, p_bias, p_y, p_teacher_bias, o_c, C, scale, softcap, it, top_q, log_q, t_scale, t_softcap, t_it, top_p, log_p,
    forward, reverse, n0, n1, n2, n3, n4, n5, n6, n7, b_value, b_total, b_other_u, b_other_q,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, FAMILY: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Add one block of columns to Σ value and Σ u, and to Σ u and Σ q of all columns but the dominant one."""
    b_lq, _ = _log_probs(p_x, p_bias, o_c, C, scale, softcap, it, top_q, log_q, MASKED, SOFTCAP)
    b_lp, _ = _log_probs(p_y, p_teacher_bias, o_c, C, t_scale, t_softcap, t_it, top_p, log_p, MASKED, TEACHER_SOFTCAP)
    b_v, b_u, b_q = _part(b_lq, b_lp, forward, reverse, n0, n1, n2, n3, n4, n5, n6, n7, FAMILY, SWAP)
    b_other_u = _add(b_other_u, tl.where(b_q > DOMINANT, 0.0, b_u))
    b_other_q = _add(b_other_q, tl.where(b_q > DOMINANT, 0.0, b_q))
    return _add(b_value, b_v), _add(b_total, b_u), b_other_u, b_other_q


@triton.jit
def _grad_step(
    p_out, p_x, p_bias, p_y, p_teacher_bias, o_c, C, scale, softcap, it, top_q, log_q, t_scale, t_softcap, t_it, top_p, log_p,
    forward, reverse, n0, n1, n2, n3, n4, n5, n6, n7, total, most, weight,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, FAMILY: tl.constexpr, SWAP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Write or add weight·(u − q·Σu)·dz/draw of one block of columns."""
    b_lq, b_slope = _log_probs(p_x, p_bias, o_c, C, scale, softcap, it, top_q, log_q, MASKED, SOFTCAP)
    b_lp, _ = _log_probs(p_y, p_teacher_bias, o_c, C, t_scale, t_softcap, t_it, top_p, log_p, MASKED, TEACHER_SOFTCAP)
    _, b_u, b_q = _part(b_lq, b_lp, forward, reverse, n0, n1, n2, n3, n4, n5, n6, n7, FAMILY, SWAP)
    b_g = tl.where(weight == 0, 0.0, tl.where(b_q > DOMINANT, most, b_u - b_q * total) * weight * b_slope)
    if MASKED:
        if ACCUMULATE:
            b_g += tl.load(p_out + o_c, mask=o_c < C, other=0.0)
        tl.store(p_out + o_c, b_g, mask=o_c < C)
    else:
        if ACCUMULATE:
            b_g += tl.load(p_out + o_c)
        tl.store(p_out + o_c, b_g)


@triton.jit
def divergence_kernel(
    value, out, stride_o, logits, stride_x, C, bias, inv_temp, logit_scale, softcap, norm, stride_n, teacher, stride_y,
    teacher_bias, teacher_inv_temp, teacher_scale, teacher_softcap, teacher_norm, stride_t, rows, stride_r, n0, n1, n2,
    n3, n4, n5, n6, n7,
    FAMILY: tl.constexpr, SWAP: tl.constexpr, SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, GRAD: tl.constexpr,
    ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """value = rows[0]·Σ term, and with GRAD out = rows[1]·(u − q·Σu)·dz/draw, which may take the logits' place."""
    i_r = tl.program_id(0).to(tl.int64)
    p_x = logits + i_r * stride_x
    p_y = teacher + i_r * stride_y
    it = tl.load(inv_temp + i_r)
    t_it = tl.load(teacher_inv_temp + i_r)
    top_q = tl.load(norm + i_r)
    log_q = tl.load(norm + stride_n + i_r)
    top_p = tl.load(teacher_norm + i_r)
    log_p = tl.load(teacher_norm + stride_t + i_r)
    weight = tl.load(rows + i_r)
    forward = tl.load(rows + 2 * stride_r + i_r)
    reverse = tl.load(rows + 3 * stride_r + i_r)
    o_b = tl.arange(0, BLOCK)

    if FAMILY == "taid":
        # log Σq^{1−τ}·p^τ = log(1 + Σ tilt), exact for close models; from its largest term where the sum is far below 1
        b_tilt = tl.zeros([BLOCK], tl.float32)
        b_top = tl.full([BLOCK], -float("inf"), tl.float32)
        for c0 in range(0, C, BLOCK):
            o_c = c0 + o_b
            b_lq, _ = _log_probs(p_x, bias, o_c, C, logit_scale, softcap, it, top_q, log_q, True, SOFTCAP)
            b_lp, _ = _log_probs(
                p_y, teacher_bias, o_c, C, teacher_scale, teacher_softcap, t_it, top_p, log_p, True, TEACHER_SOFTCAP)  # fmt: skip
            b_tilt += _tilt(b_lq, b_lp, n0)
            b_top = tl.maximum(b_top, _mixed(b_lq, b_lp, n0))
        tilt = tl.sum(b_tilt, 0)
        n1 = log1p(tilt)
        n2 = 0.0
        n3 = 0.0
        if tilt < -0.5:
            n2 = tl.max(b_top, 0)
            n3 = 1.0
            b_sum = tl.zeros([BLOCK], tl.float32)
            for c0 in range(0, C, BLOCK):
                o_c = c0 + o_b
                b_lq, _ = _log_probs(p_x, bias, o_c, C, logit_scale, softcap, it, top_q, log_q, True, SOFTCAP)
                b_lp, _ = _log_probs(
                    p_y, teacher_bias, o_c, C, teacher_scale, teacher_softcap, t_it, top_p, log_p, True, TEACHER_SOFTCAP
                )
                b_sum += exp_ulp(_mixed(b_lq, b_lp, n0) - n2)
            n1 = tl.log(tl.sum(b_sum, 0))

    b_value = tl.zeros([BLOCK // 4], tl.float32)
    b_total = tl.zeros([BLOCK // 4], tl.float32)
    b_other_u = tl.zeros([BLOCK // 4], tl.float32)
    b_other_q = tl.zeros([BLOCK // 4], tl.float32)
    # full blocks without a mask: an odd C would otherwise cost every load its width
    full = C // BLOCK * BLOCK
    for c0 in range(0, full, BLOCK):
        b_value, b_total, b_other_u, b_other_q = _sum_step(
            p_x, bias, p_y, teacher_bias, c0 + o_b, C, logit_scale, softcap, it, top_q, log_q, teacher_scale, teacher_softcap,
            t_it, top_p, log_p, forward, reverse, n0, n1, n2, n3, n4, n5, n6, n7, b_value, b_total, b_other_u,
            b_other_q, False, SOFTCAP, TEACHER_SOFTCAP, FAMILY, SWAP)  # fmt: skip
    if full < C:
        b_value, b_total, b_other_u, b_other_q = _sum_step(
            p_x, bias, p_y, teacher_bias, full + o_b, C, logit_scale, softcap, it, top_q, log_q, teacher_scale, teacher_softcap,
            t_it, top_p, log_p, forward, reverse, n0, n1, n2, n3, n4, n5, n6, n7, b_value, b_total, b_other_u,
            b_other_q, True, SOFTCAP, TEACHER_SOFTCAP, FAMILY, SWAP)  # fmt: skip
    whole = tl.sum(b_value, 0)
    total = tl.sum(b_total, 0)
    if FAMILY == "taid":  # no column has mass on both sides: there is no p_τ
        whole = tl.where(n2 == -float("inf"), float("inf"), whole)
    found = tl.where(weight == 0, 0.0, weight * whole)
    if ACCUMULATE:
        found += tl.load(value + i_r)
    tl.store(value + i_r, found)

    if GRAD:
        p_o = out + i_r * stride_o
        # an infinite divergence without a finite gradient sends none; NaN logits still show
        pull = tl.where((whole == whole) & ~(tl.abs(total) < float("inf")), 0.0, tl.load(rows + stride_r + i_r))
        most = total * tl.sum(b_other_q, 0) - tl.sum(b_other_u, 0)
        for c0 in range(0, full, BLOCK):
            _grad_step(
                p_o, p_x, bias, p_y, teacher_bias, c0 + o_b, C, logit_scale, softcap, it, top_q, log_q, teacher_scale,
                teacher_softcap, t_it, top_p, log_p, forward, reverse, n0, n1, n2, n3, n4, n5, n6, n7, total, most, pull,
                False, SOFTCAP, TEACHER_SOFTCAP, FAMILY, SWAP, ACCUMULATE)  # fmt: skip
        if full < C:
            _grad_step(
                p_o, p_x, bias, p_y, teacher_bias, full + o_b, C, logit_scale, softcap, it, top_q, log_q, teacher_scale,
                teacher_softcap, t_it, top_p, log_p, forward, reverse, n0, n1, n2, n3, n4, n5, n6, n7, total, most, pull,
                True, SOFTCAP, TEACHER_SOFTCAP, FAMILY, SWAP, ACCUMULATE)  # fmt: skip


def divergence_(
    value: torch.Tensor, out: torch.Tensor | None, logits: torch.Tensor, bias: torch.Tensor | None, inv_temp: torch.Tensor,
    logit_scale: float, softcap: float, norm: torch.Tensor, teacher: torch.Tensor, teacher_bias: torch.Tensor | None,
    teacher_inv_temp: torch.Tensor, teacher_scale: float, teacher_softcap: float, teacher_norm: torch.Tensor, rows: torch.Tensor,
    family: str, a: float, b: float, c: float, accumulate: bool,
) -> None:  # fmt: skip
    """Write (or add) each row's weighted divergence into `value (R,)` and its gradient into `out (R, V)`, which may be `logits`.

    `norm (2, R)` = (max z, lse − max); `rows (4, R)`: weight of the value, weight of the gradient, and the coefficients of
    forward and reverse KL in the family "sym". `a, b, c` are the family's numbers.
    """
    require_dtype("divergence_", value=value, out=out, logits=logits, bias=bias, inv_temp=inv_temp, norm=norm)
    require_dtype("divergence_", teacher=teacher, teacher_bias=teacher_bias, teacher_norm=teacher_norm, rows=rows)
    if family not in FAMILIES:
        raise ValueError(f"divergence_: family must be one of {FAMILIES}, got {family!r}")
    n_rows, cols = logits.shape
    launch(
        divergence_kernel, (n_rows,), pick("divergence_kernel", cols),
        value, out, 0 if out is None else out.stride(0), logits, logits.stride(0), cols, bias, inv_temp.contiguous(), logit_scale,
        softcap, norm, norm.stride(0), teacher, teacher.stride(0), teacher_bias, teacher_inv_temp.contiguous(), teacher_scale,
        teacher_softcap, teacher_norm, teacher_norm.stride(0), rows, rows.stride(0), *_numbers(family, a, b, c),
        FAMILY=family, SWAP=abs(b) < abs(a), SOFTCAP=softcap > 0,
        TEACHER_SOFTCAP=teacher_softcap > 0, GRAD=out is not None, ACCUMULATE=accumulate,
    )  # fmt: skip
