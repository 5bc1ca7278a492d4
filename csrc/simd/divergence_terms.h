// The families of divergences, column by column: the term, and its derivative u with respect to log q.
//
// With w = log p − log q every term is q·φ(w), φ ≥ 0, φ(0) = φ'(0) = 0, and u = ∂L/∂log q = q·g(w), g(0) = 0, up to a multiple
// of q, which dL/dz = u − q·Σu does not see. Near w = 0 they come from series and from e^−|w| − 1, not from p − q, so small
// divergences keep their relative accuracy.

namespace rlad::RLAD_ISA {

template <class T>
struct Point {
  Vec<T> lq, lp, w;
};

template <class T>
struct Part {
  Vec<T> value, u, q;
};

template <class T>
RLAD_INLINE Point<T> point(Vec<T> lq, Vec<T> lp) {
  return {lq, lp, lp == lq ? Vec<T>{} : lp - lq};  // 0 also for a column without mass on either side
}

// Both masses from one of them and e^−|w|, so that their difference is as accurate as w.
template <class T>
struct Masses {
  decltype(Vec<T>{} > Vec<T>{}) up;  // where p > q
  Vec<T> high, low;                  // the larger and the smaller of p and q
  Vec<T> d, e, em1;                  // |w|, no more than matters; e^−d; e^−d − 1

  RLAD_INLINE explicit Masses(const Point<T>& x) : up(x.w > T(0)) {
    const Vec<T> log_high = up ? x.lp : x.lq, log_low = up ? x.lq : x.lp;
    d = magnitude<T>(x.w), d = d > -kExpLow<T> ? splat(-kExpLow<T>) : d;
    expm1_nonpositive(-d, em1, e);
    high = exp_log(log_high), low = log_low < kExpLow<T> ? Vec<T>{} : high * e;
  }

  RLAD_INLINE Vec<T> q() const { return up ? low : high; }
  RLAD_INLINE Vec<T> p() const { return up ? high : low; }
  RLAD_INLINE Vec<T> gap() const { return high * (up ? -em1 : em1); }  // p − q
};

template <class T>
RLAD_INLINE auto near_zero(Vec<T> w) {
  return magnitude<T>(w) < T(1);
}

// a·b, 0 where a is 0 though b may be infinite.
template <class T>
RLAD_INLINE Vec<T> times(Vec<T> a, Vec<T> b) {
  return a == T(0) ? Vec<T>{} : a * b;
}

// forward·KL(p‖q) + reverse·KL(q‖p)
template <class T>
struct Sym {
  T forward, reverse;
  Sym(T forward, T reverse) : forward(forward), reverse(reverse) {}
  Sym(const DivergenceArgs<T>& a, int64_t i) : forward(a.rows.row(2)[i]), reverse(a.rows.row(3)[i]) {}

  RLAD_INLINE Part<T> operator()(const Point<T>& x) const {
    Part<T> out{};
    const Masses<T> m(x);
    const auto near = near_zero<T>(x.w);
    const Vec<T> p = m.p(), q = m.q(), gap = m.gap();
    out.q = q;
    if (forward != 0) {
      out.value += (near ? p * x.w * x.w * excess_ratio(-x.w) : times<T>(p, x.w) - gap) * forward;
      out.u -= gap * forward;
    }
    if (reverse != 0) {
      const Vec<T> qw = times<T>(q, x.w);
      out.value += (near ? qw * x.w * excess_ratio(x.w) : gap - qw) * reverse;
      out.u -= qw * reverse;
    }
    return out;
  }
};

// a·KL(p‖m) + b·KL(q‖m), m = λp + (1 − λ)q, 0 < λ < 1. m is `high`·(1 + t) and `low`·e^mu.
template <class T>
struct Mix {
  T a, b, lambda, rest, bend;
  bool deep;
  Mix(const DivergenceArgs<T>& g, int64_t)
      : a(T(g.numbers[0])), b(T(g.numbers[1])), lambda(T(g.numbers[2])), rest(T(1 - g.numbers[2])) {
    const double c = g.numbers[2], own = g.numbers[0] * (1 - c), cross = g.numbers[1] * c;
    const bool jensen_shannon = g.numbers[0] == c && g.numbers[1] == 1 - c;  // contracted, the difference would not be 0
    bend = jensen_shannon ? T(0) : T((1 - c) * (own - cross));
    deep = lambda > T(0.5) || rest > T(0.5);
  }

  RLAD_INLINE Part<T> operator()(const Point<T>& x) const {
    const Masses<T> m(x);
    const Vec<T> share = m.up ? splat(rest) : splat(lambda), other = m.up ? splat(lambda) : splat(rest);
    const Vec<T> t = share * m.em1;
    Vec<T> excess = log1p_excess(t), nu = t - excess;  // log(1 + t)
    const auto far = t < T(-0.5);
    if (deep && any(far)) {
      const Vec<T> sum = other + share * m.e;
      nu = far ? log(sum, sum - T(1)) : nu;
      excess = far ? t - nu : excess;
    }
    const Vec<T> mu = m.d + nu, low_mu = m.low * mu;
    const Vec<T> low_excess = mu < T(1) ? low_mu * mu * excess_ratio_positive(mu) : -(m.high * m.em1 * other + low_mu);
    Part<T> out;
    out.value = m.high * excess * (m.up ? splat(a) : splat(b)) + low_excess * (m.up ? splat(b) : splat(a));
    out.q = m.q();
    out.u = (m.up ? low_mu : m.high * nu) * -b;
    if (bend != 0) out.u += out.q * (m.up ? m.em1 : -m.em1) / (far ? other + share * m.e : t + T(1)) * bend;
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
    const Masses<T> m(x);
    const Vec<T> q = m.q(), gap = m.gap();
    return {times<T>((gap + t * (m.high + m.low)) * T(0.5), x.w), -(sigma * gap + t * q + times<T>(other * q, x.w)), q};
  }
};

// −1/(αβ)·Σ[p^α·q^β − α/s·p^s − β/s·q^s], s = α + β, and its limits where one of α, β, s is 0. `swap` exchanges p and α with
// q and β in the value, so that α is the smaller one.
template <class T>
struct AlphaBeta {
  T alpha, inv_alpha, beta, s, inner, c_own, c_cross, c_base, c_slope;
  bool swap;
  AlphaBeta(const DivergenceArgs<T>& g, int64_t) {
    const double a = g.numbers[0], b = g.numbers[1], sum = a + b;
    swap = std::fabs(b) < std::fabs(a);
    const double in = swap ? b : a, out = swap ? a : b;
    alpha = T(a), inv_alpha = T(a == 0 ? 0 : 1 / a), beta = T(b), s = T(sum), inner = T(in);
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
    Vec<T> close{};
    const Vec<T> little = near ? w : Vec<T>{};
    if (c_own != 0) close += excess<T>(little * s) * c_own;
    if (c_cross != 0) close -= excess<T>(little * inner) * c_cross;
    out.value = times<T>(close, base);
    out.u = alpha == 0 ? -(qs == T(0) ? qs : times<T>(x.w, qs)) : -times<T>(expm1(x.w * alpha), qs) * inv_alpha;
    if (any(~near)) {
      Vec<T> cross{};
      if (alpha != 0 && beta != 0) {
        const Vec<T> lift = x.w * -beta, log_ps = x.lp * s;
        const auto safe = (magnitude<T>(lift) < T(40)) & (magnitude<T>(log_ps) < T(40));
        cross = ps * exp_all<T>(lift);
        // one exponent of large terms would round where two of smaller ones need not
        if (any(~safe)) cross = safe ? cross : exp_all<T>(x.lp * alpha + x.lq * beta);
      } else if (alpha != 0) {
        cross = ps;
      }
      Vec<T> far = base * c_base;
      if (c_own != 0) far += own * c_own;
      if (c_cross != 0) far -= cross * c_cross;
      if (c_slope != 0) far -= times<T>(base, w) * c_slope;
      far = (far == far) | (x.w != x.w) ? far : splat(kInf<T>);  // of powers that overflow the largest decides
      out.value = near ? out.value : far;
      if (alpha != 0) out.u = near ? out.u : (qs - cross) * inv_alpha;
    }
    // a negative power of no mass is infinite
    const auto dead = (x.lq == -kInf<T>) & (x.lp == -kInf<T>);
    return {dead ? Vec<T>{} : out.value, dead ? Vec<T>{} : out.u, exp_log(x.lq)};
  }
};

// KL(p_τ‖q) with p_τ ∝ q^(1−τ)·p^τ held constant, 0 < τ < 1. With z = Σq^(1−τ)·p^τ ≤ 1, log p_τ − log q = τw − log z: exact for
// close models, where z = 1 + Σ tilt. `far`, z small: log z = top + log_z, and the difference of log p_τ and log q themselves.
// Of a row log_z is given in rows[2], and top, 0 where it is not far, in rows[3].
template <class T>
struct Taid {
  T tau, top = 0, log_z = 0;
  bool far = false;
  explicit Taid(double tau) : tau(T(tau)) {}
  Taid(const DivergenceArgs<T>& a, int64_t i)
      : tau(T(a.numbers[0])), top(a.rows.row(3)[i]), log_z(a.rows.row(2)[i]), far(top != T(0)) {}

  RLAD_INLINE Vec<T> mixed(const Point<T>& x) const { return x.lq * (T(1) - tau) + x.lp * tau; }

  RLAD_INLINE Vec<T> tilt(const Point<T>& x) const {
    return Masses<T>(Point<T>{x.lq, mixed(x), x.w * tau}).gap();
  }

  RLAD_INLINE Vec<T> scaled(const Point<T>& x) const { return exp_log(mixed(x) - top); }

  RLAD_INLINE Part<T> operator()(const Point<T>& x) const {
    const Vec<T> lp = (mixed(x) - top) - log_z;
    const Vec<T> w = far ? (lp == x.lq ? Vec<T>{} : lp - x.lq) : x.w * tau - log_z;
    return Sym<T>(1, 0)({x.lq, lp, w});
  }
};

// ½·Σ(log p − log q)²: the αβ-divergence at α = β = 0
template <class T>
struct LogSquare {
  LogSquare(const DivergenceArgs<T>&, int64_t) {}
  RLAD_INLINE Part<T> operator()(const Point<T>& x) const { return {x.w * x.w * T(0.5), -x.w, exp_log(x.lq)}; }
};

// ½·Σ|p − q|, with gradient 0 where p = q
template <class T>
struct TotalVariation {
  TotalVariation(const DivergenceArgs<T>&, int64_t) {}
  RLAD_INLINE Part<T> operator()(const Point<T>& x) const {
    const Masses<T> m(x);
    const Vec<T> q = m.q(), half = q * T(0.5);
    return {m.high * m.em1 * T(-0.5), x.w > T(0) ? -half : x.w < T(0) ? half : x.w, q};
  }
};

}  // namespace rlad::RLAD_ISA
