"""topk_kl: KL between student and teacher over the teacher's support, with its gradient and metrics."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._kernel import Case, R, add_kernel, ids, meta, sizes
from ._launch import config, launch, pick, require_dtype
from ._math import excess, exp, expm1, log1p

# By K. One row of slots per program; a warp handles the usual supports alone, without barriers. BLOCK_E earlier ids are
# compared at a time: BLOCK_K × BLOCK_E comparisons must fit in registers, beside what a wide block holds anyway.
TABLE = (
    config(32, 1, BLOCK_K=32, BLOCK_E=16),
    config(128, 1, BLOCK_K=128, BLOCK_E=8),
    config(1024, 8, BLOCK_K=1024, BLOCK_E=8),
    config(4096, 16, BLOCK_K=4096, BLOCK_E=2),
)

DIRECTIONS = ("reverse", "forward")
NORMALIZATIONS = ("both", "teacher", "none", "tail")
METRICS = ("student_mass", "teacher_mass", "invalid_teacher", "tail_clamped")
MIN_TAIL = tl.constexpr(2.0**-23)


@triton.jit
def _softmax(b_x, o_k):
    """(top, Σ e^{x−top} without the largest, softmax) of the slots, so that logsumexp = top + log1p(Σ); all 0 if all are −inf."""
    top = tl.max(b_x, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    b_e = exp(b_x - top)
    others = tl.sum(tl.where(o_k == tl.argmax(b_x, 0), 0.0, b_e), 0)
    return top, others, b_e / (1.0 + others)


@triton.jit
def _term(q, p, delta, REVERSE: tl.constexpr, SUMS_TO_ONE: tl.constexpr):
    """One slot's part of Σ q·δ (reverse) or −Σ p·δ (forward), δ = log q − log p, with 0·inf = 0.

    When q and p both sum to one, Σ(p − q) = 0 is added slot by slot: the terms become non-negative and of second order in
    δ, so that rounding in the normalisers no longer swamps a small KL.
    """
    if REVERSE:
        direct = tl.where(q == 0, 0.0, q * delta)
        near = q * excess(-delta)
        far = p - q + direct
    else:
        direct = tl.where(p == 0, 0.0, -p * delta)
        near = p * excess(delta)
        far = q - p + direct
    return tl.where(tl.abs(delta) < 1.0, near, far) if SUMS_TO_ONE else direct


@triton.jit
def _partial(q, p, delta, REVERSE: tl.constexpr):
    """∂/∂log q of one slot's term, log q taken as free."""
    return tl.where(q == 0, 0.0, q * (delta + 1.0)) if REVERSE else -p


@triton.jit
def _first_of_its_id(p_ids, b_id, o_k, K, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr):
    """True where no earlier slot of the row has the same id."""
    b_seen = tl.zeros([BLOCK_K], tl.int32)
    for e0 in range(0, K, BLOCK_E):
        o_e = e0 + tl.arange(0, BLOCK_E)
        b_e = tl.load(p_ids + o_e, mask=o_e < K, other=-1)
        m_same = (b_id[:, None] == b_e[None, :]) & (o_e[None, :] < o_k[:, None])
        b_seen += tl.sum(m_same.to(tl.int32), 1)
    return b_seen == 0


@triton.jit(do_not_specialize=["N", "K"])
def topk_kl_kernel(
    topk_logp,
    ids,
    teacher_logp,
    tail_logp,
    teacher_tail,
    loss,
    d_topk,
    d_tail,
    metrics,
    N,
    K,
    REVERSE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Σ q(log q − log p) or Σ p(log p − log q) over the valid slots (+ a tail bucket), ∂/∂topk_logp, ∂/∂tail_logp."""
    i_r = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    o_r = i_r * K + o_k
    b_id = tl.load(ids + o_r, mask=m_k, other=-1)
    b_lp = tl.load(teacher_logp + o_r, mask=m_k, other=0.0)
    b_lq = tl.load(topk_logp + o_r, mask=m_k, other=-float("inf"))
    m_finite = tl.abs(b_lp) < float("inf")  # false for NaN
    m_bad = (b_id >= 0) & (m_finite == 0)
    m_in = (b_id >= 0) & m_finite & _first_of_its_id(ids + i_r * K, b_id, o_k, K, BLOCK_K, BLOCK_E)
    any_in = tl.max(m_in.to(tl.int32), 0) > 0
    invalid = tl.max(m_bad.to(tl.float32), 0)
    b_lq = tl.where(m_in, b_lq, -float("inf"))
    b_lp = tl.where(m_in, b_lp, -float("inf"))
    tl.store(metrics + i_r, tl.sum(exp(b_lq), 0))
    tl.store(metrics + N.to(tl.int64) + i_r, tl.sum(exp(b_lp), 0))

    # Under a normalisation each side is taken relative to its top first, whose size (raw logits) then costs no digits, and
    # q and p are quotients, which sum to one.
    b_delta = b_lq - b_lp
    b_q = exp(b_lq)
    b_p = exp(b_lp)
    if NORMALIZE == "teacher":
        top_p, others_p, b_p = _softmax(b_lp, o_k)
        b_delta = b_lq - (b_lp - top_p) + log1p(others_p)
    if NORMALIZE == "both":
        top_p, others_p, b_p = _softmax(b_lp, o_k)
        top_q, others_q, b_q = _softmax(b_lq, o_k)
        b_delta = ((b_lq - top_q) - (b_lp - top_p)) - (log1p(others_q) - log1p(others_p))
    b_terms = _term(b_q, b_p, b_delta, REVERSE, NORMALIZE == "both")
    value = tl.sum(tl.where(m_in, b_terms, 0.0), 0)
    if NORMALIZE == "both":
        if REVERSE:  # no student mass at all: q sums to 0, not to one
            value = tl.where(tl.max(b_q, 0) == 0, 0.0, value)
        b_grad = tl.where(b_q == 0, 0.0, b_q * (b_delta - value)) if REVERSE else b_q - b_p
    else:
        b_grad = _partial(b_q, b_p, b_delta, REVERSE)

    g_tail = 0.0
    clamped = 0.0
    if NORMALIZE == "tail":
        lp_tail = tl.load(teacher_tail + i_r)
        invalid = tl.where((lp_tail != lp_tail) | (lp_tail == float("inf")), 1.0, invalid)
        m_tail = (tl.abs(lp_tail) < float("inf")) & any_in
        lp_tail = tl.where(m_tail, lp_tail, 0.0)
        if tail_logp is not None:
            lq_tail = tl.where(m_tail, tl.load(tail_logp + i_r), 0.0)
            q_tail = exp(lq_tail)
        else:
            _, others, _ = _softmax(b_lq, o_k)
            top = tl.max(b_lq, 0)
            q_tail = -expm1(top) - exp(top) * others  # 1 − Σ, without rounding Σ to the grid of floats next to 1
            m_clamp = q_tail <= MIN_TAIL
            clamped = tl.where(m_clamp & any_in, 1.0, 0.0)
            q_tail = tl.where(m_clamp, MIN_TAIL, q_tail)
            lq_tail = tl.where(q_tail < 0.5, tl.log(q_tail), log1p(-exp(top) * (1.0 + others)))
        p_tail = exp(lp_tail)
        gap = lq_tail - lp_tail
        value += tl.where(m_tail, _term(q_tail, p_tail, gap, REVERSE, False), 0.0)
        g_tail = tl.where(m_tail, _partial(q_tail, p_tail, gap, REVERSE), 0.0)
        if tail_logp is None:  # the residual mass hangs on the slots: ∂log(1 − Σe^lq)/∂lq_k = −q_k/q_tail
            b_grad -= b_q * (tl.where(m_clamp, 0.0, g_tail) / q_tail)
            g_tail = 0.0

    tl.store(loss + i_r, tl.where(any_in, value, 0.0))
    tl.store(d_topk + o_r, tl.where(m_in, b_grad, 0.0), mask=m_k)
    tl.store(d_tail + i_r, g_tail)
    tl.store(metrics + 2 * N.to(tl.int64) + i_r, invalid)
    tl.store(metrics + 3 * N.to(tl.int64) + i_r, clamped)


def topk_kl(
    topk_logp: torch.Tensor,
    ids: torch.Tensor,
    teacher_logp: torch.Tensor,
    tail_logp: torch.Tensor | None,
    teacher_tail: torch.Tensor | None,
    direction: str,
    normalize: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss (N,), ∂/∂topk_logp (N, K), ∂/∂tail_logp (N,), metrics (4, N) in the order of METRICS)."""
    require_dtype("topk_kl", topk_logp=topk_logp, teacher_logp=teacher_logp, tail_logp=tail_logp, teacher_tail=teacher_tail)
    if direction not in DIRECTIONS or normalize not in NORMALIZATIONS:
        raise ValueError(f"topk_kl: direction={direction!r}, normalize={normalize!r}, want {DIRECTIONS} and {NORMALIZATIONS}")
    if normalize == "tail" and teacher_tail is None:
        raise ValueError("topk_kl: teacher_tail is None, want (N,) float32 when normalize='tail'")
    n, k = topk_logp.shape
    tail = normalize == "tail"
    loss, d_tail = topk_logp.new_empty(n), topk_logp.new_empty(n)
    d_topk = torch.empty((n, k), dtype=torch.float32, device=topk_logp.device)
    metrics = topk_logp.new_empty((len(METRICS), n))
    launch(
        topk_kl_kernel,
        (n,),
        pick(TABLE, k),
        topk_logp.contiguous(),
        ids.contiguous(),
        teacher_logp.contiguous(),
        tail_logp.contiguous() if tail and tail_logp is not None else None,
        teacher_tail.contiguous() if tail and teacher_tail is not None else None,
        loss,
        d_topk,
        d_tail,
        metrics,
        n,
        k,
        REVERSE=direction == "reverse",
        NORMALIZE=normalize,
    )
    return loss, d_topk, d_tail, metrics


def cases() -> Iterator[Case]:
    modes = [(d, n, False) for d in DIRECTIONS for n in NORMALIZATIONS] + [(d, "tail", True) for d in DIRECTIONS]
    for i, k in enumerate(sizes(TABLE, 1024)):
        for direction, normalize, given in modes if i == 0 else modes[::3]:
            args = (meta(R, k), ids(R, k), meta(R, k), meta(R) if given else None, meta(R), direction, normalize)
            yield Case(f"K={k} {direction} {normalize} tail_logp={given}", topk_kl, args)


add_kernel(topk_kl_kernel, topk_kl, TABLE, cases, max_registers=128)
