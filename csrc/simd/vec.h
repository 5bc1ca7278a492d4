// Fixed-width vectors through the compilers' vector extension. Every header of this folder puts its code in namespace
// RLAD_ISA: no two instruction sets share a symbol.

#define RLAD_INLINE inline __attribute__((always_inline))

namespace rlad::RLAD_ISA {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(RLAD_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(RLAD_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(RLAD_VECTOR_BYTES / 2)));
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(RLAD_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(RLAD_VECTOR_BYTES)));
};
template <class T>
using Vec = typename Simd<T>::V;

template <class T>
constexpr int64_t kLanes = RLAD_VECTOR_BYTES / sizeof(T);
template <class T>
constexpr int kUnroll = 1;
template <>
constexpr int kUnroll<float> = 4;  // independent chains hide the latency of add and max, and make ≥ 16 partial sums
template <class T>
constexpr int64_t kBlock = kUnroll<T> * kLanes<T>;
template <class T>
constexpr T kInf = __builtin_huge_valf();

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
RLAD_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // not x + 0, which turns −0 into +0
}

template <class T>
RLAD_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
RLAD_INLINE Vec<T> load_first(const T* p, int64_t count) {
  Vec<T> v{};
  std::memcpy(&v, p, count * sizeof(T));
  return v;
}

template <class T>
RLAD_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <class T>
RLAD_INLINE void store_first(T* p, Vec<T> v, int64_t count) {
  std::memcpy(p, &v, count * sizeof(T));
}

// Sum of all lanes, the last step in double. Pairwise: a chain of adds over every lane would take longer than a short row.
template <class T>
RLAD_INLINE double sum_lanes(const Vec<T>* v) {
  Vec<T> total = v[0];
  for (int u = 1; u < kUnroll<T>; ++u) total += v[u];
  double lane[kLanes<T>];
  for (int64_t l = 0; l < kLanes<T>; ++l) lane[l] = total[l];
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

template <class T>
RLAD_INLINE T max_lanes(const Vec<T>* v) {
  Vec<T> top = v[0];
  for (int u = 1; u < kUnroll<T>; ++u) top = v[u] > top ? v[u] : top;
  T lane[kLanes<T>];
  store(lane, top);
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lane[l] = lane[l + half] > lane[l] ? lane[l + half] : lane[l];
  return lane[0];
}

// Whether any lane of a comparison's result is set.
template <class M>
RLAD_INLINE bool any(M mask) {
#if defined(__x86_64__) && RLAD_VECTOR_BYTES == 64
  typedef int V __attribute__((vector_size(64)));
  return __builtin_ia32_cvtd2mask512((V)mask) != 0;
#elif defined(__x86_64__) && RLAD_VECTOR_BYTES == 32
  return __builtin_ia32_movmskps256((Simd<float>::V)mask) != 0;
#elif defined(__x86_64__)
  return __builtin_ia32_movmskps((Simd<float>::V)mask) != 0;
#else
  uint64_t words[RLAD_VECTOR_BYTES / 8], any = 0;
  std::memcpy(words, &mask, sizeof(words));
  for (uint64_t w : words) any |= w;
  return any != 0;
#endif
}

template <class F>
RLAD_INLINE void with_flag(bool flag, F f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace rlad::RLAD_ISA
