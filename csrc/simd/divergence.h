// divergence_: a divergence between two rows of logits, and its gradient with respect to the first's raw logits.
//
// With w = log p − log q every term is q·φ(w), φ ≥ 0, φ(0) = φ'(0) = 0, and u = ∂L/∂log q = q·g(w), g(0) = 0, up to a multiple
// of q, which dL/dz = u − q·Σu does not see. Near w = 0 both come from series, so small divergences keep their relative accuracy.
#pragma once

namespace rlad::RLAD_ISA {

template <class T>
struct Point {
  Vec<T> lq, lp, q, p, w;
};

template <class T>
struct Part {
  Vec<T> value, u;
};

template <class T>
RLAD_INLINE auto near_zero(Vec<T> w) {
  return magnitude<T>(w) < T(1);
}

// a·b, 0 where either is 0 though the other may be infinite.
template <class T>
RLAD_INLINE Vec<T> times(Vec<T> a, Vec<T> b) {
  return (a == T(0)) | (b == T(0)) ? Vec<T>{} : a * b;
}

// forward·KL(p‖q) + reverse·KL(q‖p)
template <class T>
struct Sym {
  T forward, reverse;
  Sym(T forward, T reverse) : forward(forward), reverse(reverse) {}
  Sym(const DivergenceArgs<T>& a, int64_t i) : forward(a.rows.row(2)[i]), reverse(a.rows.row(3)[i]) {}

  RLAD_INLINE Part<T> operator()(const Point<T>& x) const {
    Part<T> out{};
    const auto near = near_zero<T>(x.w);
    const Vec<T> square = x.w * x.w;
    const Vec<T> reverse_excess = square * excess_ratio<T>(x.w);
    if (forward != 0) {
      const Vec<T> pw = times<T>(x.p, x.w);
      out.value += (near ? x.p * square * excess_ratio<T>(-x.w) : x.q - x.p + pw) * forward;
      out.u += (near ? -x.q * (x.w + reverse_excess) : x.q - x.p) * forward;
    }
    if (reverse != 0) {
      const Vec<T> qw = times<T>(x.q, x.w);
      out.value += (near ? x.q * reverse_excess : x.p - x.q - qw) * reverse;
      out.u -= qw * reverse;
    }
    return out;
  }
};

// a·KL(p‖m) + b·KL(q‖m), m = λp + (1 − λ)q, 0 < λ < 1
template <class T>
struct Mix {
  T a, b, lambda, rest;
  Mix(const DivergenceArgs<T>& g, int64_t) : a(T(g.numbers[0])), b(T(g.numbers[1])), lambda(T(g.numbers[2])), rest(T(1 - g.numbers[2])) {}

  RLAD_INLINE Part<T> operator()(const Point<T>& x) const {
    Part<T> out{};
    const auto up = x.w > T(0);
    const Vec<T> share = up ? splat(rest) : splat(lambda), other = up ? splat(lambda) : splat(rest), down = -magnitude<T>(x.w);
    // log(other + share·e^down) = log(1 + share·(e^down − 1)): the second way near 1, the first where it would cancel
    const Vec<T> near_one = share * expm1(down), sum = other + share * exp_clamped(clamp_exp<T>(down));
    const auto close = near_one > T(-0.5);
    const Vec<T> l = log(close ? near_one + T(1) : sum, close ? near_one : sum - T(1));
    const Vec<T> mu = up ? x.w + l : l, nu = up ? l : l - x.w;  // log(m/q), log(m/p)
    if (a != 0) {
      const Vec<T> far = (x.q - x.p) * rest - times<T>(x.p, nu);
      out.value += (near_zero<T>(nu) ? x.p * nu * nu * excess_ratio<T>(nu) : far) * a;
      out.u -= x.q * expm1(-nu) * (a * rest);
    }
    if (b != 0) {
      const Vec<T> qmu = times<T>(x.q, mu);
      const Vec<T> far = (x.p - x.q) * lambda - qmu;
      out.value += (near_zero<T>(mu) ? x.q * mu * mu * excess_ratio<T>(mu) : far) * b;
      out.u -= (qmu + x.q * expm1(-mu) * rest) * b;
    }
    return out;
  }
};

// Σ σ·p·w − (1 − σ)·q·w with σ = σ(βw) held constant
template <class T>
struct Todi {
  T half_beta;
  Todi(const DivergenceArgs<T>& g, int64_t) : half_beta(T(g.numbers[0] / 2)) {}

  RLAD_INLINE Part<T> operator()(const Point<T>& x) const {
    Vec<T> unused;
    const Vec<T> t = tanh<T>(x.w * half_beta, unused), sigma = (t + T(1)) * T(0.5), other = (T(1) - t) * T(0.5);
    const auto near = near_zero<T>(x.w);
    const Vec<T> grown = x.w + x.w * x.w * excess_ratio<T>(x.w);  // e^w − 1
    const Vec<T> gap = near ? x.q * grown : x.p - x.q;
    const Vec<T> far = times<T>(other * x.q, T(1) - x.w) - sigma * x.p;
    return {times<T>((gap + t * (x.p + x.q)) * T(0.5), x.w), near ? x.q * (-sigma * grown - t - other * x.w) : far};
  }
};

// −1/(αβ)·Σ[p^α·q^β − α/s·p^s − β/s·q^s], s = α + β, and its limits where one of α, β, s is 0. `swap` exchanges p and α with
// q and β in the value, so that α is the smaller one.
template <class T>
struct AlphaBeta {
  T alpha, beta, s, inner, outer, c_own, c_cross, c_base, c_slope;
  bool swap;
  AlphaBeta(const DivergenceArgs<T>& g, int64_t) {
    const double a = g.numbers[0], b = g.numbers[1], sum = a + b;
    swap = std::fabs(b) < std::fabs(a);
    const double in = swap ? b : a, out = swap ? a : b;
    alpha = T(a), beta = T(b), s = T(sum), inner = T(in), outer = T(out);
    const double own = sum == 0 ? 0 : 1 / (out * sum), cross = in == 0 ? 0 : 1 / (in * out);
    c_own = T(own), c_cross = T(cross), c_base = T(cross - own), c_slope = T(own * sum - cross * in);
    if (in != 0 && sum != 0) c_base = T(1 / (in * sum)), c_slope = 0;
  }

  // b^s
  RLAD_INLINE Vec<T> power(Vec<T> log_b) const { return s == 0 ? splat<T>(1) : exp_all<T>(log_b * s); }

  RLAD_INLINE Part<T> operator()(const Point<T>& x) const {
    Part<T> out;
    const Vec<T> qs = power(x.lq), ps = power(x.lp);
    const auto near = near_zero<T>(x.w);
    const Vec<T> w = swap ? -x.w : x.w, base = swap ? ps : qs, own = swap ? qs : ps;
    Vec<T> cross{};
    if (alpha != 0 && beta != 0) {
      const Vec<T> lift = x.w * -beta, log_ps = x.lp * s;
      const auto safe = (magnitude<T>(lift) < T(40)) & (magnitude<T>(log_ps) < T(40));
      // one exponent of large terms would round where two of smaller ones need not
      cross = safe ? ps * exp_all<T>(lift) : exp_all<T>(x.lp * alpha + x.lq * beta);
    } else if (alpha != 0) {
      cross = ps;
    }
    Vec<T> close{}, far = base * c_base;
    if (c_own != 0) close += excess<T>(w * s) * c_own, far += own * c_own;
    if (c_cross != 0) close -= excess<T>(w * inner) * c_cross, far -= cross * c_cross;
    if (c_slope != 0) far -= times<T>(base, w) * c_slope;
    far = (far == far) | (x.w != x.w) ? far : splat(kInf<T>);  // of powers that overflow the largest decides
    out.value = near ? times<T>(close, base) : far;
    if (alpha == 0) out.u = -times<T>(qs, x.w);
    else out.u = (near ? -times<T>(expm1(x.w * alpha), qs) : qs - cross) / alpha;
    return out;
  }
};

// KL(p_τ‖q) with p_τ ∝ q^(1−τ)·p^τ held constant, 0 < τ < 1. With z = Σq^(1−τ)·p^τ ≤ 1, log p_τ − log q = τw − log z: exact for
// close models, where z = 1 + Σ tilt. `far`, z small: log z = top + log_z, and the difference of log p_τ and log q themselves.
template <class T>
struct Taid {
  T tau, top = 0, log_z = 0;
  bool far = false;
  Taid(const DivergenceArgs<T>& g, int64_t) : tau(T(g.numbers[0])) {}

  RLAD_INLINE Vec<T> mixed(const Point<T>& x) const { return x.lq * (T(1) - tau) + x.lp * tau; }

  RLAD_INLINE Vec<T> tilt(const Point<T>& x) const {
    const Vec<T> w = x.w * tau;
    return near_zero<T>(w) ? x.q * (w + w * w * excess_ratio<T>(w)) : exp_clamped(clamp_exp<T>(mixed(x))) - x.q;
  }

  RLAD_INLINE Vec<T> scaled(const Point<T>& x) const { return exp_clamped(clamp_exp<T>(mixed(x) - top)); }

  RLAD_INLINE Part<T> operator()(const Point<T>& x) const {
    const Vec<T> lp = (mixed(x) - top) - log_z;
    const Vec<T> w = far ? (lp == x.lq ? Vec<T>{} : lp - x.lq) : x.w * tau - log_z;
    return Sym<T>(1, 0)(Point<T>{x.lq, lp, x.q, exp_clamped(clamp_exp<T>(lp)), w});
  }
};

// ½·Σ(log p − log q)²: the αβ-divergence at α = β = 0
template <class T>
struct LogSquare {
  LogSquare(const DivergenceArgs<T>&, int64_t) {}
  RLAD_INLINE Part<T> operator()(const Point<T>& x) const { return {x.w * x.w * T(0.5), -x.w}; }
};

// ½·Σ|p − q|, with gradient 0 where p = q
template <class T>
struct TotalVariation {
  TotalVariation(const DivergenceArgs<T>&, int64_t) {}
  RLAD_INLINE Part<T> operator()(const Point<T>& x) const {
    const Vec<T> gap = near_zero<T>(x.w) ? x.q * (x.w + x.w * x.w * excess_ratio<T>(x.w)) : x.p - x.q;
    const Vec<T> half = x.q * T(0.5);
    return {magnitude<T>(gap) * T(0.5), x.w > T(0) ? -half : x.w < T(0) ? half : x.w};
  }
};

// The tempered logits of one stretch, which end in −inf up to a whole block.
template <class T>
RLAD_INLINE void temper_row(const Tile<T>& tile, int64_t i, int64_t j0, int64_t n, T* z) {
  const Temper<T> c(tile, i);
  with_flag(tile.softcap > 0, [&](auto cap) {
    with_flag(tile.bias, [&](auto bias) {
      temper_stretch<cap.value, bias.value, false>(tile.logits.row(i) + j0, bias.value ? tile.bias + j0 : nullptr, n, c, z);
    });
  });
}

template <class T>
RLAD_INLINE Point<T> point(Vec<T> lq, Vec<T> lp) {
  return {lq, lp, exp_clamped(clamp_exp<T>(lq)), exp_clamped(clamp_exp<T>(lp)), lp == lq ? Vec<T>{} : lp - lq};
}

// A column without mass on either side has no part in anything.
template <class T>
RLAD_INLINE auto dead(const Point<T>& x) {
  return (x.lq == -kInf<T>) & (x.lp == -kInf<T>);
}

template <class T, class F>
RLAD_INLINE Part<T> part_of(const F& f, const Point<T>& x) {
  const Part<T> part = f(x);
  return {dead<T>(x) ? Vec<T>{} : part.value, dead<T>(x) ? Vec<T>{} : part.u};
}

// g(j) = dL/dz → dL/draw of one stretch, written or added.
template <bool CAP, bool BIAS, class T>
RLAD_INLINE void chain(const DivergenceArgs<T>& a, int64_t i, int64_t j0, int64_t n, const T* g) {
  constexpr int64_t L = kLanes<T>;
  const Temper<T> c(a.student, i);
  const T* x = a.student.logits.row(i) + j0;
  T* out = a.out.row(i) + j0;
  Vec<T> slope = splat(c.slope);
  for (int64_t j = 0; j < n; j += L) {
    const int64_t count = n - j < L ? n - j : L;
    if constexpr (CAP) {
      Vec<T> raw = load_first(x + j, count);
      if constexpr (BIAS) raw += load_first(a.student.bias + j0 + j, count);
      temper<true, T>(raw, c, slope);
    }
    Vec<T> d = load(g + j) * slope;
    if (a.accumulate) d += load_first(out + j, count);
    store_first<T>(out + j, d, count);
  }
}

// The two log-probs of one row, a stretch of columns at a time: f(first column, columns, at), at(k) being the points from the k-th on.
template <class T, class F>
RLAD_INLINE void for_stretches(const DivergenceArgs<T>& a, int64_t i, T* zq, T* zp, F f) {
  const T top_q = a.norm.row(0)[i], log_q = a.norm.row(1)[i], top_p = a.teacher_norm.row(0)[i], log_p = a.teacher_norm.row(1)[i];
  const auto at = [&](int64_t k) { return point<T>((load(zq + k) - top_q) - log_q, (load(zp + k) - top_p) - log_p); };
  for (int64_t j0 = 0; j0 < a.student.cols; j0 += kStretch) {
    const int64_t n = a.student.cols - j0 < kStretch ? a.student.cols - j0 : kStretch;
    temper_row(a.student, i, j0, n, zq);
    temper_row(a.teacher, i, j0, n, zp);
    f(j0, n, at);
  }
}

// Σ term(point) over a row's columns with mass.
template <class T, class F>
RLAD_INLINE double row_sum(const DivergenceArgs<T>& a, int64_t i, T* zq, T* zp, F term) {
  double total = 0;
  for_stretches(a, i, zq, zp, [&](int64_t, int64_t n, auto at) {
    Vec<T> sum[kUnroll<T>];
    for (int u = 0; u < kUnroll<T>; ++u) sum[u] = Vec<T>{};
    for (int64_t j = 0; j < round_up(n, kBlock<T>); j += kBlock<T>) {
      for (int u = 0; u < kUnroll<T>; ++u) {
        const Point<T> x = at(j + u * kLanes<T>);
        sum[u] += dead<T>(x) ? Vec<T>{} : term(x);
      }
    }
    total += sum_lanes<T>(sum);
  });
  return total;
}

// A row's normaliser; false where no column has mass on both sides, so that there is no p_τ.
template <class T>
bool normalise(Taid<T>& f, const DivergenceArgs<T>& a, int64_t i, T* zq, T* zp) {
  Vec<T> top[kUnroll<T>];
  for (int u = 0; u < kUnroll<T>; ++u) top[u] = splat<T>(-kInf<T>);
  const double tilt = row_sum(a, i, zq, zp, [&](const Point<T>& x) {
    const Vec<T> mixed = f.mixed(x);
    top[0] = mixed > top[0] ? mixed : top[0];
    return f.tilt(x);
  });
  f.far = tilt < -0.5;
  if (f.far) {
    f.top = max_lanes<T>(top);
    f.log_z = T(std::log(row_sum(a, i, zq, zp, [&](const Point<T>& x) { return f.scaled(x); })));
  } else {
    f.log_z = T(std::log1p(tilt));
  }
  return f.top != -kInf<T>;
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
  const bool grad = a.out.data;
  alignas(64) T zq[kScratch], zp[kScratch];
  std::vector<T> found(grad ? round_up(a.student.cols, kBlock<T>) : 0);  // u of a row, kept from the sums for the gradient
  for (int64_t i = begin; i < end; ++i) {
    const T value_weight = a.rows.row(0)[i], grad_weight = a.rows.row(1)[i];
    F f(a, i);
    bool pull = grad && grad_weight != 0;
    RowSums sums;
    bool exists = true;
    if constexpr (std::is_same_v<F, Taid<T>>) exists = normalise(f, a, i, zq, zp);
    if (!exists) {
      sums.value = sums.u = kInf<double>;
    } else if (value_weight != 0 || pull) {
      for_stretches(a, i, zq, zp, [&](int64_t j0, int64_t n, auto at) {
        Vec<T> values[kUnroll<T>], us[kUnroll<T>], other_us[kUnroll<T>], other_qs[kUnroll<T>];
        for (int u = 0; u < kUnroll<T>; ++u) values[u] = us[u] = other_us[u] = other_qs[u] = Vec<T>{};
        for (int64_t j = 0; j < round_up(n, kBlock<T>); j += kBlock<T>) {
          for (int u = 0; u < kUnroll<T>; ++u) {
            const Point<T> x = at(j + u * L);
            const Part<T> part = part_of<T>(f, x);
            values[u] += part.value;
            us[u] += part.u;
            if (!pull) continue;
            other_us[u] += dominant<T>(x.q) ? Vec<T>{} : part.u;
            other_qs[u] += dominant<T>(x.q) ? Vec<T>{} : x.q;
            store<T>(&found[j0 + j + u * L], part.u);
          }
        }
        sums.value += sum_lanes<T>(values);
        sums.u += sum_lanes<T>(us);
        sums.other_u += sum_lanes<T>(other_us);
        sums.other_q += sum_lanes<T>(other_qs);
      });
    }
    const T term = value_weight == 0 ? T(0) : T(value_weight * sums.value);
    a.value[i] = a.accumulate ? a.value[i] + term : term;
    const T total = T(sums.u), most = T(sums.u * sums.other_q - sums.other_u);
    // An infinite divergence without a finite gradient sends none; NaN logits still show.
    if (!std::isfinite(total) && !std::isnan(sums.value)) pull = false;
    if (grad && !pull && !a.accumulate) std::memset(a.out.row(i), 0, a.student.cols * sizeof(T));
    if (!pull) continue;
    const T top = a.norm.row(0)[i], log_total = a.norm.row(1)[i];
    for (int64_t j0 = 0; j0 < a.student.cols; j0 += kStretch) {
      const int64_t n = a.student.cols - j0 < kStretch ? a.student.cols - j0 : kStretch;
      temper_row(a.student, i, j0, n, zq);
      for (int64_t k = 0; k < round_up(n, L); k += L) {
        const Vec<T> q = exp_clamped(clamp_exp<T>((load(zq + k) - top) - log_total));
        const Vec<T> dz = dominant<T>(q) ? splat(most) : load(&found[j0 + k]) - q * total;
        store<T>(zp + k, dz * grad_weight);
      }
      with_flag(a.student.softcap > 0, [&](auto cap) {
        with_flag(a.student.bias, [&](auto bias) { chain<cap.value, bias.value>(a, i, j0, n, zp); });
      });
    }
  }
}

template <class T>
void divergence(const DivergenceArgs<T>& a, int64_t begin, int64_t end) {
  switch (a.family) {
    case Family::sym: return divergence_rows<Sym<T>>(a, begin, end);
    case Family::mix: return divergence_rows<Mix<T>>(a, begin, end);
    case Family::todi: return divergence_rows<Todi<T>>(a, begin, end);
    case Family::alpha_beta: return divergence_rows<AlphaBeta<T>>(a, begin, end);
    case Family::taid: return divergence_rows<Taid<T>>(a, begin, end);
    case Family::log_square: return divergence_rows<LogSquare<T>>(a, begin, end);
    case Family::total_variation: return divergence_rows<TotalVariation<T>>(a, begin, end);
  }
}

}  // namespace rlad::RLAD_ISA
