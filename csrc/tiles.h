// What the ops on logits share: the choice of the dtype, the checks of a tile, the size of a thread's share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "checks.h"

namespace rlad {

// Rows of `work` elements that a thread takes at least: below some 16k elements, waking it costs more than it saves.
inline int64_t rows_per_thread(int64_t work) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(work, 1)); }

// The pass over [0, n), whatever its op shares out, shared out to the threads; each costs `work`.
template <class Pass, class Args>
void for_rows(Pass pass, const Args& args, int64_t n, int64_t work) {
  torch::stable::parallel_for(0, n, rows_per_thread(work), [&](int64_t begin, int64_t end) { pass(args, begin, end); });
}

// A tile without slots that starts at column 0; `name` is what errors call its logits.
template <class T>
Tile<T> whole_rows(const Checker& check, const char* name, const Tensor& logits, int64_t rows, int64_t cols,
                   const std::optional<Tensor>& bias, const Tensor& inv_temp, double logit_scale, double softcap) {
  return {check.mat<const T>(name, logits, kAcc<T>, rows, cols),
          cols,
          0,
          bias ? check.vec<T>("bias", *bias, kAcc<T>, cols) : nullptr,
          check.vec<T>("inv_temp", inv_temp, kAcc<T>, rows),
          logit_scale,
          softcap,
          {nullptr, 0},
          0};
}

template <class T>
Tile<T> tile_of(const Checker& check, const Tensor& logits, int64_t col0, const std::optional<Tensor>& bias,
                const Tensor& inv_temp, double logit_scale, double softcap, const Tensor& slots) {
  check.shape("logits", logits, {kAny, kAny});
  auto tile = whole_rows<T>(check, "logits", logits, logits.size(0), logits.size(1), bias, inv_temp, logit_scale, softcap);
  tile.col0 = col0;
  tile.slots = check.mat<const int32_t>("slots", slots, ScalarType::Int, logits.size(0), kAny);
  tile.num_slots = slots.size(1);
  return tile;
}

// f(float{}) or f(double{}), by the logits' dtype.
template <class F>
void by_dtype(const Checker& check, const Tensor& logits, F f) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    default: check.fail("logits", "float32 or float64", logits);
  }
}

}  // namespace rlad
