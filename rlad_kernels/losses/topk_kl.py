"""Truncated KL on the teacher's top-K support: reverse or forward, four normalisations (arXiv 2603.25562, 2603.07079)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlad_kernels.losses.ratio import per_token
from rlad_kernels.losses.reduction import LossOutput, keep_mask, reduce, token_weights
from rlad_kernels.moments import first_occurrence
from rlad_kernels.ops import autograd_inside
from rlad_kernels.scores import LMHead, TopK, check_k, gather, score

DIRECTIONS = ("reverse", "forward")
NORMALIZE = ("both", "teacher", "none", "tail")
_LOG_FLOOR = -23 * math.log(2)  # smallest student tail mass told from 1 − Σ in float32: 2^-23


def topk_kl_tokens(
    topk_logp: Tensor, ids: Tensor, teacher_logp: Tensor, tail_logp: Tensor | None, teacher_tail: Tensor | None, direction: str,
    normalize: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Σ_S q(log q − log p) (reverse) or Σ_S p(log p − log q) (forward) per token; metrics ``(4, N)``. All tensors ``(N, K)``.

    S: slots with a real id (≥ 0, no earlier duplicate) and a finite teacher value. An empty S gives 0.
    """
    finite = teacher_logp.isfinite()
    valid = first_occurrence(ids) & finite
    invalid = ((ids >= 0) & ~finite).any(1)
    some = valid.any(1)
    # A row without a support becomes one fake slot of log-prob 0 on both sides: no loss, no NaN from an empty logsumexp.
    inside = valid | ~some.unsqueeze(1) & (torch.arange(ids.shape[1], device=ids.device) == 0)
    lq = torch.where(valid, topk_logp, torch.where(inside, 0.0, -torch.inf))
    lp = torch.where(valid, teacher_logp, torch.where(inside, 0.0, -torch.inf))
    student_mass = torch.where(some, lq.detach().exp().sum(1), 0)
    teacher_mass = torch.where(some, lp.exp().sum(1), 0)
    clamped = torch.zeros_like(some)
    tail = torch.zeros_like(student_mass)
    if normalize == "tail":
        if teacher_tail is None:
            raise ValueError("topk_kl_loss: normalize='tail' needs teacher.tail_logp, got None")
        invalid = invalid | teacher_tail.isnan() | (teacher_tail == torch.inf)
        if tail_logp is None:
            total = lq.logsumexp(1)
            clamped = some & ~(total < math.log1p(-(2.0**-23)))
            tail_logp = torch.where(clamped, _LOG_FLOOR, torch.log(-torch.expm1(torch.where(clamped | ~some, -1.0, total))))
        use = some & teacher_tail.isfinite()
        tail = _term(torch.where(use, tail_logp, -torch.inf), torch.where(use, teacher_tail, -torch.inf), direction)
    if normalize == "both":
        lq = lq.log_softmax(1)
    if normalize in ("both", "teacher"):
        lp = lp.log_softmax(1)
    loss = torch.where(some, _term(lq, lp, direction).sum(1) + tail, 0)
    rows = (student_mass, teacher_mass, invalid.to(loss.dtype), clamped.to(loss.dtype))
    return loss, torch.stack(rows)


def _term(lq: Tensor, lp: Tensor, direction: str) -> Tensor:
    """One slot's q(lq − lp) or p(lp − lq), with 0·(−∞) = 0 in value and gradient."""
    live = (lq if direction == "reverse" else lp) > -torch.inf
    lq, lp = torch.where(live, lq, 0.0), torch.where(live, lp, 0.0)
    return torch.where(live, lq.exp() * (lq - lp) if direction == "reverse" else lp.exp() * (lp - lq), 0.0)


def topk_kl_cpu(
    topk_logp: Tensor, ids: Tensor, teacher_logp: Tensor, tail_logp: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements ``rlad::topk_kl`` on CPU: the per-token loss, its derivatives and the metrics."""
    with autograd_inside():
        lq = topk_logp.detach().requires_grad_()
        tail = None if tail_logp is None else tail_logp.detach().requires_grad_()
        loss, metrics = topk_kl_tokens(lq, ids, teacher_logp, tail, *rest)  # type: ignore[arg-type]
        inputs = [lq] if tail is None else [lq, tail]
        grads = torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads[0], grads[1] if tail is not None else torch.zeros_like(loss.detach()), metrics


def topk_kl_loss_tokens(
    topk_logp: Tensor, *, ids: Tensor, teacher_logp: Tensor, tail_logp: Tensor | None = None, teacher_tail: Tensor | None = None,
    direction: str = "reverse", normalize: str = "both", scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """scale × the per-token loss and its metrics, on whichever backend the tensors' device has; tensors ``(N, K)``, ``(N,)``."""
    tails = (tail_logp, teacher_tail) if normalize == "tail" else (None, None)
    loss, _, _, rows = torch.ops.rlad.topk_kl(topk_logp, ids, teacher_logp, *tails, direction, normalize)
    metrics: dict[str, Tensor] = dict(zip(("student_mass", "teacher_mass", "invalid_teacher", "tail_clamped"), rows, strict=True))
    if normalize != "tail" or tail_logp is not None:
        del metrics["tail_clamped"]
    return loss * scale, metrics


def check_topk_options(name: str, teacher: TopK, direction: str, normalize: str) -> None:
    """Raise a ValueError that names the option, what came and what was wanted."""
    if direction not in DIRECTIONS:
        raise ValueError(f"{name}: direction must be one of {DIRECTIONS}, got {direction!r}")
    if normalize not in NORMALIZE:
        raise ValueError(f"{name}: normalize must be one of {NORMALIZE}, got {normalize!r}")
    if teacher.ids.shape != teacher.logp.shape:
        raise ValueError(f"{name}: teacher.ids has shape {tuple(teacher.ids.shape)}, teacher.logp {tuple(teacher.logp.shape)}")
    if teacher.ids.dim() < 1 or teacher.ids.is_floating_point() or teacher.ids.dtype == torch.bool:
        raise ValueError(f"{name}: teacher.ids must be integers (…, K), got {teacher.ids.dtype} {tuple(teacher.ids.shape)}")
    check_k(name, teacher.ids.shape[-1], None, "teacher.ids (…, K)")
    if normalize == "tail" and teacher.tail_logp is None:
        raise ValueError(f"{name}: normalize='tail' needs teacher.tail_logp, got None")


def teacher_rows(name: str, teacher: TopK, like: Tensor) -> dict[str, Tensor]:
    """The teacher's tensors, detached, checked against tokens in ``like``'s shape."""
    if teacher.ids.shape[:-1] != like.shape:
        raise ValueError(
            f"{name}: teacher.ids (…, K) has shape {tuple(teacher.ids.shape)}, wanted leading shape {tuple(like.shape)}"
        )
    rows = {"ids": teacher.ids.to(torch.int32), "teacher_logp": teacher.logp.detach().to(like.dtype)}
    if teacher.tail_logp is not None:
        rows["teacher_tail"] = per_token(name, "teacher.tail_logp", teacher.tail_logp, like)
    return rows


def topk_kl_loss(
    topk_logp: Tensor, teacher: TopK, mask: Tensor | None = None, *, tail_logp: Tensor | None = None, direction: str = "reverse",
    normalize: str = "both", scale: float = 1.0, reduction: str = "token-mean", seq_ids: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """Truncated KL between student q and teacher p on the teacher's K ids: Σ_S q(log q − log p), or Σ_S p(log p − log q).

    Args:
        topk_logp: student log-probs ``(…, K)`` at ``teacher.ids``, in nats; under ``normalize="both"`` raw logits do as well.
        teacher: TopK with ids and log-probs ``(…, K)``; id −1 is an empty slot, a later duplicate counts as empty, a
            non-finite teacher value takes its slot out of both supports and counts in ``invalid_teacher``.
        mask: bool or 0/1 ``(…)``; None is all.
        tail_logp: student log-mass outside the support ``(…)``, for ``normalize="tail"``. Without it 1 − Σ is used, clamped
            at 2^-23 with zero gradient there and counted as ``tail_clamped``.
        direction: ``reverse`` KL(q‖p) or ``forward`` KL(p‖q).
        normalize: ``both`` renormalises student and teacher over the support (arXiv 2603.25562), ``teacher`` only the teacher
            (EOPD, arXiv 2603.07079), ``none`` neither, ``tail`` adds one bucket with each side's tail mass (a non-finite
            teacher tail leaves the loss).
        scale: factor on value and gradient (T² where a method asks for it).
        reduction, seq_ids, denominator: as in :func:`grpo_loss`.

    Returns:
        LossOutput. Metrics: student_mass (Σ_S exp of ``topk_logp``), teacher_mass, invalid_teacher, tail_clamped.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    return kl_on_support(
        "topk_kl_loss", topk_logp, teacher, mask, tail_logp, direction, normalize, scale, reduction, seq_ids, denominator
    )


def kl_on_support(
    name: str, topk_logp: Tensor, teacher: TopK, mask: Tensor | None, tail_logp: Tensor | None, direction: str, normalize: str,
    scale: float, reduction: str, seq_ids: Tensor | None, denominator: float | Tensor | None,
) -> LossOutput:  # fmt: skip
    """:func:`topk_kl_loss` for a public function ``name``."""
    check_topk_options(name, teacher, direction, normalize)
    if topk_logp.shape != teacher.ids.shape:
        raise ValueError(f"{name}: topk_logp has shape {tuple(topk_logp.shape)}, teacher.ids {tuple(teacher.ids.shape)}")
    topk_logp = topk_logp if topk_logp.dtype == torch.float64 else topk_logp.float()
    like = topk_logp[..., 0].detach()
    keep = keep_mask(name, mask, like)
    rows = teacher_rows(name, teacher, like)
    rows["topk_logp"] = topk_logp
    if tail_logp is not None:
        if tail_logp.shape != like.shape:
            raise ValueError(f"{name}: tail_logp has shape {tuple(tail_logp.shape)}, wanted {tuple(like.shape)}")
        rows["tail_logp"] = tail_logp.to(like.dtype)
    wide = keep.unsqueeze(-1)
    flat = {k: torch.where(wide if x.dim() > keep.dim() else keep, x, 0).flatten(0, keep.dim() - 1) for k, x in rows.items()}
    loss, metrics = topk_kl_loss_tokens(**flat, direction=direction, normalize=normalize, scale=scale)
    weights = token_weights(name, keep, reduction, seq_ids, denominator, like.dtype)
    return reduce(loss.view_as(like), weights, keep, {k: x.view_as(like) for k, x in metrics.items()})


def linear_topk_kl_loss(
    hidden: Tensor, head: LMHead, teacher: TopK, mask: Tensor | None = None, *, direction: str = "reverse",
    normalize: str = "both", scale: float = 1.0, reduction: str = "token-mean", seq_ids: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """:func:`topk_kl_loss` from hidden states ``(…, D)``; ``normalize="both"`` reads K rows of the head a token, no sweep.

    Args, errors and metrics as in :func:`topk_kl_loss`; under ``both`` there is no ``student_mass``, which needs a sweep.
    """
    name = "linear_topk_kl_loss"
    check_topk_options(name, teacher, direction, normalize)
    options = (direction, normalize, scale, reduction, seq_ids, denominator)
    if teacher.ids.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"{name}: teacher.ids (…, K) has shape {tuple(teacher.ids.shape)}, hidden (…, D) {tuple(hidden.shape)}")
    if normalize == "both":
        z = gather(name, hidden, head, teacher.ids, mask=mask, ids_name="teacher.ids")
        out = kl_on_support(name, z, teacher, mask, None, *options)
        out.metrics.pop("student_mass")
        return out
    target = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    scores = score(name, hidden, head, target, topk_ids=teacher.ids, tail=normalize == "tail", mask=mask, ids_name="teacher.ids")
    assert scores.topk_logp is not None
    return kl_on_support(name, scores.topk_logp, teacher, mask, scores.tail_logp, *options)
