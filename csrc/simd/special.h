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

// (e^x − 1 − x)/x² for |x| ≤ 1; its Taylor series, whose next term is below half an ulp of ½.
template <class T>
RLAD_INLINE Vec<T> excess_ratio(Vec<T> x) {
  constexpr int kTerms = sizeof(T) == 8 ? 18 : 10;
  constexpr double kInverse[] = {1.0 / 2,  1.0 / 3,  1.0 / 4,  1.0 / 5,  1.0 / 6,  1.0 / 7,  1.0 / 8,  1.0 / 9,  1.0 / 10,
                                 1.0 / 11, 1.0 / 12, 1.0 / 13, 1.0 / 14, 1.0 / 15, 1.0 / 16, 1.0 / 17, 1.0 / 18, 1.0 / 19};
  Vec<T> sum = splat<T>(1);
  for (int k = kTerms - 1; k > 0; --k) sum = sum * (x * T(kInverse[k])) + T(1);
  return sum * T(0.5);
}

template <class T>
RLAD_INLINE Vec<T> excess(Vec<T> x) {
  return magnitude<T>(x) < T(1) ? x * x * excess_ratio<T>(x) : exp_all<T>(x) - T(1) - x;
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
