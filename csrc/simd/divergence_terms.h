// The families of divergences, column by column: the term, and its derivative u with respect to log q.
//
// With w = log p − log q every term is q·φ(w), φ ≥ 0, φ(0) = φ'(0) = 0, and u = ∂L/∂log q = q·g(w), g(0) = 0, up to a multiple
// of q, which dL/dz = u − q·Σu does not see. Near w = 0 both come from series, so small divergences keep their relative accuracy.

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
  Mix(const DivergenceArgs<T>& g, int64_t)
      : a(T(g.numbers[0])), b(T(g.numbers[1])), lambda(T(g.numbers[2])), rest(T(1 - g.numbers[2])) {}

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

}  // namespace rlad::RLAD_ISA
