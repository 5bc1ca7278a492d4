// column_stats_: of each block of rows and each column, the largest p and the sum of p, with p = e^(z − lse).
#pragma once

namespace rlad::RLAD_ISA {

template <bool CAP, bool BIAS, class T>
void column_stats_block(const ColumnArgs<T>& a, int64_t block, int64_t j0, int64_t n, T* top, T* sum, T* sloped) {
  constexpr int64_t L = kLanes<T>;
  const Tile<T>& tile = a.tile;
  const int64_t first = block * a.block, last = first + a.block < a.rows ? first + a.block : a.rows;
  for (int64_t j = 0; j < n; ++j) top[j] = sum[j] = sloped[j] = 0;
  for (int64_t i = first; i < last; ++i) {
    const Temper<T> c(tile, i);
    const T lse = a.lse[i] == -kInf<T> ? T(0) : a.lse[i];
    const Vec<T> flat = splat<T>(c.slope == 0 ? T(0) : T(1) / c.slope);
    const T* x = tile.logits.row(i) + j0;
    Vec<T> slope;
    for (int64_t j = 0; j < n; j += L) {
      const int64_t count = n - j < L ? n - j : L;
      Vec<T> raw = count == L ? load(x + j) : load_first(x + j, count);
      if constexpr (BIAS) raw += count == L ? load(tile.bias + j0 + j) : load_first(tile.bias + j0 + j, count);
      const Vec<T> p = exp_clamped(clamp_exp<T>(temper<CAP, T>(raw, c, slope) - lse));
      const Vec<T> m = load(top + j);
      store<T>(top + j, p > m ? p : m);
      store<T>(sum + j, load(sum + j) + p);
      if constexpr (CAP) store<T>(sloped + j, load(sloped + j) + p * slope * flat);
    }
  }
}

// Whole stretches of kColumnStretch columns, numbered [begin, end).
template <class T>
void column_stats(const ColumnArgs<T>& a, int64_t begin, int64_t end) {
  alignas(64) T top[kColumnStretch + kLanes<T>], sum[kColumnStretch + kLanes<T>], sloped[kColumnStretch + kLanes<T>];
  const int64_t blocks = (a.rows + a.block - 1) / a.block;
  with_flag(a.tile.softcap > 0, [&](auto cap) {
    with_flag(a.tile.bias, [&](auto bias) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t j0 = s * kColumnStretch, n = a.tile.cols - j0 < kColumnStretch ? a.tile.cols - j0 : kColumnStretch;
        for (int64_t b = 0; b < blocks; ++b) {
          column_stats_block<cap.value, bias.value>(a, b, j0, n, top, sum, sloped);
          std::memcpy(a.top.row(b) + j0, top, n * sizeof(T));
          std::memcpy(a.sum.row(b) + j0, sum, n * sizeof(T));
          if (cap.value) std::memcpy(a.sloped.row(b) + j0, sloped, n * sizeof(T));
        }
      }
    });
  });
}

}  // namespace rlad::RLAD_ISA
