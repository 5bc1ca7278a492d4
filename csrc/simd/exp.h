// exp, tanh and tempering of raw logits, lane by lane.

namespace rlad::RLAD_ISA {

// Arguments of exp are held inside these bounds: below, the result is 0 (float32 results never go subnormal, which would be
// slow); above, it saturates to a finite number, so that a weight of 0 times it is 0.
template <class T>
constexpr T kExpLow = -746;
template <>
constexpr float kExpLow<float> = -87.33f;
template <class T>
constexpr T kExpHigh = 709;
template <>
constexpr float kExpHigh<float> = 88.0f;

// For x that is no larger than a rounding above 0.
template <class T>
RLAD_INLINE Vec<T> clamp_low(Vec<T> x) {
  const Vec<T> low = splat(kExpLow<T>);
  return low > x ? low : x;  // in this order NaN stays, and x86's max does it in one instruction
}

template <class T>
RLAD_INLINE Vec<T> clamp_exp(Vec<T> x) {
  const Vec<T> high = splat(kExpHigh<T>);
  x = clamp_low<T>(x);
  return high < x ? high : x;
}

struct Power {
  Vec<float> u, p;  // eˣ = u·(1 + p), u a power of two
};

// x = n·ln2 + r, |r| ≤ ln2/2, p = eʳ − 1 = r + r²·q(r). q: minimax fit of eʳ, relative error 3e-9 before rounding.
RLAD_INLINE Power reduce(Vec<float> x) {
  constexpr float kShift = 12582912.0f + 127.0f;  // 1.5·2²³: rounds to an integer; +127: leaves u's exponent in the low bits
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 1.42860682e-6f;  // high part short enough that n·high is exact
  const Vec<float> t = x * 1.44269504f + kShift;
  const Vec<float> n = t - kShift;
  const Vec<float> r = (x - n * kLn2High) - n * kLn2Low;
  Vec<float> q = r * 0x1.6a4ecep-10f + 0x1.12399cp-7f;
  q = q * r + 0x1.5558bp-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  return {(Vec<float>)((Simd<float>::U)t << 23), (q * r + 1.0f) * r};
}

// eˣ for x from clamp_exp.
RLAD_INLINE Vec<float> exp_clamped(Vec<float> x) {
  const Power e = reduce(x);
  return x == kExpLow<float> ? Vec<float>{} : e.p * e.u + e.u;
}

RLAD_INLINE Vec<double> exp_clamped(Vec<double> x) {
  Vec<double> e{};
  for (int l = 0; l < kLanes<double>; ++l) e[l] = std::exp(x[l]);
  return e;
}

// e^x for x no larger than a rounding above 0, also −inf.
RLAD_INLINE Vec<float> exp_log(Vec<float> x) {
  const Power e = reduce(x);
  return x < kExpLow<float> ? Vec<float>{} : e.p * e.u + e.u;
}

RLAD_INLINE Vec<double> exp_log(Vec<double> x) { return exp_clamped(x); }

// e^x − 1 and e^x for x ≤ 0 from clamp_low; the least e^x is not 0 but next to it.
RLAD_INLINE void expm1_nonpositive(Vec<float> x, Vec<float>& em1, Vec<float>& ex) {
  const Power e = reduce(x);
  em1 = e.p * e.u + (e.u - 1.0f);
  ex = e.p * e.u + e.u;
}

RLAD_INLINE void expm1_nonpositive(Vec<double> x, Vec<double>& em1, Vec<double>& ex) {
  for (int l = 0; l < kLanes<double>; ++l) em1[l] = std::expm1(x[l]), ex[l] = std::exp(x[l]);
}

// With E = e^(−2|y|): tanh|y| = −(E − 1)/(E + 1), 1 − tanh² = 4E/(E + 1)²; both to a few ulps relative, also near 0.
template <class T>
RLAD_INLINE Vec<T> tanh(Vec<T> y, Vec<T>& one_minus_square) {
  using U = typename Simd<T>::U;
  const U sign_bit = (U)splat<T>(T(-0.0));
  const Vec<T> magnitude = (Vec<T>)((U)y & ~sign_bit);
  Vec<T> em1, ex;
  expm1_nonpositive(clamp_low<T>(magnitude * T(-2)), em1, ex);
  const Vec<T> d = em1 + T(2);
  one_minus_square = ex * T(4) / (d * d);
  return (Vec<T>)(((U)(em1 / d) & ~sign_bit) | ((U)y & sign_bit));
}

// x as a number of its own: no use of it may contract the product that it comes from. GCC contracts across statements, and
// dlogits and the divergences would then see other logits than the fold has stored.
template <class T>
RLAD_INLINE Vec<T> rounded(Vec<T> x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));  // keeps x in its register, and the compiler in the dark about where it comes from
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// z of a row: raw·post, or tanh(raw·pre)·post under a soft cap; dz/draw = slope·(1 − tanh²).
template <class T>
struct Temper {
  T pre, post, slope;
  Temper(const Tile<T>& tile, int64_t row) {
    const double inv_temp = tile.inv_temp[row];
    slope = T(tile.logit_scale * inv_temp);
    pre = T(tile.softcap > 0 ? tile.logit_scale / tile.softcap : 1);
    post = tile.softcap > 0 ? T(tile.softcap * inv_temp) : slope;
  }
};

template <bool CAP, class T>
RLAD_INLINE Vec<T> temper(Vec<T> raw, const Temper<T>& c, Vec<T>& slope) {
  if constexpr (!CAP) {
    slope = splat<T>(c.slope);
    return rounded<T>(raw * c.post);
  } else {
    Vec<T> bend;
    const Vec<T> z = rounded<T>(tanh<T>(raw * c.pre, bend) * c.post);
    slope = bend * c.slope;
    return z;
  }
}

}  // namespace rlad::RLAD_ISA
