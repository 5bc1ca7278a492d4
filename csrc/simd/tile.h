// One stretch of a row: tempering into scratch, and the sums over it. What both folds share.

namespace rlad::RLAD_ISA {

constexpr int64_t kStretch = 4096;  // columns handled at a time: raw logits and scratch both stay in the first-level cache
constexpr int64_t kScratch = kStretch + kMaxTopK + 2 * kBlock<float>;

template <class T>
struct Tempered {
  T max;
  double sum;
};

// z[0 … n) from raw logits, then −inf up to a whole block.
template <bool CAP, bool BIAS, bool SUM, class T>
RLAD_INLINE Tempered<T> temper_stretch(const T* x, const T* bias, int64_t n, const Temper<T>& c, T* z) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> top[kUnroll<T>], sum[kUnroll<T>], slope;
  for (int u = 0; u < kUnroll<T>; ++u) top[u] = splat<T>(-kInf<T>), sum[u] = Vec<T>{};
  int64_t j = 0;
  for (; j + kBlock<T> <= n; j += kBlock<T>) {
    for (int u = 0; u < kUnroll<T>; ++u) {
      Vec<T> raw = load(x + j + u * L);
      if constexpr (BIAS) raw += load(bias + j + u * L);
      const Vec<T> v = temper<CAP, T>(raw, c, slope);
      top[u] = v > top[u] ? v : top[u];
      if constexpr (SUM) sum[u] += v;
      store(z + j + u * L, v);
    }
  }
  const int64_t padded = round_up(n, kBlock<T>);
  for (int64_t k = j; k < padded; ++k) z[k] = -kInf<T>;
  for (; j < n; j += L) {
    const int64_t count = n - j < L ? n - j : L;
    Vec<T> raw = load_first(x + j, count);
    if constexpr (BIAS) raw += load_first(bias + j, count);
    store_first<T>(z + j, temper<CAP, T>(raw, c, slope), count);
    const Vec<T> v = load(z + j);
    top[0] = v > top[0] ? v : top[0];
    for (int64_t l = 0; SUM && l < count; ++l) sum[0][l] += v[l];
  }
  return {max_lanes<T>(top), SUM ? sum_lanes<T>(sum) : 0};
}

// Over a whole number of blocks.
template <class T>
RLAD_INLINE T max_of(const T* z, int64_t n) {
  Vec<T> top[kUnroll<T>];
  for (int u = 0; u < kUnroll<T>; ++u) top[u] = splat<T>(-kInf<T>);
  for (int64_t j = 0; j < n; j += kBlock<T>) {
    for (int u = 0; u < kUnroll<T>; ++u) {
      const Vec<T> v = load(z + j + u * kLanes<T>);
      top[u] = v > top[u] ? v : top[u];
    }
  }
  return max_lanes<T>(top);
}

// Where `value`, which is there, stands first.
template <class T>
int64_t place_of(T value, const T* z) {
  int64_t j = 0;
  while (z[j] != value) ++j;
  return j;
}

struct Sums {
  double e = 0, ez = 0, ee = 0;  // Σ e^d, Σ e^d·d, Σ e^2d, d = z − m
};

// Over a whole number of blocks; columns at −inf add nothing.
template <bool ENTROPY, bool EXTRAS, class T>
RLAD_INLINE Sums exp_sums(const T* z, int64_t n, T m) {
  Vec<T> e[kUnroll<T>], ez[kUnroll<T>], ee[kUnroll<T>];
  for (int u = 0; u < kUnroll<T>; ++u) e[u] = ez[u] = ee[u] = Vec<T>{};
  for (int64_t j = 0; j < n; j += kBlock<T>) {
    for (int u = 0; u < kUnroll<T>; ++u) {
      const Vec<T> d = clamp_exp<T>(load(z + j + u * kLanes<T>) - m);
      const Vec<T> p = exp_clamped(d);
      e[u] += p;
      if constexpr (ENTROPY) ez[u] += p * d;
      if constexpr (EXTRAS) ee[u] += p * p;
    }
  }
  Sums out;
  out.e = sum_lanes<T>(e);
  if constexpr (ENTROPY) out.ez = sum_lanes<T>(ez);
  if constexpr (EXTRAS) out.ee = sum_lanes<T>(ee);
  return out;
}

// A row's running statistics; m is the maximum of the columns that the sums are over.
template <class T>
struct RowStats {
  T &m, &rest, &restz, &restsq, &sumz, &first;
  RowStats(const Mat<T>& s, int64_t i)
      : m(s.row(0)[i]),
        rest(s.row(1)[i]),
        restz(s.row(2)[i]),
        restsq(s.row(3)[i]),
        sumz(s.row(4)[i]),
        first(s.row(5)[i]) {}

  // What to subtract from z. A row of −inf so far subtracts 0: its sums stay 0, and a NaN still shows.
  T shift() const { return m == -kInf<T> ? T(0) : m; }

  void raise_max(T max, bool entropy, bool extras) {
    if (!(max > m)) return;
    const double down = m == -kInf<T> ? 0 : double(m) - double(max);
    const double scale = m == -kInf<T> ? 0 : std::exp(down);
    if (entropy) restz = T(scale * (restz + down * rest));
    if (extras) restsq = T(scale * scale * restsq);
    rest = T(scale * rest);
    m = max;
  }

  void add(const Sums& s, bool entropy, bool extras) {
    rest = T(rest + s.e);
    if (entropy) restz = T(restz + s.ez);
    if (extras) restsq = T(restsq + s.ee);
  }
};

// f(slot j, place) for each slot whose column lies in [lo, lo + n).
template <class T, class F>
RLAD_INLINE void for_slots(const Tile<T>& tile, int64_t row, int64_t lo, int64_t n, F f) {
  const int32_t* ids = tile.slots.row(row);
  for (int64_t j = 0; j < tile.num_slots; ++j) {
    const uint64_t place = uint64_t(int64_t(ids[j]) - lo);
    if (place < uint64_t(n)) f(j, int64_t(place));
  }
}

}  // namespace rlad::RLAD_ISA
