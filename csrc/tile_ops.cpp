// The ops on a tile of logits: fold_, fold_topk_, dlogits_. They check, split the rows among threads and call a row pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "isa.h"
#include "tiles.h"

namespace rlad {

namespace {

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

void fold_(const Tensor& logits, int64_t col0, const std::optional<Tensor>& bias, const Tensor& inv_temp, double logit_scale,
           double softcap, const Tensor& slots, bool exclude, const Tensor& stats, const Tensor& slot_logits, bool entropy,
           bool extras) {
  const Checker check("fold_");
  by_dtype(check, logits, [&](auto acc) {
    using T = decltype(acc);
    const auto tile = tile_of<T>(check, logits, col0, bias, inv_temp, logit_scale, softcap, slots);
    const int64_t rows = logits.size(0);
    const FoldArgs<T> args{tile,
                           check.mat<T>("stats", stats, kAcc<T>, 6, rows),
                           check.mat<T>("slot_logits", slot_logits, kAcc<T>, rows, tile.num_slots),
                           exclude,
                           entropy,
                           extras};
    const auto pass = row_passes<T>().fold;
    torch::stable::parallel_for(0, rows, rows_per_thread(tile.cols), [&](int64_t begin, int64_t end) { pass(args, begin, end); });
  });
}

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
    const auto pass = row_passes<T>().fold_topk;
    torch::stable::parallel_for(0, rows, rows_per_thread(tile.cols), [&](int64_t begin, int64_t end) { pass(args, begin, end); });
  });
}

void dlogits_(const Tensor& out, const Tensor& logits, int64_t col0, const std::optional<Tensor>& bias, const Tensor& inv_temp,
              double logit_scale, double softcap, const Tensor& slots, const Tensor& slot_dz, const Tensor& rows, bool entropy,
              bool tail) {
  const Checker check("dlogits_");
  by_dtype(check, logits, [&](auto acc) {
    using T = decltype(acc);
    const auto tile = tile_of<T>(check, logits, col0, bias, inv_temp, logit_scale, softcap, slots);
    const int64_t n = logits.size(0);
    const DlogitsArgs<T> args{tile,
                              check.any_mat("out", out, n, tile.cols, true),
                              check.mat<const T>("slot_dz", slot_dz, kAcc<T>, n, tile.num_slots),
                              check.mat<const T>("rows", rows, kAcc<T>, 6, n),
                              entropy,
                              tail};
    const auto pass = row_passes<T>().dlogits;
    torch::stable::parallel_for(0, n, rows_per_thread(tile.cols), [&](int64_t begin, int64_t end) { pass(args, begin, end); });
  });
}

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
    const ColumnArgs<T> args{tile,    check.vec<T>("lse", lse, kAcc<T>, rows), rows, block, part(0), part(1),
                             part(parts - 1)};
    const auto pass = row_passes<T>().column_stats;
    const int64_t stretches = (cols + kColumnStretch - 1) / kColumnStretch;
    torch::stable::parallel_for(0, stretches, 1, [&](int64_t begin, int64_t end) { pass(args, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) {
  m.impl("fold_", TORCH_BOX(&fold_));
  m.impl("fold_topk_", TORCH_BOX(&fold_topk_));
  m.impl("dlogits_", TORCH_BOX(&dlogits_));
  m.impl("column_stats_", TORCH_BOX(&column_stats_));
}

}  // namespace rlad
