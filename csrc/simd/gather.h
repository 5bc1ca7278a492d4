// Products with a few gathered rows of the head, and their gradients.
#pragma once

namespace rlad::RLAD_ISA {

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
          a.hidden, i, false, a.weight, a.dim, 0, a.k, [&](int64_t k) { return a.grad.row(i)[k]; },
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
      if (ids[p] >= 0 && ids[p] < a.vocab) {
        weighted_rows<decltype(w), T>(
            a.weight, ids[p], a.add, a.hidden, a.dim, p, stop,
            [&](int64_t q) { return a.grad.row(a.order[q] / a.k)[a.order[q] % a.k]; }, [&](int64_t q) { return a.order[q] / a.k; });
      }
      p = stop;
    }
  });
}

}  // namespace rlad::RLAD_ISA
