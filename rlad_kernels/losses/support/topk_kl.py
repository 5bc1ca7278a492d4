"""Truncated KL on a support of K tokens, the teacher's top-K or another: directions, normalisations, clamps."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rlad_kernels.backends.contract import on_cpu
from rlad_kernels.core.check import check_k, check_numbers, check_tensor, integers, is_number
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.modes import autograd_inside, ordinary, transformed
from rlad_kernels.core.reduction import keep_mask, reduce, token_weights
from rlad_kernels.core.registry import add_method, register
from rlad_kernels.core.types import LossOutput, TokenScores, TopK, checked_topk
from rlad_kernels.linear.gather import gather
from rlad_kernels.linear.logp import score
from rlad_kernels.losses.ratio.surrogate import per_token
from rlad_kernels.losses.support.topk_terms import CLAMP_GRADIENT, DIRECTIONS, NORMALIZE, KLOptions, topk_kl_tokens


def topk_kl_cpu(
    topk_logp: Tensor, ids: Tensor, teacher_logp: Tensor, tail_logp: Tensor | None, teacher_tail: Tensor | None, direction: str,
    normalize: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements ``rlad::topk_kl`` on CPU: the per-token loss, its derivatives (0 in inference mode) and the metrics."""
    options = KLOptions(direction, normalize)
    if torch.is_inference_mode_enabled():
        loss, metrics = topk_kl_tokens(topk_logp, ids, teacher_logp, tail_logp, teacher_tail, None, options)
        return loss, torch.zeros_like(topk_logp), torch.zeros_like(loss), metrics
    given = tree_map_only(Tensor, ordinary, (topk_logp, ids, teacher_logp, tail_logp, teacher_tail))
    topk_logp, ids, teacher_logp, tail_logp, teacher_tail = given
    with autograd_inside():
        lq = topk_logp.detach().requires_grad_()
        tail = None if tail_logp is None else tail_logp.detach().requires_grad_()
        loss, metrics = topk_kl_tokens(lq, ids, teacher_logp, tail, teacher_tail, None, options)
        inputs = [lq] if tail is None else [lq, tail]
        grads = torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads[0], grads[1] if tail is not None else torch.zeros_like(loss.detach()), metrics


on_cpu("topk_kl", topk_kl_cpu)


def topk_kl_loss_tokens(
    topk_logp: Tensor, *, ids: Tensor, teacher_logp: Tensor, tail_logp: Tensor | None = None, teacher_tail: Tensor | None = None,
    entropy: Tensor | None = None, scale: float = 1.0, **options: object,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """scale × the per-token loss and its metrics; tensors ``(N, K)``, ``(N,)``; ``options`` are those of :class:`KLOptions`.

    What ``rlad::topk_kl`` has goes through it, on whichever backend the tensors' device has; the rest is PyTorch, and so it is
    under forward-mode AD and ``torch.func``.
    """
    chosen = KLOptions(**options)  # type: ignore[arg-type]
    in_tail = chosen.normalize == "tail"
    if chosen.in_op and not transformed(topk_logp, teacher_logp, tail_logp, teacher_tail):
        tails = (tail_logp, teacher_tail) if in_tail else (None, None)
        loss, _, _, rows = torch.ops.rlad.topk_kl(topk_logp, ids, teacher_logp, *tails, chosen.direction, chosen.normalize)
    else:
        loss, rows = topk_kl_tokens(topk_logp, ids, teacher_logp, tail_logp, teacher_tail, entropy, chosen)
    metrics: dict[str, Tensor] = dict(zip(("student_mass", "teacher_mass", "invalid_teacher", "tail_clamped"), rows, strict=True))
    if not in_tail or tail_logp is not None:
        del metrics["tail_clamped"]
    return loss * scale, metrics


@register("topk_kl")
def topk_kl_scores(scores: TokenScores, **inputs: object) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`topk_kl_loss` as a token loss; ``inputs`` as of :func:`topk_kl_loss_tokens`, the student's side from the sweep."""
    assert scores.topk_logp is not None
    return topk_kl_loss_tokens(scores.topk_logp, tail_logp=scores.tail_logp, entropy=scores.entropy, **inputs)  # type: ignore[arg-type]


def check_topk_options(name: str, teacher: TopK, options: KLOptions) -> None:
    """Raise a ValueError that names the option, what came and what was wanted."""
    check_kl_options(name, options)
    check_support(name, teacher)
    if options.normalize == "tail" and teacher.tail_logp is None:
        raise ValueError(f"{name}: normalize='tail' needs teacher.tail_logp, got None")


def check_support(name: str, teacher: TopK) -> None:
    """Raise a ValueError unless ids and log-probs are ``(…, K)`` of one shape."""
    checked_topk(name, "teacher", teacher)
    check_k(name, teacher.ids.shape[-1], None, "teacher.ids (…, K)")


def check_kl_options(name: str, options: KLOptions) -> None:
    """Raise a ValueError for an unknown option or a combination without a meaning."""
    direction, normalize, beta, clamp, floor, gradient, low, high, outside = options
    for argument, value, known in (
        ("direction", direction, DIRECTIONS), ("normalize", normalize, NORMALIZE), ("clamp_gradient", gradient, CLAMP_GRADIENT),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name}: {argument} must be one of {known}, got {value!r}")
    if not is_number(beta) or (direction in ("mixed", "jsd") and not 0 < beta < 1):
        raise ValueError(
            f"{name}: beta must be inside (0, 1) for direction={direction!r}, got {beta!r}; for the ends use 'forward' or 'reverse'"
        )
    if direction == "jsd" and normalize == "teacher":
        raise ValueError(
            f"{name}: normalize='teacher' has no meaning for direction='jsd', whose mixture would lack the student's tail; wanted "
            "'both', 'tail' or 'none'"
        )
    if clamp is not None and (not is_number(clamp) or not clamp > 0 or direction == "jsd"):
        raise ValueError(f"{name}: log_ratio_clamp must be positive and goes with a KL, got {clamp!r} for direction={direction!r}")
    if floor is not None and (not is_number(floor) or not -math.inf < floor < 0 or normalize == "both"):
        raise ValueError(
            f"{name}: logp_floor must be negative and bounds log-probs, which normalize='both' does not need; got {floor!r} with "
            f"normalize={normalize!r}"
        )
    for argument, bound in (("loss_min", low), ("loss_max", high)):
        if bound is not None and not (is_number(bound) and -math.inf <= bound <= math.inf):
            raise ValueError(f"{name}: {argument} must be a number or None, got {bound!r}")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"{name}: loss_min must be below loss_max, got {low!r} and {high!r}")
    if outside is None:
        return
    finite = is_number(outside) and -math.inf < outside < math.inf
    if normalize != "teacher" or direction not in ("reverse", "mixed") or floor is not None or not finite:
        raise ValueError(
            f"{name}: outside_logp must be finite and goes with normalize='teacher', direction 'reverse' or 'mixed' and no "
            f"logp_floor; got {outside!r} with {normalize!r}, {direction!r} and logp_floor={floor!r}"
        )


def teacher_rows(name: str, teacher: TopK, like: Tensor) -> dict[str, Tensor]:
    """The teacher's tensors, detached, checked against tokens in ``like``'s shape."""
    if teacher.ids.shape[:-1] != like.shape:
        raise ValueError(
            f"{name}: teacher.ids (…, K) has shape {tuple(teacher.ids.shape)}, wanted leading shape {tuple(like.shape)}"
        )
    rows = {"ids": integers(name, "teacher.ids", teacher.ids).to(torch.int32), "teacher_logp": teacher.logp.detach().to(like.dtype)}
    if teacher.tail_logp is not None:
        rows["teacher_tail"] = per_token(name, "teacher.tail_logp", teacher.tail_logp, like)
    return rows


def student_slots(name: str, argument: str, topk_logp: Tensor, teacher: TopK) -> Tensor:
    """Student log-probs at the support, float32 or float64, checked against the teacher's ids."""
    check_tensor(name, argument, topk_logp)
    if topk_logp.shape != teacher.ids.shape:
        raise ValueError(f"{name}: {argument} has shape {tuple(topk_logp.shape)}, teacher.ids {tuple(teacher.ids.shape)}")
    return topk_logp if topk_logp.dtype == torch.float64 else topk_logp.float()


def flat_kept(keep: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """``(…)`` and ``(…, K)`` tensors as ``(N,)`` and ``(N, K)``, 0 at masked tokens, whatever sits there."""
    if not keep.dim():  # a single token
        keep, rows = keep.unsqueeze(0), {k: x.unsqueeze(0) for k, x in rows.items()}
    wide = keep.unsqueeze(-1)
    return {k: torch.where(wide if x.dim() > keep.dim() else keep, x, 0).flatten(0, keep.dim() - 1) for k, x in rows.items()}


def topk_kl_loss(
    topk_logp: Tensor, teacher: TopK, mask: Tensor | None = None, *, tail_logp: Tensor | None = None, direction: str = "reverse",
    normalize: str = "both", scale: float = 1.0, reduction: str = "token-mean", seq_ids: Tensor | None = None,
    denominator: float | Tensor | None = None, beta: float = 0.5, log_ratio_clamp: float | None = None,
    logp_floor: float | None = None, clamp_gradient: str = "kill", loss_min: float | None = None, loss_max: float | None = None,
    outside_logp: float | None = None, entropy: Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """Truncated KL between student q and teacher p on K ids: Σ_S q(log q − log p), Σ_S p(log p − log q), their mixture, or JSD(β).

    Args:
        topk_logp: student log-probs ``(…, K)`` at ``teacher.ids``, in nats; under ``normalize="both"`` raw logits do as well.
        teacher: TopK with the teacher's ids and log-probs ``(…, K)`` (other supports: :func:`union`, :func:`with_sampled`,
            :func:`linear_support`, …); id −1 is an empty slot, a later duplicate counts as empty, a non-finite teacher value
            takes its slot out of both supports and counts in ``invalid_teacher``.
        mask: bool or 0/1 ``(…)``; None is all.
        tail_logp: student log-mass outside the support ``(…)``, for ``normalize="tail"``. Without it 1 − Σ is used, clamped
            at 2^-23 with zero gradient there and counted as ``tail_clamped``.
        direction: ``reverse`` KL(q‖p), ``forward`` KL(p‖q), ``mixed`` β·KL(p‖q) + (1−β)·KL(q‖p), or ``jsd``
            β·KL(p‖m) + (1−β)·KL(q‖m) with m = βp + (1−β)q (GKD, arXiv 2306.13649). Where the student's log-prob of a
            slot is −∞ and the teacher's is not, ``forward`` and ``mixed`` are inf; their gradient is finite, −p at that slot.
        normalize: ``both`` renormalises student and teacher over the support (arXiv 2603.25562), ``teacher`` only the teacher
            (EOPD, arXiv 2603.07079; not with ``jsd``), ``none`` neither (the sum can be negative), ``tail`` adds one bucket
            with each side's tail mass (a non-finite teacher tail leaves the loss).
        scale: factor on value and gradient (T² where a method asks for it).
        reduction, seq_ids, denominator: as in :func:`grpo_loss`.
        beta: β of ``mixed`` and ``jsd``, inside (0, 1).
        log_ratio_clamp: c; each slot's log q − log p (as normalised) is clamped to [−c, c].
        logp_floor: log-probs of both sides below it are raised to it, before the teacher is renormalised; not with ``both``.
        clamp_gradient: what these clamps and ``loss_min``, ``loss_max`` do to the gradient where they bind. ``kill``: the
            clamped factor has none (as in verl and revisiting_opd: under a floor the forward KL no longer raises the tokens
            the student has forgotten, under the ratio clamp the reverse KL keeps only the gradient of its weight q).
            ``pass``: the value is clamped, the gradient goes straight through as if it were not.
        loss_min, loss_max: bounds on each token's loss, before ``scale``.
        outside_logp: L; adds Σ_{v∉S} q(log q − L) to the reverse KL, the teacher's log-prob being L on every token outside the
            support (NeMo-RL's ``zero_outside_topk``: −100). With ``normalize="teacher"``; needs ``entropy``.
        entropy: the student's entropy over the whole vocabulary ``(…)``, differentiable; only for ``outside_logp``.

    Returns:
        LossOutput. Metrics: student_mass (Σ_S exp of ``topk_logp``), teacher_mass, invalid_teacher, tail_clamped.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    options = KLOptions(
        direction, normalize, beta, log_ratio_clamp, logp_floor, clamp_gradient, loss_min, loss_max, outside_logp
    )  # fmt: skip
    return kl_on_support(
        "topk_kl_loss", topk_logp, teacher, mask, tail_logp, entropy, options, scale, reduction, seq_ids, denominator
    )


def kl_on_support(
    name: str, topk_logp: Tensor, teacher: TopK, mask: Tensor | None, tail_logp: Tensor | None, entropy: Tensor | None,
    options: KLOptions, scale: float, reduction: str, seq_ids: Tensor | None, denominator: float | Tensor | None,
) -> LossOutput:  # fmt: skip
    """:func:`topk_kl_loss` for a public function ``name``."""
    check_topk_options(name, teacher, options)
    check_numbers(name, scale=scale)
    topk_logp = student_slots(name, "topk_logp", topk_logp, teacher)
    like = topk_logp[..., 0].detach()
    keep = keep_mask(name, mask, like)
    rows = teacher_rows(name, teacher, like)
    rows["topk_logp"] = topk_logp
    if options.outside_logp is not None and entropy is None:
        raise ValueError(f"{name}: outside_logp needs entropy (…), the student's over the whole vocabulary, got None")
    for argument, x in (("tail_logp", tail_logp), ("entropy", entropy)):
        if x is not None:
            check_tensor(name, argument, x)
            if x.shape != like.shape:
                raise ValueError(f"{name}: {argument} has shape {tuple(x.shape)}, wanted {tuple(like.shape)}")
            rows[argument] = x.to(like.dtype)
    loss, metrics = topk_kl_loss_tokens(**flat_kept(keep, rows), scale=scale, **options._asdict())
    weights = token_weights(name, keep, reduction, seq_ids, denominator, like.dtype)
    return reduce(loss.view_as(like), weights, keep, {k: x.view_as(like) for k, x in metrics.items()})


def linear_topk_kl_loss(
    hidden: Tensor, head: LMHead, teacher: TopK, mask: Tensor | None = None, *, direction: str = "reverse",
    normalize: str = "both", scale: float = 1.0, reduction: str = "token-mean", seq_ids: Tensor | None = None,
    denominator: float | Tensor | None = None, beta: float = 0.5, log_ratio_clamp: float | None = None,
    logp_floor: float | None = None, clamp_gradient: str = "kill", loss_min: float | None = None, loss_max: float | None = None,
    outside_logp: float | None = None,
) -> LossOutput:  # fmt: skip
    """:func:`topk_kl_loss` from hidden states ``(…, D)``; ``normalize="both"`` reads K rows of the head a token, no sweep.

    Args, errors and metrics as in :func:`topk_kl_loss`; under ``both`` there is no ``student_mass``, which needs a sweep.
    """
    name = "linear_topk_kl_loss"
    chosen = KLOptions(
        direction, normalize, beta, log_ratio_clamp, logp_floor, clamp_gradient, loss_min, loss_max, outside_logp
    )  # fmt: skip
    check_topk_options(name, teacher, chosen)
    check_tensor(name, "hidden", hidden)
    options = (chosen, scale, reduction, seq_ids, denominator)
    if teacher.ids.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"{name}: teacher.ids (…, K) has shape {tuple(teacher.ids.shape)}, hidden (…, D) {tuple(hidden.shape)}")
    if normalize == "both":
        z = gather(name, hidden, head, teacher.ids, mask=mask, ids_name="teacher.ids")
        out = kl_on_support(name, z, teacher, mask, None, None, *options)
        out.metrics.pop("student_mass")
        return out
    target = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    outside = outside_logp is not None
    scores = score(
        name, hidden, head, target, topk_ids=teacher.ids, tail=outside or normalize == "tail", entropy=outside, mask=mask,
        ids_name="teacher.ids",
    )  # fmt: skip
    assert scores.topk_logp is not None
    return kl_on_support(name, scores.topk_logp, teacher, mask, scores.tail_logp, scores.entropy, *options)


def _add(name: str, formula: str, paper: str, confidence: str = "A", products: int = 3, note: str = "", **options: object) -> None:
    add_method(
        name, "top-k", topk_kl_loss, formula=formula, needs=("teacher",), paper=paper, confidence=confidence, products=products,
        note=note, options=options,
    )  # fmt: skip


_LSM = {"normalize": "both", "products": 0}  # through linear_gather there is no product over the vocabulary
_NEMO = {"direction": "mixed", "beta": 0.5}
_add(
    "lsm", "Σ_S q̂(log q̂ − log p̂), S = teacher's top-K, both renormalised", "arXiv 2603.25562", **_LSM,
    note="Nothing holds the mass outside S: its gradient there is exactly 0. y only sets the context.",
)  # fmt: skip
_add(
    "lsm_sampled", "Σ_S q̂(log q̂ − log p̂), S = teacher's top-K ∪ {y} (with_sampled)", "arXiv 2603.25562", **_LSM,
    note="Pass rk.with_sampled(teacher, target). The mass outside S is not held either.",
)  # fmt: skip
_add(
    "ta_opd", "Σ_S q log(q/p) + q_τ log(q_τ/p_τ), τ the tail as one bucket", "arXiv 2608.14728", "C", normalize="tail",
    note="Holds the mass outside S, as one bucket.",
)  # fmt: skip
_add(
    "verl_forward_kl_topk", "clip(Σ_S p(log p − log q), 0, 10), log-probs ≥ −10", "verl trainer/distillation",
    direction="forward", normalize="none", logp_floor=-10.0, loss_min=0.0, loss_max=10.0,
    note="The floor and the clip kill the gradient where they bind.",
)  # fmt: skip
_add(
    "nemo_rl_mixed", "½KL(p̂‖q̂) + ½KL(q̂‖p̂) on S", "NeMo-RL DistillationLossFn", **_NEMO, **_LSM,
    note="Nothing holds the mass outside S.",
)  # fmt: skip
_add(
    "nemo_rl_zero_outside", "½Σ_S p̂ log(p̂/q) + ½Σ_S q log(q/p̂) + ½Σ_{v∉S} q(log q + 100)",
    "NeMo-RL DistillationLossFn, zero_outside_topk", **_NEMO, normalize="teacher", outside_logp=-100.0,
)  # fmt: skip
_add(
    "ms_swift_topk", "½KL(p̂‖m) + ½KL(q̂‖m), m = ½p̂ + ½q̂", "ms-swift gkd_loss", direction="jsd", beta=0.5, **_LSM,
    note="Nothing holds the mass outside S.",
)  # fmt: skip
_add(
    "trl_server_distillation", "Σ_S p log(p/q) + p_τ log(p_τ/q_τ), τ the tail as one bucket", "TRL server_distillation",
    direction="forward", normalize="tail",
)  # fmt: skip
