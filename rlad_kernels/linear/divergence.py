"""Full-vocabulary divergences between student and teacher, both from hidden states: exact distillation without logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlad_kernels.core.check import is_number
from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.modes import numbers
from rlad_kernels.core.reduction import keep_mask, token_weights
from rlad_kernels.core.types import LossOutput
from rlad_kernels.engine.call import Call, check_states, flat_call
from rlad_kernels.engine.divergence import OnChunk, divergence_loss_op, divergence_op, flat_teachers, run
from rlad_kernels.engine.loss import FusedLoss
from rlad_kernels.losses.divergence_kinds import DIVERGENCES, parameters
from rlad_kernels.losses.ratio.surrogate import per_token

Heads = LMHead | Sequence[LMHead]


Tensors = Tensor | Sequence[Tensor]


Weights = Sequence[float | Tensor] | None


class _Prepared(NamedTuple):
    student: Call
    teachers: list[Call]
    weights: Tensor  # (T, N)
    keep: Tensor | None  # (N,) rows to compute; None is all
    mask: Tensor  # bool in the tokens' shape


def _teachers(name: str, hidden: Tensor, student: Call, teacher_hidden: Tensors, teacher_head: Heads) -> list[Call]:
    hiddens = list(teacher_hidden) if isinstance(teacher_hidden, Sequence) else [teacher_hidden]
    heads = list(teacher_head) if isinstance(teacher_head, Sequence) else [teacher_head]
    if len(hiddens) != len(heads) or not heads:
        raise ValueError(f"{name}: teacher_hidden holds {len(hiddens)} teachers, teacher_head {len(heads)}; wanted as many")
    found = []
    for i, (h, head) in enumerate(zip(hiddens, heads, strict=True)):
        who = f"{name} (teacher)" if len(heads) == 1 else f"{name} (teacher {i})"
        check_states(who, h, head)
        call = flat_call(who, h.detach(), head)
        if h.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(f"{who}: teacher_hidden has shape {tuple(h.shape)}, wanted {(*hidden.shape[:-1], 'D')}")
        if h.device != hidden.device:
            raise ValueError(f"{who}: teacher_hidden is on {h.device}, hidden on {hidden.device}; they must share a device")
        if call.vocab_size != student.vocab_size:
            raise ValueError(
                f"{who}: the student's head has {student.vocab_size} tokens, the teacher's {call.vocab_size}; "
                "give both heads the tokenizer's size, LMHead(vocab_size=…)"
            )
        found.append(call._replace(weight=call.weight.detach(), bias=None if call.bias is None else call.bias.detach()))
    return found


def _weights(name: str, like: Tensor, teachers: int, teacher_weights: Weights, weights: Tensor | None, scale: float) -> Tensor:
    """``(T, N)``: scale × teacher's weight × token's weight."""
    if teacher_weights is None:
        if teachers > 1:
            shape = tuple(like.shape)
            raise ValueError(f"{name}: {teachers} teachers need teacher_weights, a float or a tensor {shape} each, got None")
        teacher_weights = [1.0]
    if not isinstance(teacher_weights, Sequence) or len(teacher_weights) != teachers:
        got = len(teacher_weights) if isinstance(teacher_weights, Sequence) else type(teacher_weights).__name__
        raise ValueError(f"{name}: teacher_weights must have one entry a teacher, {teachers}, got {got}")
    if not (is_number(scale) and -math.inf < scale < math.inf):
        raise ValueError(f"{name}: scale must be finite, got {scale!r}")
    factor = scale if weights is None else scale * per_token(name, "weights", weights, like)
    for w in teacher_weights:
        if not isinstance(w, Tensor) and not is_number(w):
            raise ValueError(f"{name}: teacher_weights must hold floats or tensors {tuple(like.shape)}, got {w!r}")
    tensors = (w if isinstance(w, Tensor) else torch.ones_like(like) * w for w in teacher_weights)
    return torch.stack([(per_token(name, "teacher_weights", w, like) * factor).reshape(-1) for w in tensors])


def _prepare(
    name: str, hidden: Tensor, head: LMHead, teacher_hidden: Tensors, teacher_head: Heads, teacher_weights: Weights,
    weights: Tensor | None, scale: float, mask: Tensor | None,
) -> _Prepared:  # fmt: skip
    student = flat_call(name, hidden, head)
    teachers = _teachers(name, hidden, student, teacher_hidden, teacher_head)
    like = torch.empty(hidden.shape[:-1], dtype=acc_dtype(student.hidden.dtype), device=hidden.device)
    kept = keep_mask(name, mask, like)
    rows = _weights(name, like, len(teachers), teacher_weights, weights, scale)
    keep = None if mask is None else kept.reshape(-1)
    if weights is not None or any(isinstance(w, Tensor) or w == 0 for w in teacher_weights or ()):
        live = (rows != 0).any(0)  # a token without weight is not computed
        keep = live if keep is None else keep & live
    return _Prepared(student, teachers, rows if keep is None else torch.where(keep, rows, 0), keep, kept)


def linear_divergence(
    hidden: Tensor, head: LMHead, teacher_hidden: Tensors, teacher_head: Heads, *, divergence: str = "forward_kl",
    alpha: float | None = None, beta: float | None = None, lam: float | None = None, mu: float | None = None,
    tau: float | None = None, teacher_weights: Weights = None, scale: float = 1.0, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """scale·D(p, q) over the whole vocabulary for every token, p the teacher's distribution and q the student's, without logits.

    Divergences (w = log p − log q; where a parameter is named, its default):

    - ``forward_kl`` Σp·w; ``reverse_kl`` −Σq·w; ``jeffreys`` their mean;
    - ``jsd``: β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q, beta=0.5 (GKD, arXiv 2306.13649). The formula tends to 0 at the ends;
      as in TRL and Liger, beta=0 is forward_kl and beta=1 reverse_kl;
    - ``skew_kl`` KL(p‖λp + (1−λ)q), ``skew_rkl`` KL(q‖(1−λ)p + λq), lam=0.1 (DistiLLM, arXiv 2402.03898);
    - ``alpha_beta``: −Σ[p^α q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)]/(αβ) and its limits at α, β, α+β = 0, alpha=0.2, beta=0.7
      (ABKD, arXiv 2505.04560); ``alpha``: the same with β = 1−α, alpha=0.5;
    - ``power``: Σp[(p/q)^λ − 1]/(λ(λ+1)), lam=2/3 (Cressie and Read); λ→0 is forward_kl, λ→−1 reverse_kl;
    - ``hellinger`` 1 − Σ√(pq); ``total_variation`` ½Σ|p − q|, gradient 0 where p = q;
    - ``todi``: Σ[σ·p·w − (1−σ)·q·w], σ = sigmoid(βw) held constant, beta=1 (ToDi, arXiv 2505.16297);
    - ``akl``: forward_kl and reverse_kl weighted by Σ|p − q| over the teacher's head (mass mu=0.5, ties with its last token
      included) and tail, held constant (AKL, arXiv 2404.02657); sorts the vocabulary of each token;
    - ``taid``: forward_kl to softmax((1−τ)·z_student + τ·z_teacher) held constant; tau in [0, 1] must be given (TAID, arXiv
      2501.16937).

    Args:
        hidden: ``(…, D)``, the student's, in its head's dtype (or under autocast).
        head: :class:`LMHead` of the student.
        teacher_hidden: ``(…, D')``, in the teacher's head's dtype, for example states that were cached (DeepSeek-V4's way). Several
            teachers: a sequence. A teacher never receives gradient.
        teacher_head: :class:`LMHead` of the teacher, with its own temperature, softcap, scale and bias; or a sequence. Both sides
            must have the same ``vocab_size``; weights may be padded differently.
        divergence: a name from the list.
        alpha, beta, lam, mu, tau: the divergence's parameters.
        teacher_weights: Σ_i w_i·D(p_i, q): a float or a tensor ``(…)`` for each teacher, needed with several. On CPU a teacher
            costs nothing in chunks of tokens where all its weights are 0: sort tokens by teacher.
        scale: factor on value and gradient (T² where a method asks for it).
        mask: bool or 0/1 ``(…)``; masked rows are never computed and exactly 0 in value and gradient.

    Returns:
        ``(…)`` float32 (float64 for float64), nats for the KL family; differentiable in hidden, weight and bias for any gradient
        of each token. Two products, and four in the backward, which computes the logits of both sides again; with a frozen head
        three in all. :func:`linear_divergence_loss` needs four in all. Equal logits give exactly 0. A column that is −inf on both
        sides counts 0.

        A token is inf where its divergence is, or is too large for float32: ``forward_kl`` where q = 0 < p (a column forbidden to
        the student alone), ``reverse_kl`` where p = 0 < q, ``jeffreys``, ``todi`` and ``akl`` either way, ``jsd``, the skew KLs and
        ``taid`` where their parameter makes them one of these (``taid`` also where no column has mass on both sides),
        ``alpha_beta``, ``alpha`` and ``power`` with a negative exponent, or at α = 0 or β = 0. An infinite token's gradient is the
        limit where that is finite (``forward_kl``: q − p), else exactly 0; never NaN, and it touches no other token's.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "linear_divergence"
    if not isinstance(divergence, str):
        names = [*DIVERGENCES]
        raise ValueError(f"{name}: divergence must be one of {names} (linear_divergence_loss takes callables), got {divergence!r}")
    values = parameters(name, divergence, {"alpha": alpha, "beta": beta, "lam": lam, "mu": mu, "tau": tau})
    ready = _prepare(name, hidden, head, teacher_hidden, teacher_head, teacher_weights, None, scale, mask)
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in ready.student[:3]]
    ahead = need == [True, False, False]
    value, _ = divergence_op(
        *ready.student[:3], ready.keep, *ready.student[3:], *flat_teachers(ready.teachers), ready.weights, divergence,
        numbers(*values), ahead, name,
    )  # fmt: skip
    return value.view(hidden.shape[:-1])


def linear_divergence_loss(
    hidden: Tensor, head: LMHead, teacher_hidden: Tensors, teacher_head: Heads, *, divergence: str | OnChunk = "forward_kl",
    alpha: float | None = None, beta: float | None = None, lam: float | None = None, mu: float | None = None,
    tau: float | None = None, teacher_weights: Weights = None, weights: Tensor | None = None, scale: float = 1.0,
    mask: Tensor | None = None, reduction: str = "token-mean", seq_ids: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """:func:`linear_divergence` reduced to a loss whose gradient is finished in the same sweep: four products in all, not six.

    Args:
        hidden, head, teacher_hidden, teacher_head, alpha, beta, lam, mu, tau, teacher_weights, scale, mask: as in
            :func:`linear_divergence`.
        divergence: a name; or ``f(student_logp, teacher_logp) -> (C,)``, your own in differentiable PyTorch on log-probs ``(C, V)``
            of a chunk of tokens, slower and with the memory of its temporaries.
        weights: ``(…)`` factor on each token's loss, without gradient; tokens of weight 0 are not computed, but count in the means.
        reduction, seq_ids, denominator: as in :func:`grpo_loss`.

    Returns:
        LossOutput. ``loss.backward()`` can run once. With grad disabled the call costs two products and allocates no gradient; a
        frozen head or frozen hidden states skip their product. Metrics: infinite, the fraction of kept tokens whose loss is
        (then the loss is, too; such tokens' gradients as in :func:`linear_divergence`).

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "linear_divergence_loss"
    given = {"alpha": alpha, "beta": beta, "lam": lam, "mu": mu, "tau": tau}
    values: list[float] = []
    if isinstance(divergence, str) or not callable(divergence):
        values = parameters(name, divergence, given)
    elif any(x is not None for x in given.values()):
        raise ValueError(f"{name}: alpha, beta, lam, mu and tau belong to a named divergence, got a callable")
    ready = _prepare(name, hidden, head, teacher_hidden, teacher_head, teacher_weights, weights, scale, mask)
    shape = hidden.shape[:-1]
    row_weight = token_weights(name, ready.mask, reduction, seq_ids, denominator, ready.weights.dtype).reshape(-1)
    need = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in ready.student[:3])
    student, teachers = ready.student, ready.teachers
    if isinstance(divergence, str) and torch.compiler.is_compiling():
        loss, token, *_ = divergence_loss_op(
            *student[:3], ready.keep, *student[3:], *flat_teachers(teachers), ready.weights, divergence, numbers(*values),
            row_weight, *need, name,
        )  # fmt: skip
        return _output(loss, token.detach().view(shape), ready.mask)

    kind = DIVERGENCES[divergence].kind(*values) if isinstance(divergence, str) else divergence

    def sweep(h: Tensor, w: Tensor, b: Tensor | None, need: tuple[bool, bool, bool]):
        call = student._replace(hidden=h, weight=w, bias=b)
        return run(name, call, teachers, ready.weights, kind, ready.keep, row_weight, need)

    if any(need):
        loss, token, *_ = FusedLoss.apply(*student[:3], name, sweep)
    else:
        loss, token, *_ = sweep(*student[:3], (False, False, False))
    return _output(loss, token.view(shape), ready.mask)


def _output(loss: Tensor, token: Tensor, mask: Tensor) -> LossOutput:
    return LossOutput(loss, token, {"infinite": token.isinf().sum() / mask.sum().clamp_min(1)})
