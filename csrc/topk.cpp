// fold_topk_: a running top-K besides the statistics, which cover the columns outside it.
#ifndef RLAD_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tiles.h"

namespace rlad {

template <class T>
struct TopkArgs {
  Tile<T> tile;
  Mat<T> stats;
  Mat<T> slot_logits;
  Mat<T> top_logits;      // (R, K), each row a heap between calls
  Mat<int32_t> top_ids;
  int64_t k;
  bool entropy;
};

}  // namespace rlad

#define RLAD_FILE "topk.cpp"
#include "each_isa.h"

namespace rlad {

namespace {

void fold_topk_(const Tensor& logits, int64_t col0, const std::optional<Tensor>& bias, const Tensor& inv_temp,
                double logit_scale, double softcap, const Tensor& slots, const Tensor& stats, const Tensor& slot_logits,
                const Tensor& top_logits, const Tensor& top_ids, bool entropy) {
  const Checker check("fold_topk_");
  by_dtype(check, logits, [&](auto acc) {
    using T = decltype(acc);
    const auto tile = tile_of<T>(check, logits, col0, bias, inv_temp, logit_scale, softcap, slots);
    const int64_t rows = logits.size(0);
    const auto top = check.mat<T>("top_logits", top_logits, kAcc<T>, rows, kAny);
    const int64_t k = top_logits.size(1);
    if (k < 1 || k > kMaxTopK) check.fail("top_logits", "(R, K) with K in [1, " + std::to_string(kMaxTopK) + "]", top_logits);
    const TopkArgs<T> args{tile,
                           check.mat<T>("stats", stats, kAcc<T>, 6, rows),
                           check.mat<T>("slot_logits", slot_logits, kAcc<T>, rows, tile.num_slots),
                           top,
                           check.mat<int32_t>("top_ids", top_ids, ScalarType::Int, rows, k),
                           k,
                           entropy};
    for_rows(RLAD_PASS(fold_topk<T>), args, rows, tile.cols);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) { m.impl("fold_topk_", TORCH_BOX(&fold_topk_)); }

}  // namespace rlad

#else  // once per instruction set

namespace rlad::RLAD_ISA {

namespace {

// A row's top-K as a binary heap, worst entry first. Equal z: the higher id is worse; an empty place, id −1, is the highest.
template <class T>
struct Heap {
  T* z;
  int32_t* id;
  int64_t k;

  static bool worse(T za, int32_t ia, T zb, int32_t ib) { return za < zb || (za == zb && uint32_t(ia) > uint32_t(ib)); }
  bool full() const { return id[0] >= 0; }
  bool admits(T new_z, int32_t new_id) const { return worse(z[0], id[0], new_z, new_id); }

  void replace_worst(T new_z, int32_t new_id) {
    int64_t hole = 0;
    for (int64_t child = 1; child < k; child = 2 * hole + 1) {
      if (child + 1 < k && worse(z[child + 1], id[child + 1], z[child], id[child])) ++child;
      if (!worse(z[child], id[child], new_z, new_id)) break;
      z[hole] = z[child], id[hole] = id[child];
      hole = child;
    }
    z[hole] = new_z, id[hole] = new_id;
  }
};

// Whether any of a block's columns exceeds `bound`.
template <class T>
RLAD_INLINE bool any_above(const T* z, T bound) {
  typename Simd<T>::U above{};
  for (int u = 0; u < kUnroll<T>; ++u) above |= (typename Simd<T>::U)(load(z + u * kLanes<T>) > bound);
  uint64_t words[RLAD_VECTOR_BYTES / 8], any = 0;
  std::memcpy(words, &above, sizeof(words));
  for (uint64_t w : words) any |= w;
  return any != 0;
}

// Moves columns of z[0 … n) that belong to the top-K into the heap, leaving −inf, and columns pushed out of it into z: to
// their own place, or past the padded end if an earlier stretch brought them. Returns z's new padded length.
template <class T>
int64_t update_heap(Heap<T>& heap, T* z, int64_t n, int64_t lo) {
  int64_t length = round_up(n, kBlock<T>);
  for (int64_t block = 0; block < n; block += kBlock<T>) {
    if (heap.full() && !any_above(z + block, heap.z[0])) continue;
    const int64_t stop = block + kBlock<T> < n ? block + kBlock<T> : n;
    for (int64_t j = block; j < stop; ++j) {
      const int32_t id = int32_t(lo + j), out_id = heap.id[0];
      const T out_z = heap.z[0];
      if (!heap.admits(z[j], id)) continue;
      heap.replace_worst(z[j], id);
      z[j] = -kInf<T>;
      if (out_id < 0) continue;
      const uint64_t place = uint64_t(out_id - lo);
      z[place < uint64_t(n) ? int64_t(place) : length++] = out_z;
    }
  }
  const int64_t padded = round_up(length, kBlock<T>);
  for (int64_t k = length; k < padded; ++k) z[k] = -kInf<T>;
  return padded;
}

template <bool CAP, bool BIAS, bool ENTROPY, class T>
void fold_topk_rows(const TopkArgs<T>& a, int64_t begin, int64_t end) {
  const Tile<T>& tile = a.tile;
  alignas(64) T z[kScratch];
  for (int64_t i = begin; i < end; ++i) {
    const Temper<T> c(tile, i);
    RowStats<T> stats(a.stats, i);
    Heap<T> heap{a.top_logits.row(i), a.top_ids.row(i), a.k};
    for (int64_t j0 = 0; j0 < tile.cols; j0 += kStretch) {
      const int64_t lo = tile.col0 + j0, n = tile.cols - j0 < kStretch ? tile.cols - j0 : kStretch;
      const auto t = temper_stretch<CAP, BIAS, false>(tile.logits.row(i) + j0, BIAS ? tile.bias + j0 : nullptr, n, c, z);
      for_slots(tile, i, lo, n, [&](int64_t j, int64_t place) { a.slot_logits.row(i)[j] = z[place]; });
      int64_t length = round_up(n, kBlock<T>);
      T top = t.max;
      if (!heap.full() || t.max > heap.z[0]) {
        length = update_heap(heap, z, n, lo);
        top = max_of(z, length);
      }
      stats.raise_max(top, ENTROPY, false);
      stats.add(exp_sums<ENTROPY, false>(z, length, stats.shift()), ENTROPY, false);
    }
  }
}

template <class T>
void fold_topk(const TopkArgs<T>& a, int64_t begin, int64_t end) {
  with_flag(a.tile.softcap > 0, [&](auto cap) {
    with_flag(a.tile.bias, [&](auto bias) {
      with_flag(a.entropy, [&](auto entropy) { fold_topk_rows<cap.value, bias.value, entropy.value>(a, begin, end); });
    });
  });
}

}  // namespace

}  // namespace rlad::RLAD_ISA
#endif
