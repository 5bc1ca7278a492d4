// column_stats_: of each block of rows and each column, the largest p and the sum of p, with p = e^(z − lse).
#ifndef RLAD_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tiles.h"

namespace rlad {

constexpr int64_t kColumnStretch = 4096;  // columns column_stats handles at a time: their sums stay in the first-level cache

template <class T>
struct ColumnArgs {
  Tile<T> tile;  // without slots
  const T* lse;  // (R,)
  int64_t rows, block;
  Mat<T> top, sum, sloped;  // (blocks, C); sloped only with a softcap
};

}  // namespace rlad

#define RLAD_FILE "columns.cpp"
#include "each_isa.h"

namespace rlad {

namespace {

void column_stats_(const Tensor& out, const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& inv_temp,
                   double logit_scale, double softcap, const Tensor& lse, int64_t block) {
  const Checker check("column_stats_");
  by_dtype(check, logits, [&](auto acc) {
    using T = decltype(acc);
    check.shape("logits", logits, {kAny, kAny});
    const int64_t rows = logits.size(0), cols = logits.size(1);
    if (block < 1) check.fail("block", "at least 1", std::to_string(block));
    const int64_t blocks = (rows + block - 1) / block;
    const auto tile = whole_rows<T>(check, "logits", logits, rows, cols, bias, inv_temp, logit_scale, softcap);
    const int64_t parts = softcap > 0 ? 3 : 2;
    check.tensor("out", out, kAcc<T>, {parts, blocks, cols});
    T* data = static_cast<T*>(out.mutable_data_ptr());
    const auto part = [&](int64_t i) { return Mat<T>{data + i * out.stride(0), out.stride(1)}; };
    const T* const lse_data = check.vec<T>("lse", lse, kAcc<T>, rows);
    const ColumnArgs<T> args{tile, lse_data, rows, block, part(0), part(1), part(parts - 1)};
    const auto pass = RLAD_PASS(column_stats<T>);
    const int64_t stretches = (cols + kColumnStretch - 1) / kColumnStretch;
    torch::stable::parallel_for(0, stretches, 1, [&](int64_t begin, int64_t end) { pass(args, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) { m.impl("column_stats_", TORCH_BOX(&column_stats_)); }

}  // namespace rlad

#else  // once per instruction set

namespace rlad::RLAD_ISA {

namespace {

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

}  // namespace

}  // namespace rlad::RLAD_ISA
#endif
