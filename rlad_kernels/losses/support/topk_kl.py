"""Truncated KL on a support of K tokens, the teacher's top-K or another: directions, normalisations, clamps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlad_kernels.backends.contract import on_cpu
from rlad_kernels.core.check import check_choice, check_numbers, is_number
from rlad_kernels.core.modes import autograd_inside, ordinary, transformed
from rlad_kernels.core.token_loss import Batch, Metrics, Tensors, TokenLoss
from rlad_kernels.core.types import TokenScores, TopK
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.support.terms import CLAMP_GRADIENT, DIRECTIONS, NORMALIZE, topk_kl_tokens


@dataclass(frozen=True, kw_only=True)
class TopKKL(TokenLoss):
    """Truncated KL of student q and teacher p on K ids: Σ_S q(log q − log p), Σ_S p(log p − log q), their mixture, or JSD(β).

    Args:
        direction: ``reverse`` KL(q‖p), ``forward`` KL(p‖q), ``mixed`` β·KL(p‖q) + (1−β)·KL(q‖p), or ``jsd``
            β·KL(p‖m) + (1−β)·KL(q‖m) with m = βp + (1−β)q (GKD, arXiv 2306.13649). Where the student's log-prob of a
            slot is −∞ and the teacher's is not, ``forward`` and ``mixed`` are inf; their gradient is finite, −p at that slot.
        normalize: ``both`` renormalises student and teacher over the support (arXiv 2603.25562), ``teacher`` only the teacher
            (EOPD, arXiv 2603.07079; not with ``jsd``), ``none`` neither (the sum can be negative), ``tail`` adds one bucket
            with each side's tail mass (a non-finite teacher tail leaves the loss).
        scale: factor on value and gradient (T² where a method asks for it).
        beta: β of ``mixed`` and ``jsd``, inside (0, 1).
        log_ratio_clamp: c; each slot's log q − log p (as normalised) is clamped to [−c, c].
        logp_floor: log-probs of both sides below it are raised to it, before the teacher is renormalised; not with ``both``.
        clamp_gradient: what these clamps and ``loss_min``, ``loss_max`` do to the gradient where they bind. ``kill``: the
            clamped factor has none (as in verl and revisiting_opd: under a floor the forward KL no longer raises the tokens
            the student has forgotten, under the ratio clamp the reverse KL keeps only the gradient of its weight q).
            ``pass``: the value is clamped, the gradient goes straight through as if it were not.
        loss_min, loss_max: bounds on each token's loss, before ``scale``.
        outside_logp: L; adds Σ_{v∉S} q(log q − L) to the reverse KL, the teacher's log-prob being L on every token outside the
            support (NeMo-RL's ``zero_outside_topk``: −100). With ``normalize="teacher"``; reads the student's entropy.

    Tensors of a call:
        topk_logp: student log-probs ``(…, K)`` at ``teacher.ids``, in nats; under ``normalize="both"`` raw logits do as well, and
            :func:`linear_loss` reads K rows of the head a token, without a sweep. Of :class:`TokenScores` also ``tail_logp``, the
            log-mass outside the support, for ``normalize="tail"``: without it 1 − Σ is used, clamped at 2^-23 with zero gradient
            there and counted as ``tail_clamped``.
        teacher: :class:`TopK` with the teacher's ids and log-probs ``(…, K)`` (other supports: ``rk.supports``,
            :func:`linear_support`); id −1 is an empty slot, a later duplicate counts as empty, a non-finite teacher value
            takes its slot out of both supports and counts in ``invalid_teacher``.

    Metrics: student_mass (Σ_S exp of ``topk_logp``; not under ``both``, where that may be logits), teacher_mass,
    invalid_teacher, tail_clamped.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> teacher = rk.TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log(), tail_logp=torch.tensor([0.25]).log())
        >>> student = torch.tensor([[0.25, 0.25]]).log().requires_grad_()
        >>> out = rk.losses.TopKKL("reverse", normalize="tail")(student, teacher=teacher)
        >>> out.loss
        tensor(0.1733, grad_fn=<SumBackward0>)
    """

    direction: str = field(default="reverse", kw_only=False)
    normalize: str = "both"
    scale: float = 1.0
    beta: float = 0.5
    log_ratio_clamp: float | None = None
    logp_floor: float | None = None
    clamp_gradient: str = "kill"
    loss_min: float | None = None
    loss_max: float | None = None
    outside_logp: float | None = None

    needs = ("teacher",)
    reads = ("topk_logp",)

    def check(self) -> None:
        super().check()
        check_choice(self.name, "direction", self.direction, DIRECTIONS)
        check_choice(self.name, "normalize", self.normalize, NORMALIZE)
        check_choice(self.name, "clamp_gradient", self.clamp_gradient, CLAMP_GRADIENT)
        check_numbers(self.name, scale=self.scale)
        self._check_mixture()
        self._check_clamps()
        outside = self.outside_logp
        if outside is None:
            return
        finite = is_number(outside) and -math.inf < outside < math.inf
        if self.normalize != "teacher" or self.direction not in ("reverse", "mixed") or self.logp_floor is not None or not finite:
            raise ValueError(
                f"{self.name}: outside_logp must be finite and goes with normalize='teacher', direction 'reverse' or 'mixed' and "
                f"no logp_floor; got {outside!r} with {self.normalize!r}, {self.direction!r} and logp_floor={self.logp_floor!r}"
            )

    def _check_mixture(self) -> None:
        if not is_number(self.beta) or (self.direction in ("mixed", "jsd") and not 0 < self.beta < 1):
            raise ValueError(
                f"{self.name}: beta must be inside (0, 1) for direction={self.direction!r}, got {self.beta!r}; for the ends use "
                "'forward' or 'reverse'"
            )
        if self.direction == "jsd" and self.normalize == "teacher":
            raise ValueError(
                f"{self.name}: normalize='teacher' has no meaning for direction='jsd', whose mixture would lack the student's "
                "tail; wanted 'both', 'tail' or 'none'"
            )

    def _check_clamps(self) -> None:
        clamp, floor, low, high = self.log_ratio_clamp, self.logp_floor, self.loss_min, self.loss_max
        if clamp is not None and (not is_number(clamp) or not clamp > 0 or self.direction == "jsd"):
            raise ValueError(
                f"{self.name}: log_ratio_clamp must be positive and goes with a KL, got {clamp!r} for direction={self.direction!r}"
            )
        if floor is not None and (not is_number(floor) or not -math.inf < floor < 0 or self.normalize == "both"):
            raise ValueError(
                f"{self.name}: logp_floor must be negative and bounds log-probs, which normalize='both' does not need; got "
                f"{floor!r} with normalize={self.normalize!r}"
            )
        for argument, bound in (("loss_min", low), ("loss_max", high)):
            if bound is not None and not (is_number(bound) and -math.inf <= bound <= math.inf):
                raise ValueError(f"{self.name}: {argument} must be a number or None, got {bound!r}")
        if low is not None and high is not None and not low < high:
            raise ValueError(f"{self.name}: loss_min must be below loss_max, got {low!r} and {high!r}")

    @property
    def products(self) -> int:
        return 0 if self.normalize == "both" else 3

    @property
    def in_op(self) -> bool:
        """Whether ``rlad::topk_kl`` has these options, which is a kernel on CUDA."""
        plain = (self.log_ratio_clamp, self.logp_floor, self.loss_min, self.loss_max, self.outside_logp) == (None,) * 5
        return plain and self.direction in ("reverse", "forward")

    def read(self) -> tuple[str, ...]:
        return self.reads if self.outside_logp is None else (*self.reads, "entropy")

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        if self.normalize == "tail" and tensors["teacher"].tail_logp is None:
            raise ValueError(f"{batch.name}: normalize='tail' needs teacher.tail_logp, got None")
        return tensors

    def tokens(self, scores: TokenScores, *, teacher: TopK) -> tuple[Tensor, Metrics]:
        topk_logp, tail_logp, ids, logp = scores.topk_logp, scores.tail_logp, teacher.ids, teacher.logp
        in_tail = self.normalize == "tail"
        tails = (tail_logp, teacher.tail_logp) if in_tail else (None, None)
        if self.in_op and not transformed(topk_logp, logp, *tails):
            loss, _, _, rows = torch.ops.rlad.topk_kl(topk_logp, ids, logp, *tails, self.direction, self.normalize)
        else:
            loss, rows = topk_kl_tokens(topk_logp, ids, logp, tail_logp, teacher.tail_logp, scores.entropy, self)
        student_mass, teacher_mass, invalid, clamped = rows
        metrics = {} if self.normalize == "both" else {"student_mass": student_mass}
        metrics = {**metrics, "teacher_mass": teacher_mass, "invalid_teacher": invalid}
        return loss * self.scale, {**metrics, "tail_clamped": clamped} if in_tail and tail_logp is None else metrics


def topk_kl_cpu(
    topk_logp: Tensor,
    ids: Tensor,
    teacher_logp: Tensor,
    tail_logp: Tensor | None,
    teacher_tail: Tensor | None,
    direction: str,
    normalize: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements ``rlad::topk_kl`` on CPU: the per-token loss, its derivatives (0 in inference mode) and the metrics."""
    options = TopKKL(direction, normalize=normalize)
    if torch.is_inference_mode_enabled():
        loss, metrics = topk_kl_tokens(topk_logp, ids, teacher_logp, tail_logp, teacher_tail, None, options)
        return loss, torch.zeros_like(topk_logp), torch.zeros_like(loss), metrics
    rest = (ordinary(teacher_tail), None, options)
    with autograd_inside():
        lq = ordinary(topk_logp).detach().requires_grad_()
        tail = None if tail_logp is None else ordinary(tail_logp).detach().requires_grad_()
        loss, metrics = topk_kl_tokens(lq, ordinary(ids), ordinary(teacher_logp), tail, *rest)
        inputs = [lq] if tail is None else [lq, tail]
        grads = torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads[0], grads[1] if tail is not None else torch.zeros_like(loss.detach()), metrics


on_cpu("topk_kl", topk_kl_cpu)


def _add(name: str, loss: TopKKL, formula: str, paper: str, confidence: str = "A", **described: str) -> None:
    add_method(name, "top-k", loss, formula=formula, paper=paper, confidence=confidence, **described)


_add(
    "lsm",
    TopKKL(),
    "Σ_S q̂(log q̂ − log p̂), S = teacher's top-K, both renormalised",
    "arXiv 2603.25562",
    note="Nothing holds the mass outside S: its gradient there is exactly 0. y only sets the context.",
    published=(
        "Eq. 8: the mean over all tokens of the group, backpropagated without weights; K = 32 in the script (16 in another), no "
        "clamp of the log-ratio, factor 1; whether the context was sampled with top-p does not enter. The same here."
    ),
)
_add(
    "lsm_sampled",
    TopKKL(),
    "Σ_S q̂(log q̂ − log p̂), S = teacher's top-K ∪ {y} (with_sampled)",
    "arXiv 2603.25562",
    note="Pass rk.supports.with_sampled(teacher, target). The mass outside S is not held either.",
    published="The ablation that is best in the paper: as lsm, y appended where S lacks it. The same here.",
)
_add(
    "ta_opd",
    TopKKL(normalize="tail"),
    "Σ_S q log(q/p) + q_τ log(q_τ/p_τ), τ the tail as one bucket",
    "arXiv 2608.14728",
    "C",
    note="Holds the mass outside S, as one bucket.",
    published=(
        "Secondary sources: reverse KL on the teacher's top-K and one tail class; K and the reduction were not read (token mean "
        "here)."
    ),
)
_add(
    "verl_forward_kl_topk",
    TopKKL("forward", normalize="none", logp_floor=-10.0, loss_min=0.0, loss_max=10.0),
    "clip(Σ_S p(log p − log q), 0, 10), log-probs ≥ −10",
    "verl trainer/distillation",
    note="The floor and the clip kill the gradient where they bind.",
    published=(
        "0.9.1: token mean, top 128, log-probs of both at least −10, the sum cut to [0, 10], factor 1 beside the task's loss; no "
        "renormalising. The same here for any K."
    ),
)
_add(
    "nemo_rl_mixed",
    TopKKL("mixed"),
    "½KL(p̂‖q̂) + ½KL(q̂‖p̂) on S",
    "NeMo-RL DistillationLossFn",
    note="Nothing holds the mass outside S.",
    published=(
        "The config's defaults: kl_type mixed with weight 0.5, zero_outside_topk false, both sides log-softmaxed over the K "
        "logits, token mean over all ranks. The same here."
    ),
)
_add(
    "nemo_rl_zero_outside",
    TopKKL("mixed", normalize="teacher", outside_logp=-100.0),
    "½Σ_S p̂ log(p̂/q) + ½Σ_S q log(q/p̂) + ½Σ_{v∉S} q(log q + 100)",
    "NeMo-RL DistillationLossFn, zero_outside_topk",
    published=(
        "zero_outside_topk: the student's own log-probs, the teacher's over its K, −100 outside, no such term in the forward KL; "
        "token mean over all ranks. The same here."
    ),
)
_add(
    "ms_swift_topk",
    TopKKL("jsd"),
    "½KL(p̂‖m) + ½KL(q̂‖m), m = ½p̂ + ½q̂",
    "ms-swift gkd_loss",
    note="Nothing holds the mass outside S.",
    published=(
        "β = 0.5, both sides renormalised over the teacher's top-K after the temperature; its reduction was not read again (token "
        "mean here)."
    ),
)
_add(
    "trl_server_distillation",
    TopKKL("forward", normalize="tail"),
    "Σ_S p log(p/q) + p_τ log(p_τ/q_τ), τ the tail as one bucket",
    "TRL server_distillation",
    published=(
        "The trainer with beta = 0, where its default of 1 is the reverse KL on y alone; loss_add_tail (its default), loss_top_k "
        "from 1, token mean. The same here."
    ),
)
