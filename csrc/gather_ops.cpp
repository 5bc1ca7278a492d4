// The ops on a few gathered rows of the head: gather_dot, gather_dhidden, gather_dweight_.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "tiles.h"

namespace rlad {

namespace {

// f(float{}) or f(double{}): the dtype sums are accumulated in.
template <class F>
void by_acc(const Tensor& t, F f) {
  t.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

void same_dtype(const Checker& check, const char* arg, const Tensor& t, const char* other_arg, const Tensor& other) {
  if (t.scalar_type() != other.scalar_type()) {
    check.fail(arg, std::string("of ") + other_arg + "'s dtype " + torch::headeronly::toString(other.scalar_type()), t);
  }
}

Tensor gather_dot(const Tensor& hidden, const Tensor& weight, const Tensor& ids) {
  const Checker check("gather_dot");
  check.shape("hidden", hidden, {kAny, kAny});
  check.tensor("ids", ids, ScalarType::Int, {hidden.size(0), kAny});
  check.shape("weight", weight, {kAny, hidden.size(1)});
  same_dtype(check, "weight", weight, "hidden", hidden);
  const int64_t n = hidden.size(0), d = hidden.size(1), vocab = weight.size(0), k = ids.size(1);
  Tensor out;
  by_acc(hidden, [&](auto acc) {
    using T = decltype(acc);
    out = torch::stable::new_empty(hidden, {n, k}, kAcc<T>);
    GatherArgs<T> args{};
    args.hidden = check.any_mat("hidden", hidden, n, d, false);
    args.weight = check.any_mat("weight", weight, vocab, d, false);
    args.dim = d, args.vocab = vocab, args.k = k;
    args.grad = check.mat<T>("out", out, kAcc<T>, n, k);
    args.ids = check.mat<const int32_t>("ids", ids, ScalarType::Int, n, k);
    const auto pass = row_passes<T>().gather_dot;
    torch::stable::parallel_for(0, n, rows_per_thread(k * d), [&](int64_t begin, int64_t end) { pass(args, begin, end); });
  });
  return out;
}

// The gradient (N, K), which the passes only read.
template <class T>
Mat<T> grad_mat(const Checker& check, const Tensor& grad, int64_t n, int64_t k) {
  const auto g = check.mat<const T>("grad", grad, kAcc<T>, n, k);
  return {const_cast<T*>(g.data), g.stride};
}

Tensor gather_dhidden(const Tensor& grad, const Tensor& weight, const Tensor& ids) {
  const Checker check("gather_dhidden");
  check.shape("ids", ids, {kAny, kAny});
  check.shape("weight", weight, {kAny, kAny});
  const int64_t n = ids.size(0), k = ids.size(1), vocab = weight.size(0), d = weight.size(1);
  Tensor out = torch::stable::new_empty(weight, {n, d});
  by_acc(weight, [&](auto acc) {
    using T = decltype(acc);
    GatherArgs<T> args{};
    args.hidden = check.any_mat("out", out, n, d, true);
    args.weight = check.any_mat("weight", weight, vocab, d, false);
    args.dim = d, args.vocab = vocab, args.k = k;
    args.grad = grad_mat<T>(check, grad, n, k);
    args.ids = check.mat<const int32_t>("ids", ids, ScalarType::Int, n, k);
    const auto pass = row_passes<T>().gather_dhidden;
    torch::stable::parallel_for(0, n, rows_per_thread(k * d), [&](int64_t begin, int64_t end) { pass(args, begin, end); });
  });
  return out;
}

void gather_dweight_(const Tensor& d_weight, const Tensor& grad, const Tensor& hidden, const Tensor& order,
                     const Tensor& sorted_ids, bool add) {
  const Checker check("gather_dweight_");
  check.shape("hidden", hidden, {kAny, kAny});
  check.shape("d_weight", d_weight, {kAny, hidden.size(1)});
  check.shape("grad", grad, {hidden.size(0), kAny});
  const int64_t n = hidden.size(0), d = hidden.size(1), vocab = d_weight.size(0), k = grad.size(1), positions = n * k;
  by_acc(hidden, [&](auto acc) {
    using T = decltype(acc);
    GatherArgs<T> args{};
    args.hidden = check.any_mat("hidden", hidden, n, d, false);
    args.weight = check.any_mat("d_weight", d_weight, vocab, d, true);
    args.dim = d, args.vocab = vocab, args.k = k, args.positions = positions, args.add = add;
    args.grad = grad_mat<T>(check, grad, n, k);
    args.order = check.vec<int64_t>("order", order, ScalarType::Long, positions);
    args.sorted_ids = check.vec<int32_t>("sorted_ids", sorted_ids, ScalarType::Int, positions);
    for (int64_t p = 0; p < positions; ++p) {
      if (args.order[p] < 0 || args.order[p] >= positions) {
        check.fail("order", "a permutation of [0, " + std::to_string(positions) + ")", std::to_string(args.order[p]));
      }
    }
    const auto pass = row_passes<T>().gather_dweight;
    torch::stable::parallel_for(0, positions, rows_per_thread(d), [&](int64_t begin, int64_t end) { pass(args, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) {
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
  m.impl("gather_dhidden", TORCH_BOX(&gather_dhidden));
  m.impl("gather_dweight_", TORCH_BOX(&gather_dweight_));
}

}  // namespace rlad
