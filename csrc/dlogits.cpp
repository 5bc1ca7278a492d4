// dlogits_: the gradient with respect to raw logits, written over a tile in one pass.
#ifndef RLAD_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tiles.h"

namespace rlad {

template <class T>
struct DlogitsArgs {
  Tile<T> tile;
  AnyMat out;  // (R, C), may be the logits
  Mat<const T> slot_dz;  // (R, J): the whole dL/dz of each slot
  Mat<const T> rows;     // (6, R): lse, w, b, H, t, tail_lse
  Mat<const int32_t> target;  // (R, 1)
  Mat<T> lost;                // (R, 1): what rounding takes from the target's slot is added to it; data may be null
  bool entropy, tail;
};

}  // namespace rlad

#define RLAD_FILE "dlogits.cpp"
#include "each_isa.h"

namespace rlad {

namespace {

void dlogits_(const Tensor& out, const Tensor& logits, int64_t col0, const std::optional<Tensor>& bias, const Tensor& inv_temp,
              double logit_scale, double softcap, const Tensor& slots, const Tensor& slot_dz, const Tensor& rows, const Tensor& target,
              const std::optional<Tensor>& lost, bool entropy, bool tail) {
  const Checker check("dlogits_");
  by_dtype(check, logits, [&](auto acc) {
    using T = decltype(acc);
    const auto tile = tile_of<T>(check, logits, col0, bias, inv_temp, logit_scale, softcap, slots);
    const int64_t n = logits.size(0);
    const DlogitsArgs<T> args{tile,
                              check.any_mat("out", out, n, tile.cols, true),
                              check.mat<const T>("slot_dz", slot_dz, kAcc<T>, n, tile.num_slots),
                              check.mat<const T>("rows", rows, kAcc<T>, 6, n),
                              check.mat<const int32_t>("target", target, ScalarType::Int, n, 1),
                              lost ? check.mat<T>("lost", *lost, kAcc<T>, n, 1) : Mat<T>{nullptr, 0},
                              entropy,
                              tail};
    for_rows(RLAD_PASS(dlogits<T>), args, n, tile.cols);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) { m.impl("dlogits_", TORCH_BOX(&dlogits_)); }

}  // namespace rlad

#else  // once per instruction set

namespace rlad::RLAD_ISA {

namespace {

template <class T>
struct RowGrad {
  T lse, w, b, h, t, tail_lse;
  RowGrad(const Mat<const T>& rows, int64_t i)
      : lse(rows.row(0)[i]), w(rows.row(1)[i]), b(rows.row(2)[i]), h(rows.row(3)[i]), t(rows.row(4)[i]), tail_lse(rows.row(5)[i]) {
    // Without mass, z − lse is −inf + inf. Any finite value gives the wanted 0, since every z is −inf.
    if (lse == -kInf<T>) lse = 0;
    if (tail_lse == -kInf<T>) tail_lse = t = 0;
  }
  bool zero() const { return w == 0 && b == 0 && t == 0; }
};

// dL/dz = p·w − p·b·(log p + H) + t·e^(z − tail_lse), and dz/draw in `slope`.
template <bool CAP, bool ENTROPY, bool TAIL, class T>
RLAD_INLINE Vec<T> grad_z(Vec<T> raw, Vec<T> t, const RowGrad<T>& r, const Temper<T>& c, Vec<T>& slope) {
  const Vec<T> z = temper<CAP, T>(raw, c, slope);
  const Vec<T> lp = clamp_exp<T>(z - r.lse);
  Vec<T> factor = splat(r.w);
  if constexpr (ENTROPY) factor -= (lp + r.h) * r.b;
  Vec<T> g = exp_clamped(lp) * factor;
  if constexpr (TAIL) g += exp_clamped(clamp_exp<T>(z - r.tail_lse)) * t;
  return g;
}

// A row's slots inside the stretch at hand.
template <class T>
struct Hits {
  std::vector<int64_t> place;
  std::vector<T> raw, value;  // padded to whole vectors
  explicit Hits(int64_t slots) {
    const int64_t n = round_up(slots, kLanes<T>);
    place.resize(n), raw.resize(n), value.resize(n);
  }

  template <bool CAP, bool BIAS>
  int64_t find(const DlogitsArgs<T>& a, int64_t i, int64_t j0, int64_t n, const Temper<T>& c) {
    int64_t count = 0;
    for_slots(a.tile, i, a.tile.col0 + j0, n, [&](int64_t j, int64_t p) {
      place[count] = j0 + p;
      raw[count] = a.tile.logits.row(i)[j0 + p] + (BIAS ? a.tile.bias[j0 + p] : T(0));
      value[count++] = a.slot_dz.row(i)[j];
    });
    Vec<T> slope;
    for (int64_t k = 0; k < count; k += kLanes<T>) {
      temper<CAP, T>(load(&raw[k]), c, slope);
      store<T>(&value[k], load(&value[k]) * slope);
    }
    return count;
  }
};

template <bool CAP, bool BIAS, bool ENTROPY, bool TAIL, class T>
void dlogits_rows(const DlogitsArgs<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<T>;
  const bool direct = size_of(a.out.elem) == sizeof(T);
  alignas(64) T scratch[kStretch];
  Hits<T> hits(a.tile.num_slots);
  Vec<T> slope;
  for (int64_t i = begin; i < end; ++i) {
    const RowGrad<T> r(a.rows, i);
    const Temper<T> c(a.tile, i);
    const Vec<T> t = splat(r.t);
    for (int64_t j0 = 0; j0 < a.tile.cols; j0 += kStretch) {
      const int64_t n = a.tile.cols - j0 < kStretch ? a.tile.cols - j0 : kStretch;
      const T* x = a.tile.logits.row(i) + j0;
      const T* bias = BIAS ? a.tile.bias + j0 : nullptr;
      T* g = direct ? reinterpret_cast<T*>(a.out.at(i, j0)) : scratch;
      const int64_t count = hits.template find<CAP, BIAS>(a, i, j0, n, c);  // before g, which may be x, is written
      int64_t j = 0;
      if (r.zero()) {
        for (; j < n; ++j) g[j] = 0;
      }
      for (; j + L <= n; j += L) {
        Vec<T> raw = load(x + j);
        if constexpr (BIAS) raw += load(bias + j);
        const Vec<T> gz = grad_z<CAP, ENTROPY, TAIL, T>(raw, t, r, c, slope);
        store<T>(g + j, gz * slope);
      }
      if (j < n) {
        Vec<T> raw = load_first(x + j, n - j);
        if constexpr (BIAS) raw += load_first(bias + j, n - j);
        const Vec<T> gz = grad_z<CAP, ENTROPY, TAIL, T>(raw, t, r, c, slope);
        store_first<T>(g + j, gz * slope, n - j);
      }
      for (int64_t k = 0; k < count; ++k) g[hits.place[k] - j0] = hits.value[k];
      if (direct) continue;
      narrow(a.out.elem, a.out.at(i, j0), scratch, n);
      for (int64_t k = 0; a.lost.data && k < count; ++k) {
        if (a.tile.col0 + hits.place[k] != a.target.row(i)[0]) continue;
        a.lost.row(i)[0] += hits.value[k] - widen_one<T>(a.out.elem, a.out.at(i, hits.place[k]));
      }
    }
  }
}

template <class T>
void dlogits(const DlogitsArgs<T>& a, int64_t begin, int64_t end) {
  with_flag(a.tile.softcap > 0, [&](auto cap) {
    with_flag(a.tile.bias, [&](auto bias) {
      with_flag(a.entropy, [&](auto entropy) {
        with_flag(a.tail, [&](auto tail) { dlogits_rows<cap.value, bias.value, entropy.value, tail.value>(a, begin, end); });
      });
    });
  });
}

}  // namespace

}  // namespace rlad::RLAD_ISA
#endif
