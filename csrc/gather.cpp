// gather_dot, gather_dhidden_, gather_dweight_: products with a few gathered rows of the head, and their gradients.
#ifndef RLAD_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tiles.h"

namespace rlad {

template <class T>
struct GatherArgs {
  AnyMat hidden;  // (N, D): read by dot and dweight, written by dhidden
  AnyMat weight;  // (V, D): read by dot and dhidden, written by dweight
  int64_t dim, vocab, k;
  Mat<T> grad;             // (N, K): written by dot, read by the others
  Mat<const int32_t> ids;  // (N, K) for dot and dhidden
  const int64_t* order;       // (N·K,) for dweight
  const int32_t* sorted_ids;  // (N·K,) for dweight
  int64_t positions;
  bool add;  // dhidden and dweight add to what is there
  int64_t col0;  // the id of the first row of d_weight
};

}  // namespace rlad

#define RLAD_FILE "gather.cpp"
#include "each_isa.h"

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
    for_rows(RLAD_PASS(gather_dot<T>), args, n, k * d);
  });
  return out;
}

// The gradient (N, K), which the passes only read.
template <class T>
Mat<T> grad_mat(const Checker& check, const Tensor& grad, int64_t n, int64_t k) {
  const auto g = check.mat<const T>("grad", grad, kAcc<T>, n, k);
  return {const_cast<T*>(g.data), g.stride};
}

void gather_dhidden_(const Tensor& out, const Tensor& grad, const Tensor& weight, const Tensor& ids, bool add) {
  const Checker check("gather_dhidden_");
  check.shape("ids", ids, {kAny, kAny});
  check.shape("weight", weight, {kAny, kAny});
  const int64_t n = ids.size(0), k = ids.size(1), vocab = weight.size(0), d = weight.size(1);
  by_acc(weight, [&](auto acc) {
    using T = decltype(acc);
    GatherArgs<T> args{};
    args.hidden = check.any_mat("out", out, n, d, true);
    args.weight = check.any_mat("weight", weight, vocab, d, false);
    args.dim = d, args.vocab = vocab, args.k = k, args.add = add;
    args.grad = grad_mat<T>(check, grad, n, k);
    args.ids = check.mat<const int32_t>("ids", ids, ScalarType::Int, n, k);
    for_rows(RLAD_PASS(gather_dhidden<T>), args, n, k * d);
  });
}

void gather_dweight_(const Tensor& d_weight, const Tensor& grad, const Tensor& hidden, const Tensor& order,
                     const Tensor& sorted_ids, bool add, int64_t col0) {
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
    args.dim = d, args.vocab = vocab, args.k = k, args.positions = positions, args.add = add, args.col0 = col0;
    args.grad = grad_mat<T>(check, grad, n, k);
    args.order = check.vec<int64_t>("order", order, ScalarType::Long, positions);
    args.sorted_ids = check.vec<int32_t>("sorted_ids", sorted_ids, ScalarType::Int, positions);
    for (int64_t p = 0; p < positions; ++p) {
      if (args.order[p] < 0 || args.order[p] >= positions) {
        check.fail("order", "a permutation of [0, " + std::to_string(positions) + ")", std::to_string(args.order[p]));
      }
    }
    for_rows(RLAD_PASS(gather_dweight<T>), args, positions, d);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) {
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
  m.impl("gather_dhidden_", TORCH_BOX(&gather_dhidden_));
  m.impl("gather_dweight_", TORCH_BOX(&gather_dweight_));
}

}  // namespace rlad

#else  // once per instruction set

namespace rlad::RLAD_ISA {

namespace {

template <class W>
using AccOf = std::conditional_t<std::is_same_v<W, double>, double, float>;

// f(W{}) with W the element type stored as `elem`; `T` float stands for the three types accumulated in float.
template <class T, class F>
RLAD_INLINE void with_elem(Elem elem, F f) {
  if constexpr (std::is_same_v<T, double>) f(double{});
  else if (elem == Elem::bf16) f(bf16{});
  else if (elem == Elem::f16) f(f16{});
  else f(float{});
}

template <class W>
double dot(const W* a, const W* b, int64_t n) {
  using T = AccOf<W>;
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum[kUnroll<T>] = {};
  int64_t j = 0;
  for (; j + kBlock<T> <= n; j += kBlock<T>)
    for (int u = 0; u < kUnroll<T>; ++u) sum[u] += widen(a + j + u * L, L) * widen(b + j + u * L, L);
  for (; j < n; j += L) {
    const int64_t count = n - j < L ? n - j : L;
    sum[0] += widen(a + j, count) * widen(b + j, count);
  }
  return sum_lanes<T>(sum);
}

template <class T>
void gather_dot(const GatherArgs<T>& a, int64_t begin, int64_t end) {
  with_elem<T>(a.hidden.elem, [&](auto w) {
    using W = decltype(w);
    for (int64_t i = begin; i < end; ++i) {
      const W* h = reinterpret_cast<const W*>(a.hidden.at(i, 0));
      for (int64_t k = 0; k < a.k; ++k) {
        const int64_t id = a.ids.row(i)[k];
        const bool valid = id >= 0 && id < a.vocab;
        a.grad.row(i)[k] = valid ? T(dot(h, reinterpret_cast<const W*>(a.weight.at(id, 0)), a.dim)) : T(0);
      }
    }
  });
}

// out row ← (add ? out row : 0) + Σ_q coefficient(q)·source row(q) over q in [first, last), accumulated in T, rounded once.
// row(q) < 0 is skipped.
template <class W, class T, class Coef, class Row>
RLAD_INLINE void weighted_rows(const AnyMat& out, int64_t out_row, bool add, const AnyMat& source, int64_t dim, int64_t first,
                               int64_t last, Coef coefficient, Row row) {
  constexpr int64_t L = kLanes<T>;
  alignas(64) T acc[kStretch];
  for (int64_t j0 = 0; j0 < dim; j0 += kStretch) {
    const int64_t n = dim - j0 < kStretch ? dim - j0 : kStretch;
    for (int64_t j = 0; j < n; ++j) acc[j] = 0;
    for (int64_t q = first; q < last; ++q) {
      if (row(q) < 0) continue;
      const T c = coefficient(q);
      const W* x = reinterpret_cast<const W*>(source.at(row(q), j0));
      int64_t j = 0;
      for (; j + L <= n; j += L) store<T>(acc + j, load(acc + j) + widen(x + j, L) * c);
      if (j < n) store_first<T>(acc + j, load_first(acc + j, n - j) + widen(x + j, n - j) * c, n - j);
    }
    if (add) {
      with_elem<T>(out.elem, [&](auto o) {
        const auto* p = reinterpret_cast<const decltype(o)*>(out.at(out_row, j0));
        for (int64_t j = 0; j < n; j += L) {
          const int64_t count = n - j < L ? n - j : L;
          store_first<T>(acc + j, load_first(acc + j, count) + widen(p + j, count), count);
        }
      });
    }
    narrow(out.elem, out.at(out_row, j0), acc, n);
  }
}

template <class T>
void gather_dhidden(const GatherArgs<T>& a, int64_t begin, int64_t end) {
  with_elem<T>(a.weight.elem, [&](auto w) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* ids = a.ids.row(i);
      weighted_rows<decltype(w), T>(
          a.hidden, i, a.add, a.weight, a.dim, 0, a.k, [&](int64_t k) { return a.grad.row(i)[k]; },
          [&](int64_t k) { return ids[k] < a.vocab ? int64_t(ids[k]) : -1; });
    }
  });
}

// Runs of equal ids that start in [begin, end); a run belongs to the worker that sees its start, wherever it ends.
template <class T>
void gather_dweight(const GatherArgs<T>& a, int64_t begin, int64_t end) {
  const int32_t* ids = a.sorted_ids;
  with_elem<T>(a.hidden.elem, [&](auto w) {
    int64_t p = begin;
    while (p > 0 && p < end && ids[p] == ids[p - 1]) ++p;
    while (p < end) {
      int64_t stop = p + 1;
      while (stop < a.positions && ids[stop] == ids[p]) ++stop;
      const int64_t at = ids[p] - a.col0;
      if (at >= 0 && at < a.vocab) {
        weighted_rows<decltype(w), T>(
            a.weight, at, a.add, a.hidden, a.dim, p, stop,
            [&](int64_t q) { return a.grad.row(a.order[q] / a.k)[a.order[q] % a.k]; }, [&](int64_t q) { return a.order[q] / a.k; });
      }
      p = stop;
    }
  });
}

}  // namespace

}  // namespace rlad::RLAD_ISA
#endif
