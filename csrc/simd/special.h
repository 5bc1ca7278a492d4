// e^x − 1, e^x − 1 − x, log x, |x|, lane by lane, to a few ulps of their own size also near 0.

namespace rlad::RLAD_ISA {

template <class T>
RLAD_INLINE Vec<T> magnitude(Vec<T> x) {
  using U = typename Simd<T>::U;
  return (Vec<T>)((U)x & ~(U)splat<T>(T(-0.0)));
}

// Saturates as exp_clamped does.
RLAD_INLINE Vec<float> expm1(Vec<float> x) {
  const Power e = reduce(clamp_exp<float>(x));
  return e.p * e.u + (e.u - 1.0f);
}

RLAD_INLINE Vec<double> expm1(Vec<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = std::expm1(x[l]);
  return x;
}

// e^x, inf where it overflows.
template <class T>
RLAD_INLINE Vec<T> exp_all(Vec<T> x) {
  return x > splat(kExpHigh<T>) ? splat<T>(kInf<T>) : exp_clamped(clamp_exp<T>(x));
}

// Σ cₖ·xᵏ, c₀ first. Pairs of terms do not wait for each other.
RLAD_INLINE Vec<float> polynomial(Vec<float>, Vec<float>, float c) { return splat(c); }

template <class... C>
RLAD_INLINE Vec<float> polynomial(Vec<float> x, Vec<float> square, float c0, float c1, C... higher) {
  const Vec<float> pair = x * c1 + c0;
  if constexpr (sizeof...(C) == 0) return pair;
  else return polynomial(x, square, higher...) * square + pair;
}

// (e^x − 1 − x)/x² for |x| ≤ 1: a minimax fit with relative error 4e-9 before rounding; in float64 the Taylor series.
RLAD_INLINE Vec<float> excess_ratio(Vec<float> x) {
  return polynomial(x, x * x, 0.5f, 0x1.555556p-3f, 0x1.55557ap-5f, 0x1.1110ep-7f, 0x1.6bffbp-10f, 0x1.a028cap-13f, 0x1.a96228p-16f,
                    0x1.7416dcp-19f);
}

// For 0 ≤ x ≤ 1; the fit's relative error is 3e-8.
RLAD_INLINE Vec<float> excess_ratio_positive(Vec<float> x) {
  return polynomial(x, x * x, 0x1.fffffep-2f, 0x1.5555ecp-3f, 0x1.55396cp-5f, 0x1.12ef78p-7f, 0x1.4fabfep-10f, 0x1.2fe81p-12f);
}

RLAD_INLINE Vec<double> excess_ratio(Vec<double> x) {
  Vec<double> sum = splat(1.0);
  for (int k = 19; k > 2; --k) sum = sum * (x * (1.0 / k)) + 1.0;
  return sum * 0.5;
}

RLAD_INLINE Vec<double> excess_ratio_positive(Vec<double> x) { return excess_ratio(x); }

// t − log(1 + t) for −½ ≤ t ≤ 0; the fit's relative error is 4e-8.
RLAD_INLINE Vec<float> log1p_excess(Vec<float> t) {
  return polynomial(t, t * t, 0.5f, -0x1.5553acp-2f, 0x1.0055fap-2f, -0x1.8c5aacp-3f, 0x1.d63492p-3f, 0x1.8bfef8p-3f, 0x1.243448p+0f,
                    0x1.8de2dep+0f, 0x1.51a996p+0f) * (t * t);
}

RLAD_INLINE Vec<double> log1p_excess(Vec<double> t) {
  for (int l = 0; l < kLanes<double>; ++l) t[l] = std::log1p(t[l]);
  return t * t * excess_ratio(t);
}

template <class T>
RLAD_INLINE Vec<T> excess(Vec<T> x) {
  const auto near = magnitude<T>(x) < T(1);
  const Vec<T> series = x * x * excess_ratio(x);
  return any(~near) ? (near ? series : exp_all<T>(x) - T(1) - x) : series;
}

// log x, where f = x − 1 is given: exact where the caller has it better than x. With x = 2ⁿ·m, m in [√½, √2):
// n·ln2 + 2·atanh(f/(2 + f)), f = m − 1, and the given one where n = 0.
RLAD_INLINE Vec<float> log(Vec<float> x, Vec<float> given) {
  using U = Simd<float>::U;
  typedef int32_t I __attribute__((vector_size(RLAD_VECTOR_BYTES)));
  const U shifted = (U)x - 0x3f3504f3u;  // √½
  const U n = shifted >> 23 | (shifted >> 31) * 0xfffffe00u;
  const Vec<float> m = (Vec<float>)((shifted & 0x7fffffu) + 0x3f3504f3u);
  const Vec<float> f = n == 0u ? given : m - 1.0f;
  const Vec<float> s = f / (f + 2.0f), t = s * s;
  Vec<float> series = t * (1.0f / 11) + 1.0f / 9;
  series = series * t + 1.0f / 7;
  series = series * t + 1.0f / 5;
  series = series * t + 1.0f / 3;
  const Vec<float> result = __builtin_convertvector((I)n, Vec<float>) * 0.693147181f + (s * t * series + s) * 2.0f;
  return x > 0.0f ? result : x == 0.0f ? splat(-kInf<float>) : x - x + __builtin_nanf("");
}

RLAD_INLINE Vec<double> log(Vec<double> x, Vec<double> given) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = x[l] > 0.5 ? std::log1p(given[l]) : std::log(x[l]);
  return x;
}

}  // namespace rlad::RLAD_ISA
