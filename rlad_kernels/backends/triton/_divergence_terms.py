"""The families of divergences, column by column: the term, and its derivative u with respect to log q.

With w = log p − log q every term is q·φ(w), φ ≥ 0, φ(0) = φ'(0) = 0, and u = ∂L/∂log q = q·g(w), g(0) = 0, up to a multiple of
q, which dL/dz = u − q·Σu does not see. Near w = 0 both come from series, so small divergences keep their relative accuracy.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._math import excess, excess_near, exp_and_expm1, exp_ulp, expm1, log1p_near, tanh_and_slope

FAMILIES = ("sym", "mix", "todi", "alpha_beta", "taid_norm", "taid", "log_square", "total_variation")


class Masses(NamedTuple):
    """p, q and p − q of a block of columns, and the smaller of p, q over the larger, e^{−|w|}."""

    p: tl.tensor
    q: tl.tensor
    gap: tl.tensor
    e: tl.tensor
    below: tl.tensor  # e − 1


class Term(NamedTuple):
    """What a row's term is: weights of forward and reverse KL in the family "sym", a normaliser in "taid", and `numbers`."""

    forward: tl.tensor
    reverse: tl.tensor
    n0: tl.tensor
    n1: tl.tensor
    n2: tl.tensor
    n3: tl.tensor
    n4: tl.tensor
    n5: tl.tensor
    n6: tl.tensor
    n7: tl.tensor


@triton.jit
def _times(b_a, b_b):
    """a·b, 0 where either is 0 though the other may be infinite."""
    return tl.where((b_a == 0) | (b_b == 0), 0.0, b_a * b_b)


@triton.jit
def _power(b_log, s):
    """e^{s·log b}, 1 for s = 0 also where b = 0."""
    return exp_ulp(tl.where(s == 0, 0.0, b_log * s))


@triton.jit
def _masses(b_lq, b_lp, b_w):
    """Two exponentials: the larger mass, and what the smaller one is of it."""
    m_up = b_w > 0
    b_large = exp_ulp(tl.where(m_up, b_lp, b_lq))
    b_e, b_below = exp_and_expm1(-tl.abs(b_w))
    b_small = b_large * b_e
    b_gap = b_large * b_below
    return Masses(tl.where(m_up, b_large, b_small), tl.where(m_up, b_small, b_large), tl.where(m_up, -b_gap, b_gap), b_e, b_below)


@triton.jit
def _mix(x, b_w, a, b, share_p, share_q):
    """a·KL(p‖m) + b·KL(q‖m), m = share_p·p + share_q·q."""
    m_up = b_w > 0
    b_share = tl.where(m_up, share_q, share_p)
    # m over the larger of p, q is 1 + share·(e − 1) = other + share·e: the second way far from 1, where the first would cancel
    b_near_one = b_share * x.below
    m_close = b_near_one > -0.5
    b_m = tl.where(m_close, 1.0 + b_near_one, tl.where(m_up, share_p, share_q) + b_share * x.e)
    b_l = tl.where(m_close, log1p_near(b_near_one), tl.log(b_m))
    b_mu = tl.where(m_up, b_w + b_l, b_l)  # log(m/q)
    b_nu = tl.where(m_up, b_l, b_l - b_w)  # log(m/p)
    b_qmu = _times(x.q, b_mu)
    b_forward = tl.where(tl.abs(b_nu) < 1.0, x.p * excess_near(b_nu), -share_q * x.gap - _times(x.p, b_nu))
    b_reverse = tl.where(tl.abs(b_mu) < 1.0, x.q * excess_near(b_mu), share_p * x.gap - b_qmu)
    b_value = tl.where(a == 0, 0.0, a * b_forward) + tl.where(b == 0, 0.0, b * b_reverse)
    # q·(p − m)/m = share_q·q·(p − q)/m, and q·(q − m)/m = −share_p·q·(p − q)/m
    b_tilt = share_q * x.q * (tl.where(m_up, -x.below, x.below) / b_m)
    return b_value, tl.where(a == 0, 0.0, -a * share_q * b_tilt) - tl.where(b == 0, 0.0, b * (b_qmu - share_p * b_tilt))


@triton.jit
def _alpha_beta(b_lq, b_lp, b_w, m_near, t, SWAP: tl.constexpr):
    """−1/(αβ)·[p^α·q^β − α/s·p^s − β/s·q^s], s = α + β, and its limits where one of α, β, s is 0."""
    alpha, beta, s, inner = t.n0, t.n1, t.n2, t.n3
    c_own, c_cross, c_base, c_slope = t.n4, t.n5, t.n6, t.n7
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


def numbers(family: str, a: float, b: float, c: float) -> tuple[float, ...]:
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
    b_value = tl.where(m_near, b_p * excess_near(-b_w), b_q - b_p + _times(b_p, b_w))
    return b_value, tl.where(m_near, -b_q * (b_w + excess_near(b_w)), b_q - b_p)


@triton.jit
def mixed(b_lq, b_lp, tau):
    """log q^{1−τ}·p^τ, TAID's target before it is normalised."""
    return (1.0 - tau) * b_lq + tau * b_lp


@triton.jit
def tilt(b_lq, b_lp, tau):
    """q·(e^{τw} − 1): TAID's p_τ ∝ q^{1−τ}·p^τ sums to 1 + Σ of it."""
    m_dead = (b_lq == -float("inf")) & (b_lp == -float("inf"))
    b_w = tau * (tl.where(m_dead, 0.0, b_lp) - tl.where(m_dead, 0.0, b_lq))
    b_q = exp_ulp(b_lq)
    b_far = exp_ulp(mixed(b_lq, b_lp, tau)) - b_q
    return tl.where(m_dead, 0.0, tl.where(tl.abs(b_w) < 1.0, b_q * (b_w + excess_near(b_w)), b_far))


@triton.jit
def part(b_lq, b_lp, t, FAMILY: tl.constexpr, SWAP: tl.constexpr):
    """(value, u, q) of one block of columns; a column without mass on either side has no part in anything."""
    m_dead = (b_lq == -float("inf")) & (b_lp == -float("inf"))
    b_lq = tl.where(m_dead, 0.0, b_lq)
    b_lp = tl.where(m_dead, 0.0, b_lp)
    b_w = b_lp - b_lq
    m_near = tl.abs(b_w) < 1.0
    if FAMILY == "alpha_beta" or FAMILY == "taid" or FAMILY == "log_square":
        b_q = exp_ulp(b_lq)
    else:
        x = _masses(b_lq, b_lp, b_w)
        b_q = x.q
    if FAMILY == "sym":
        b_qw = _times(b_q, b_w)
        b_forward = tl.where(m_near, x.p * excess_near(-b_w), _times(x.p, b_w) - x.gap)
        b_reverse = tl.where(m_near, x.gap * b_w - b_forward, x.gap - b_qw)  # both are of second order, and add up to gap·w
        b_value = tl.where(t.forward == 0, 0.0, t.forward * b_forward) + tl.where(t.reverse == 0, 0.0, t.reverse * b_reverse)
        b_u = -tl.where(t.forward == 0, 0.0, t.forward * x.gap) - tl.where(t.reverse == 0, 0.0, t.reverse * b_qw)
    elif FAMILY == "mix":
        b_value, b_u = _mix(x, b_w, t.n0, t.n1, t.n2, t.n3)
    elif FAMILY == "todi":
        b_t = tanh_and_slope(b_w * (0.5 * t.n0))[0]
        b_sigma = 0.5 * (1.0 + b_t)
        b_other = 0.5 * (1.0 - b_t)
        b_value = _times(0.5 * (x.gap + b_t * (x.p + b_q)), b_w)
        b_far = _times(b_other * b_q, 1.0 - b_w) - b_sigma * x.p
        b_u = tl.where(m_near, -b_sigma * x.gap - b_q * (b_t + b_other * b_w), b_far)
    elif FAMILY == "alpha_beta":
        b_value, b_u = _alpha_beta(b_lq, b_lp, b_w, m_near, t, SWAP)
    elif FAMILY == "taid":  # forward + reverse = log Σq^{1−τ}·p^τ, and reverse ≠ 0 where that is far below 0
        b_target = (mixed(b_lq, b_lp, t.n0) - t.reverse) - t.forward
        b_apart = tl.where(b_target == b_lq, 0.0, b_target - b_lq)
        b_value, b_u = _forward_kl(b_q, exp_ulp(b_target), tl.where(t.reverse != 0, b_apart, t.n0 * b_w - t.forward))
    elif FAMILY == "log_square":
        b_value = 0.5 * b_w * b_w
        b_u = -b_w
    else:
        b_value = 0.5 * tl.abs(x.gap)
        b_u = tl.where(b_w > 0, -0.5 * b_q, tl.where(b_w < 0, 0.5 * b_q, b_w))
    return tl.where(m_dead, 0.0, b_value), tl.where(m_dead, 0.0, b_u), tl.where(m_dead, 0.0, b_q)
