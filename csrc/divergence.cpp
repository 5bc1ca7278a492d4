// divergence_: a divergence between two rows of logits, and its gradient with respect to the first's raw logits.
#ifndef RLAD_ISA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tiles.h"

namespace rlad {

enum class Family { sym, mix, todi, alpha_beta, taid_norm, taid, log_square, total_variation };

template <class T>
struct DivergenceArgs {
  Tile<T> student, teacher;           // whole rows, without slots
  Mat<const T> norm, teacher_norm;    // (2, R): max z, lse − max
  Mat<const T> rows;                  // (4, R): weight of the value, of the gradient; and what the family wants of each row
  T* value;                           // (R,)
  AnyMat out;                         // (R, C), may be the student's logits; data null without a gradient
  Family family;
  double numbers[3];  // what the family wants
  bool accumulate;    // add to value and out
  // (4, R) data or null: RowSums of columns that are not all of the row's. Without out they are written, and nothing else; with it they
  // are those of all columns, and value is left alone. For Family::taid_norm its three sums, and nothing else.
  Mat<T> sums;
};

}  // namespace rlad

#define RLAD_FILE "divergence.cpp"
#include "each_isa.h"

namespace rlad {

namespace {

Family family_of(const Checker& check, const std::string& name) {
  if (name == "sym") return Family::sym;
  if (name == "mix") return Family::mix;
  if (name == "todi") return Family::todi;
  if (name == "alpha_beta") return Family::alpha_beta;
  if (name == "taid_norm") return Family::taid_norm;
  if (name == "taid") return Family::taid;
  if (name == "log_square") return Family::log_square;
  if (name == "total_variation") return Family::total_variation;
  check.fail("family", "sym, mix, todi, alpha_beta, taid_norm, taid, log_square or total_variation", name);
}

template <class T>
void run(const Checker& check, const Tensor& value, const std::optional<Tensor>& out, const Tensor& logits,
         const std::optional<Tensor>& bias, const Tensor& inv_temp, double logit_scale, double softcap, const Tensor& norm,
         const Tensor& teacher, const std::optional<Tensor>& teacher_bias, const Tensor& teacher_inv_temp, double teacher_scale,
         double teacher_softcap, const Tensor& teacher_norm, const Tensor& rows, const std::string& family, double a, double b,
         double c, bool accumulate, const std::optional<Tensor>& sums) {
  const int64_t n = logits.size(0), cols = logits.size(1);
  check.tensor("value", value, kAcc<T>, {n});
  DivergenceArgs<T> args{whole_rows<T>(check, "logits", logits, n, cols, bias, inv_temp, logit_scale, softcap),
                         whole_rows<T>(check, "teacher", teacher, n, cols, teacher_bias, teacher_inv_temp, teacher_scale,
                                       teacher_softcap),
                         check.mat<const T>("norm", norm, kAcc<T>, 2, n),
                         check.mat<const T>("teacher_norm", teacher_norm, kAcc<T>, 2, n),
                         check.mat<const T>("rows", rows, kAcc<T>, 4, n),
                         static_cast<T*>(value.mutable_data_ptr()),
                         {nullptr, 0, Elem::f32},
                         family_of(check, family),
                         {a, b, c},
                         accumulate,
                         {nullptr, 0}};
  if (out) args.out = check.any_mat("out", *out, n, cols, true);
  if (out && accumulate) check.tensor("out", *out, kAcc<T>, {n, cols});  // a sum is rounded once
  if (sums) args.sums = check.mat<T>("sums", *sums, kAcc<T>, 4, n);
  if (args.family == Family::taid_norm && !sums) check.fail("sums", "a tensor (4, R) for taid_norm", "None");
  for_rows(RLAD_PASS(divergence<T>), args, n, cols);
}

void divergence_(const Tensor& value, const std::optional<Tensor>& out, const Tensor& logits, const std::optional<Tensor>& bias,
                 const Tensor& inv_temp, double logit_scale, double softcap, const Tensor& norm, const Tensor& teacher,
                 const std::optional<Tensor>& teacher_bias, const Tensor& teacher_inv_temp, double teacher_scale,
                 double teacher_softcap, const Tensor& teacher_norm, const Tensor& rows, const std::string& family, double a,
                 double b, double c, bool accumulate, const std::optional<Tensor>& sums) {
  const Checker check("divergence_");
  check.shape("logits", logits, {kAny, kAny});
  by_dtype(check, logits, [&](auto acc) {
    run<decltype(acc)>(check, value, out, logits, bias, inv_temp, logit_scale, softcap, norm, teacher, teacher_bias,
                       teacher_inv_temp, teacher_scale, teacher_softcap, teacher_norm, rows, family, a, b, c, accumulate, sums);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) { m.impl("divergence_", TORCH_BOX(&divergence_)); }

}  // namespace rlad

#else  // once per instruction set
#include "simd/divergence_terms.h"

namespace rlad::RLAD_ISA {

namespace {

// z of one stretch of a row, which ends in −inf up to a whole block: load(z + k)·scale. The raw logits themselves where a factor is
// all that tempers them.
template <class T>
struct Stretch {
  const T* z;
  T scale, top, log_total;
  RLAD_INLINE Vec<T> log_prob(int64_t k) const { return (rounded<T>(load(z + k) * scale) - top) - log_total; }
};

template <class T>
RLAD_INLINE Stretch<T> stretch_of(const Tile<T>& tile, const Mat<const T>& norm, int64_t i, int64_t j0, int64_t n, T* scratch) {
  const Temper<T> c(tile, i);
  const T* x = tile.logits.row(i) + j0;
  const T top = norm.row(0)[i], log_total = norm.row(1)[i];
  if (tile.softcap <= 0 && !tile.bias && n % kBlock<T> == 0) return {x, c.post, top, log_total};
  with_flag(tile.softcap > 0, [&](auto cap) {
    with_flag(tile.bias, [&](auto bias) {
      temper_stretch<cap.value, bias.value, false>(x, bias.value ? tile.bias + j0 : nullptr, n, c, scratch);
    });
  });
  return {scratch, T(1), top, log_total};
}

// dz/draw of the columns of one stretch.
template <class T>
RLAD_INLINE void slopes(const Tile<T>& tile, int64_t i, int64_t j0, int64_t n, T* slope) {
  const Temper<T> c(tile, i);
  const T* x = tile.logits.row(i) + j0;
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    const int64_t count = n - j < kLanes<T> ? n - j : kLanes<T>;
    Vec<T> raw = load_first(x + j, count), found;
    if (tile.bias) raw += load_first(tile.bias + j0 + j, count);
    temper<true, T>(raw, c, found);
    store<T>(slope + j, found);
  }
}

// f(first column, columns) for each stretch.
template <class F>
RLAD_INLINE void for_stretches(int64_t cols, F f) {
  for (int64_t j0 = 0; j0 < cols; j0 += kStretch) f(j0, cols - j0 < kStretch ? cols - j0 : kStretch);
}

// The points of one row, a stretch of columns at a time: f(first column, columns, at), at(k) being the points from the k-th on.
template <class T, class F>
RLAD_INLINE void for_points(const DivergenceArgs<T>& a, int64_t i, T* zq, T* zp, F f) {
  for_stretches(a.student.cols, [&](int64_t j0, int64_t n) {
    const Stretch<T> q = stretch_of(a.student, a.norm, i, j0, n, zq), p = stretch_of(a.teacher, a.teacher_norm, i, j0, n, zp);
    f(j0, n, [&](int64_t k) { return point<T>(q.log_prob(k), p.log_prob(k)); });
  });
}

// Σ term(point) over a row's columns with mass.
template <class T, class F>
RLAD_INLINE double row_sum(const DivergenceArgs<T>& a, int64_t i, T* zq, T* zp, F term) {
  double total = 0;
  for_points(a, i, zq, zp, [&](int64_t, int64_t n, auto at) {
    Vec<T> sum[kUnroll<T>];
    for (int u = 0; u < kUnroll<T>; ++u) sum[u] = Vec<T>{};
    for (int64_t j = 0; j < n; j += kBlock<T>) {
      for (int u = 0; u < kUnroll<T>; ++u) sum[u] += term(at(j + u * kLanes<T>));
    }
    total += sum_lanes<T>(sum);
  });
  return total;
}

// What the normalisers of rows are made of: Σ tilt, the largest mixed, and Σ e^{mixed − largest}, 0 where none is above −inf.
template <class T>
void taid_norm(const DivergenceArgs<T>& a, int64_t begin, int64_t end) {
  alignas(64) T zq[kScratch], zp[kScratch];
  for (int64_t i = begin; i < end; ++i) {
    Taid<T> f(a.numbers[0]);
    Vec<T> top[kUnroll<T>];
    for (int u = 0; u < kUnroll<T>; ++u) top[u] = splat<T>(-kInf<T>);
    a.sums.row(0)[i] = T(row_sum(a, i, zq, zp, [&](const Point<T>& x) {
      const Vec<T> mixed = f.mixed(x);
      top[0] = mixed > top[0] ? mixed : top[0];
      return f.tilt(x);
    }));
    f.top = a.sums.row(1)[i] = max_lanes<T>(top);
    const bool none = f.top == -kInf<T>;
    a.sums.row(2)[i] = none ? T(0) : T(row_sum(a, i, zq, zp, [&](const Point<T>& x) { return f.scaled(x); }));
  }
}

// Σ over a row. dz = u − q·Σu; of the one column with more than half of q, where there is one, it is minus the sum of the others':
// 1 − q cancels.
struct RowSums {
  double value = 0, u = 0, other_u = 0, other_q = 0;
};

template <class T>
RLAD_INLINE auto dominant(Vec<T> q) {
  return q > T(0.501);
}

template <class F, class T>
void divergence_rows(const DivergenceArgs<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<T>;
  const bool grad = a.out.data, part = a.sums.data && !grad, capped = a.student.softcap > 0;
  const bool direct = grad && size_of(a.out.elem) == sizeof(T), over = direct && !capped && !a.accumulate;
  const auto out_row = [&](int64_t i) { return reinterpret_cast<T*>(a.out.at(i, 0)); };
  const int64_t padded = round_up(a.student.cols, kBlock<T>);
  alignas(64) T zq[kScratch], zp[kScratch];
  // u and q of a row, kept from the sums for the gradient: q in the place of the gradient, unless more than q is wanted there
  std::vector<T> us(grad ? padded : 0), qs(over ? kStretch : grad ? padded : 0);
  const auto q_at = [&](int64_t i, int64_t j0, int64_t n) {
    return !over ? qs.data() + j0 : n % kBlock<T> == 0 ? out_row(i) + j0 : qs.data();
  };
  for (int64_t i = begin; i < end; ++i) {
    const T value_weight = a.rows.row(0)[i], grad_weight = a.rows.row(1)[i];
    const F f(a, i);
    bool pull = grad && grad_weight != 0;
    const bool peaked = a.norm.row(1)[i] < T(0.7);  // whether a column may be dominant
    RowSums sums;
    bool exists = true;
    if constexpr (std::is_same_v<F, Taid<T>>) exists = f.top != -kInf<T>;  // else no column has mass on both sides: no p_τ
    if (!exists) {
      sums.value = sums.u = kInf<double>;
    } else if (value_weight != 0 || pull || part) {
      for_points(a, i, zq, zp, [&](int64_t j0, int64_t n, auto at) {
        Vec<T> value[kUnroll<T>], u[kUnroll<T>], other_u[kUnroll<T>], other_q[kUnroll<T>];
        for (int r = 0; r < kUnroll<T>; ++r) value[r] = u[r] = other_u[r] = other_q[r] = Vec<T>{};
        T *const u_row = us.data() + j0, *const q_row = q_at(i, j0, n);
        for (int64_t j = 0; j < n; j += kBlock<T>) {
          for (int r = 0; r < kUnroll<T>; ++r) {
            const Part<T> x = f(at(j + r * L));
            value[r] += x.value;
            u[r] += x.u;
            if (pull) {
              store<T>(u_row + j + r * L, x.u);
              store<T>(q_row + j + r * L, x.q);
            } else if (!part) {
              continue;
            }
            if (!peaked) continue;
            other_u[r] += dominant<T>(x.q) ? Vec<T>{} : x.u;
            other_q[r] += dominant<T>(x.q) ? Vec<T>{} : x.q;
          }
        }
        sums.value += sum_lanes<T>(value);
        sums.u += sum_lanes<T>(u);
        sums.other_u += sum_lanes<T>(other_u);
        sums.other_q += sum_lanes<T>(other_q);
      });
    }
    if (part) {
      const double found[] = {sums.value, sums.u, sums.other_u, sums.other_q};
      for (int k = 0; k < 4; ++k) a.sums.row(k)[i] = T(found[k]);
      continue;
    }
    if (a.sums.data) {
      sums = {a.sums.row(0)[i], a.sums.row(1)[i], a.sums.row(2)[i], a.sums.row(3)[i]};
    } else {
      const T term = value_weight == 0 ? T(0) : T(value_weight * sums.value);
      a.value[i] = a.accumulate ? a.value[i] + term : term;
    }
    const T total = T(sums.u), most = T(sums.u * sums.other_q - sums.other_u);
    // An infinite divergence without a finite gradient sends none; NaN logits still show.
    if (!std::isfinite(total) && !std::isnan(sums.value)) pull = false;
    if (grad && !pull && !a.accumulate) std::memset(a.out.at(i, 0), 0, a.student.cols * size_of(a.out.elem));
    if (!pull) continue;
    const T slope = Temper<T>(a.student, i).slope;
    for_stretches(a.student.cols, [&](int64_t j0, int64_t n) {
      if (capped) slopes(a.student, i, j0, n, zp);
      const T *const u_row = us.data() + j0, *const q_row = q_at(i, j0, n);
      T* const out = direct ? out_row(i) + j0 : zq;
      const auto d = [&](int64_t k) {
        const Vec<T> q = load(q_row + k);
        Vec<T> dz = load(u_row + k) - q * total;
        if (peaked) dz = dominant<T>(q) ? splat(most) : dz;
        return dz * grad_weight * (capped ? load(zp + k) : splat(slope));
      };
      int64_t k = 0;
      for (; k + L <= n; k += L) store<T>(out + k, a.accumulate ? d(k) + load(out + k) : d(k));
      if (k < n) store_first<T>(out + k, a.accumulate ? d(k) + load_first(out + k, n - k) : d(k), n - k);
      if (!direct) narrow(a.out.elem, a.out.at(i, j0), zq, n);
    });
  }
}

template <class T>
void divergence(const DivergenceArgs<T>& a, int64_t begin, int64_t end) {
  switch (a.family) {
    case Family::sym: return divergence_rows<Sym<T>>(a, begin, end);
    case Family::mix: return divergence_rows<Mix<T>>(a, begin, end);
    case Family::todi: return divergence_rows<Todi<T>>(a, begin, end);
    case Family::alpha_beta: return divergence_rows<AlphaBeta<T>>(a, begin, end);
    case Family::taid_norm: return taid_norm(a, begin, end);
    case Family::taid: return divergence_rows<Taid<T>>(a, begin, end);
    case Family::log_square: return divergence_rows<LogSquare<T>>(a, begin, end);
    case Family::total_variation: return divergence_rows<TotalVariation<T>>(a, begin, end);
  }
}

}  // namespace

}  // namespace rlad::RLAD_ISA
#endif
