"""Arithmetic shared by the kernels: temperature and softcap, safe exponents, accurate expm1/log1p, and the one cast."""

import os
from typing import NamedTuple

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite stand-in for -inf: differences with it never become NaN
NO_KEY = tl.constexpr(-(2**31))  # below the key of every float32, -inf included


class Tempering(NamedTuple):
    """What makes tempered logits z of raw ones."""

    logit_scale: tl.tensor
    softcap: tl.tensor | None
    inv_temp: tl.tensor


@triton.jit
def cast(b_x, DTYPE: tl.constexpr):
    """float32 → DTYPE, rounding to nearest even everywhere (the interpreter truncates bfloat16, and garbles subnormals)."""
    if INTERPRET and DTYPE == tl.bfloat16:  # noqa: SIM300
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_even = b_bits + 0x7FFF + ((b_bits >> 16) & 1)
        b_bits = tl.where(b_x == b_x, b_even, b_bits | 0x400000)  # a carry must not turn NaN into a number
        return (b_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(DTYPE)


@triton.jit
def tanh_and_slope(b_x):
    """(tanh x, 1 − tanh² x), both to a few ulp of their own size, and finite for x = ±inf."""
    b_e = tl.exp(-2.0 * tl.abs(b_x))
    b_large = (1.0 - b_e) / (1.0 + b_e)
    b_large = tl.where(b_x < 0, -b_large, b_large)
    b_u = b_x * b_x
    # minimax for (tanh x − x)/x³ on |x| ≤ 0.625; the quotient above would lose all digits as x → 0
    b_q = -0.3333328068256378 + b_u * (
        0.13331441581249237 + b_u * (-0.05373971164226532 + b_u * (0.020639074966311455 - b_u * 0.005704974289983511))
    )
    b_tanh = tl.where(tl.abs(b_x) < 0.625, b_x + b_x * b_u * b_q, b_large)
    return b_tanh, 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))


@triton.jit
def product(b_x, b_y):
    """x·y as a number of its own, that no use of it contracts: a fused x·y − m would see another logit than the one stored."""
    if INTERPRET:
        return b_x * b_y
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [b_x, b_y], tl.float32, is_pure=True, pack=1)


@triton.jit
def tempered(b_raw, t):
    """(z, dz/draw): z = softcap·tanh(raw·scale/softcap)·inv_temp, without the tanh where softcap is None."""
    if t.softcap is not None:
        b_tanh, b_slope = tanh_and_slope(b_raw * (t.logit_scale / t.softcap))
        return product(b_tanh * t.softcap, t.inv_temp), b_slope * (t.logit_scale * t.inv_temp)
    else:
        # two products, as the definition has them: one combined factor would move z by an ulp of |z|
        return product(b_raw * t.logit_scale, t.inv_temp), t.logit_scale * t.inv_temp


@triton.jit
def bounded(b_gap):
    """An exponent ≤ 0 kept finite: exp is 0 well above the bound, and gap·exp(gap) then never is inf·0. NaN passes."""
    return tl.maximum(b_gap, -1e4, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp(b_x):
    """e^x whose relative error does not grow with |x|: tl.exp drops the rounding of x·log₂e, here it is put back."""
    if INTERPRET:
        return tl.exp(b_x)
    else:
        b_y = b_x * 1.4426950408889634
        b_lost = tl.fma(b_x, 1.4426950408889634, -b_y) + b_x * 1.9259630335e-8  # second term: log₂e beyond float32
        b_e = tl.exp2(b_y)
        return tl.where(tl.abs(b_x) < 88.0, b_e + b_e * (b_lost * 0.6931471805599453), b_e)


@triton.jit
def _exp_parts(b_x):
    """(2^n, p) with e^x = 2^n·(1 + p), |x| ≤ 87; p keeps its relative accuracy as x → 0."""
    b_n = tl.floor(b_x * 1.4426950408889634 + 0.5)
    b_r = (b_x - b_n * 0.693359375) - b_n * -2.12194440e-4  # ln 2 in two parts, the first short enough that n times it is exact
    # minimax for (e^r − 1 − r)/r² on |r| ≤ ln 2 / 2
    b_s = 0.008363144472241402 + b_r * 0.0013901286292821169
    b_s = 0.04166685417294502 + b_r * b_s
    b_s = 0.16666577756404877 + b_r * b_s
    b_s = 0.5 + b_r * b_s
    return ((b_n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True), b_r + b_r * b_r * b_s


@triton.jit
def exp_ulp(b_x):
    """e^x to about an ulp of itself, where :func:`exp` keeps the two or three of the hardware's exp2."""
    m_in = tl.abs(b_x) < 87.0
    b_power, b_p = _exp_parts(tl.where(m_in, b_x, 0.0))
    return tl.where(m_in, b_power + b_power * b_p, tl.exp(b_x))


@triton.jit
def exp_and_expm1(b_x):
    """(e^x, e^x − 1) for x ≤ 0, each to about an ulp of itself: they share all of their work."""
    m_in = b_x > -87.0
    b_power, b_p = _exp_parts(tl.where(m_in, b_x, 0.0))
    b_e = tl.where(m_in, b_power + b_power * b_p, tl.exp(b_x))
    return b_e, tl.where(m_in, b_power * b_p + (b_power - 1.0), b_e - 1.0)


@triton.jit
def excess_near(b_w):
    """e^w − w − 1 for |w| < 1, to a few ulp of its own size also as w → 0; minimax for its quotient by w²."""
    b_s = 2.535482963139657e-05 + b_w * 2.77228332379309e-06
    b_s = 0.0001984402333619073 + b_w * b_s
    b_s = 0.001388545148074627 + b_w * b_s
    b_s = 0.00833331048488617 + b_w * b_s
    b_s = 0.04166673496365547 + b_w * b_s
    b_s = 0.1666666716337204 + b_w * b_s
    b_s = 0.5 + b_w * b_s
    return b_w * b_w * b_s


@triton.jit
def excess(b_w):
    """e^w − w − 1, to a few ulp of its own size also as w → 0."""
    return tl.where(tl.abs(b_w) < 1.0, excess_near(b_w), exp(b_w) - b_w - 1.0)


@triton.jit
def expm1(b_w):
    """e^w − 1, to a few ulp of its own size also as w → 0."""
    return tl.where(tl.abs(b_w) < 1.0, b_w + excess_near(b_w), exp(b_w) - 1.0)


@triton.jit
def log1p_near(b_u):
    """log(1 + u) for |u| ≤ ½, to a few ulp of its own size also as u → 0: 2·atanh s, minimax for (atanh s / s − 1)/s²."""
    b_s = b_u / (2.0 + b_u)
    b_t = b_s * b_s
    b_p = 0.14117521047592163 + b_t * 0.13430511951446533
    b_p = 0.2000381350517273 + b_t * b_p
    b_p = 0.33333319425582886 + b_t * b_p
    return 2.0 * b_s * (1.0 + b_t * b_p)


@triton.jit
def log1p(b_u):
    """log(1 + u) for u > −1, to a few ulp of its own size also as u → 0."""
    return tl.where(tl.abs(b_u) < 0.5, log1p_near(b_u), tl.log(1.0 + b_u))


@triton.jit
def ordered(b_z):
    """int32 keys in the order of the floats: −0 = +0, NaN on top, every key above NO_KEY."""
    b_i = tl.where(b_z == 0, 0.0, b_z).to(tl.int32, bitcast=True)
    b_key = tl.where(b_i >= 0, b_i, b_i ^ 0x7FFFFFFF)
    return tl.where(b_z == b_z, b_key, 0x7FFFFFFF)
