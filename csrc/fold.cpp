// fold_: statistics of one tile added to the running ones, the slots' columns read out and left out.
#ifndef RLAD_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tiles.h"

namespace rlad {

template <class T>
struct FoldArgs {
  Tile<T> tile;
  Mat<T> stats;  // (6, R): m, rest, restz, restsq, sumz, first
  Mat<T> slot_logits;
  bool entropy, extras;
};

}  // namespace rlad

#define RLAD_FILE "fold.cpp"
#include "each_isa.h"

namespace rlad {

namespace {

void fold_(const Tensor& logits, int64_t col0, const std::optional<Tensor>& bias, const Tensor& inv_temp, double logit_scale,
           double softcap, const Tensor& slots, const Tensor& stats, const Tensor& slot_logits, bool entropy, bool extras) {
  const Checker check("fold_");
  by_dtype(check, logits, [&](auto acc) {
    using T = decltype(acc);
    const auto tile = tile_of<T>(check, logits, col0, bias, inv_temp, logit_scale, softcap, slots);
    const int64_t rows = logits.size(0);
    const FoldArgs<T> args{tile,
                           check.mat<T>("stats", stats, kAcc<T>, 6, rows),
                           check.mat<T>("slot_logits", slot_logits, kAcc<T>, rows, tile.num_slots),
                           entropy,
                           extras};
    for_rows(RLAD_PASS(fold<T>), args, rows, tile.cols);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) { m.impl("fold_", TORCH_BOX(&fold_)); }

}  // namespace rlad

#else  // once per instruction set

namespace rlad::RLAD_ISA {

namespace {

template <bool CAP, bool BIAS, bool ENTROPY, bool EXTRAS, class T>
void fold_rows(const FoldArgs<T>& a, int64_t begin, int64_t end) {
  const Tile<T>& tile = a.tile;
  alignas(64) T z[kScratch];
  for (int64_t i = begin; i < end; ++i) {
    const Temper<T> c(tile, i);
    RowStats<T> stats(a.stats, i);
    for (int64_t j0 = 0; j0 < tile.cols; j0 += kStretch) {
      const int64_t n = tile.cols - j0 < kStretch ? tile.cols - j0 : kStretch;
      const auto t = temper_stretch<CAP, BIAS, EXTRAS>(tile.logits.row(i) + j0, BIAS ? tile.bias + j0 : nullptr, n, c, z);
      for_slots(tile, i, tile.col0 + j0, n, [&](int64_t j, int64_t place) { a.slot_logits.row(i)[j] = z[place]; });
      T top = t.max;
      bool held = false;
      for_slots(tile, i, tile.col0 + j0, n, [&](int64_t, int64_t place) {
        held |= z[place] == top;
        z[place] = -kInf<T>;
      });
      if (held) top = max_of(z, round_up(n, kBlock<T>));
      if (EXTRAS && top > stats.m) stats.first = T(tile.col0 + j0 + place_of(top, z));
      stats.raise_max(top, ENTROPY, EXTRAS);
      stats.add(exp_sums<ENTROPY, EXTRAS>(z, round_up(n, kBlock<T>), stats.shift()), ENTROPY, EXTRAS);
      if (EXTRAS) stats.sumz = T(stats.sumz + t.sum);
    }
  }
}

template <class T>
void fold(const FoldArgs<T>& a, int64_t begin, int64_t end) {
  with_flag(a.tile.softcap > 0, [&](auto cap) {
    with_flag(a.tile.bias, [&](auto bias) {
      with_flag(a.entropy, [&](auto entropy) {
        with_flag(a.extras, [&](auto extras) { fold_rows<cap.value, bias.value, entropy.value, extras.value>(a, begin, end); });
      });
    });
  });
}

}  // namespace

}  // namespace rlad::RLAD_ISA
#endif
