"""Full-vocabulary divergences between student and teacher, both from hidden states: exact distillation without logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlad_kernels.core.check import is_number, needed_grad, token_rows
from rlad_kernels.core.divergence import Divergence
from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.modes import numbers
from rlad_kernels.core.reduction import Reduction, keep_mask, token_weights
from rlad_kernels.core.types import LossOutput
from rlad_kernels.engine.call import Call, check_states, flat_call
from rlad_kernels.engine.divergence import divergence_loss_op, divergence_op, flat_teachers, run
from rlad_kernels.engine.loss import Fused, FusedLoss
from rlad_kernels.engine.shards import columns_here

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
        here = [(c.first, columns_here(c.weight, c.vocab_size, c.first), c.group) for c in (call, student)]
        if here[0] != here[1]:
            told = (f"ids {f} to {f + n - 1} of group {g!r}" if g else "the whole head" for f, n, g in here)
            raise ValueError("{}: this rank has {} of the teacher, {} of the student; they must be cut alike".format(who, *told))
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
    factor = scale if weights is None else scale * token_rows(name, "weights", weights, like).to(like.dtype)
    for w in teacher_weights:
        if not isinstance(w, Tensor) and not is_number(w):
            raise ValueError(f"{name}: teacher_weights must hold floats or tensors {tuple(like.shape)}, got {w!r}")
    tensors = (w if isinstance(w, Tensor) else torch.ones_like(like) * w for w in teacher_weights)
    return torch.stack([(token_rows(name, "teacher_weights", w, like).to(like.dtype) * factor).reshape(-1) for w in tensors])


def _check_divergence(name: str, divergence: Any, head: LMHead) -> None:
    """Raise a ValueError unless this is a :class:`Divergence` that the head allows."""
    if not isinstance(divergence, Divergence):
        raise ValueError(f"{name}: divergence must be a Divergence (rk.losses.ForwardKL(), rk.losses.JSD(0.5)), got {divergence!r}")
    if isinstance(head, LMHead) and head.group is not None and divergence.kind() is None:
        raise ValueError(
            f"{name}: {divergence.name}.values reads all logits of a row, of which a rank of a head with group=… has a part; "
            "wanted a divergence of rk.losses, or whole heads"
        )


def _prepare(
    name: str, divergence: Any, hidden: Tensor, head: LMHead, teacher_hidden: Tensors, teacher_head: Heads,
    teacher_weights: Weights, weights: Tensor | None, scale: float, mask: Tensor | None,
) -> _Prepared:  # fmt: skip
    _check_divergence(name, divergence, head)
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
    hidden: Tensor, head: LMHead, teacher_hidden: Tensors, teacher_head: Heads, divergence: Divergence, *,
    teacher_weights: Weights = None, scale: float = 1.0, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """scale·D(p, q) over the whole vocabulary for every token, p the teacher's distribution and q the student's, without logits.

    Args:
        hidden: ``(…, D)``, the student's, in its head's dtype (or under autocast).
        head: :class:`LMHead` of the student.
        teacher_hidden: ``(…, D')``, in the teacher's head's dtype, for example states that were cached (DeepSeek-V4's way). Several
            teachers: a sequence. A teacher never receives gradient.
        teacher_head: :class:`LMHead` of the teacher, with its own temperature, softcap, scale and bias; or a sequence. Both sides
            must have the same ``vocab_size``; weights may be padded differently.
        divergence: one of ``rk.losses``: ForwardKL, ReverseKL, Jeffreys, JSD, SkewKL, SkewRKL, AlphaBeta, AlphaDivergence,
            PowerDivergence, Hellinger, TotalVariation, ToDi, AKL, TAID; or your own :class:`Divergence`.
        teacher_weights: Σ_i w_i·D(p_i, q): a float or a tensor ``(…)`` for each teacher, needed with several. On CPU a teacher
            costs nothing in chunks of tokens where all its weights are 0: sort tokens by teacher.
        scale: factor on value and gradient (T² where a method asks for it).
        mask: bool or 0/1 ``(…)``; masked rows are never computed and exactly 0 in value and gradient.

    Returns:
        ``(…)`` float32 (float64 for float64), nats for the KL family; differentiable in hidden, weight and bias for any gradient
        of each token. Two products, and four in the backward, which computes the logits of both sides again; with a frozen head
        three in all. :func:`linear_divergence_loss` needs four in all. Equal logits give exactly 0. A column that is −inf on both
        sides counts 0.

        A token is inf where its divergence is, or is too large for float32: the forward KL where q = 0 < p (a column forbidden to
        the student alone), the reverse KL where p = 0 < q, Jeffreys, ToDi and AKL either way, JSD, the skew KLs and TAID where
        their parameter makes them one of these (TAID also where no column has mass on both sides), the α and power families with
        a negative exponent, or at α = 0 or β = 0. An infinite token's gradient is the limit where that is finite (forward KL:
        q − p), else exactly 0; never NaN, and it touches no other token's.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.ForwardKL())
        tensor([0.1109])
    """
    name = "linear_divergence"
    ready = _prepare(name, divergence, hidden, head, teacher_hidden, teacher_head, teacher_weights, None, scale, mask)
    ahead = needed_grad(*ready.student[:3]) == (True, False, False)
    value, _ = divergence_op(
        *ready.student[:3], ready.keep, *ready.student[3:], *flat_teachers(ready.teachers), ready.weights, divergence.key,
        numbers(*divergence.numbers), ahead, name,
    )  # fmt: skip
    return value.view(hidden.shape[:-1])


def linear_divergence_loss(
    hidden: Tensor, head: LMHead, teacher_hidden: Tensors, teacher_head: Heads, divergence: Divergence, *,
    teacher_weights: Weights = None, weights: Tensor | None = None, scale: float = 1.0, mask: Tensor | None = None,
    reduction: str | Reduction = "token-mean",
) -> LossOutput:  # fmt: skip
    """:func:`linear_divergence` reduced to a loss whose gradient is finished in the same sweep: four products in all, not six.

    Args:
        hidden, head, teacher_hidden, teacher_head, divergence, teacher_weights, scale, mask: as in :func:`linear_divergence`; the
            divergence may be your own.
        weights: ``(…)`` factor on each token's loss, without gradient; tokens of weight 0 are not computed, but count in the means.
        reduction: a name, or :class:`Reduction`.

    Returns:
        LossOutput. ``loss.backward()`` can run once. With grad disabled the call costs two products and allocates no gradient; a
        frozen head or frozen hidden states skip their product. Metrics: infinite, the fraction of kept tokens whose loss is
        (then the loss is, too; such tokens' gradients as in :func:`linear_divergence`).

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> hidden, head = torch.ones(1, 1, requires_grad=True), rk.LMHead(torch.zeros(2, 1))
        >>> teacher = rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence_loss(hidden, head, torch.ones(1, 1), teacher, rk.losses.JSD(0.5)).loss.backward()
    """
    name = "linear_divergence_loss"
    ready = _prepare(name, divergence, hidden, head, teacher_hidden, teacher_head, teacher_weights, weights, scale, mask)
    shape = hidden.shape[:-1]
    chosen = Reduction.of(name, reduction, "token-mean")
    row_weight = token_weights(name, ready.mask, chosen, ready.weights.dtype).reshape(-1)
    student, teachers = ready.student, ready.teachers
    need = needed_grad(*student[:3])
    if torch.compiler.is_compiling():
        loss, token, *_ = divergence_loss_op(
            *student[:3], ready.keep, *student[3:], *flat_teachers(teachers), ready.weights, divergence.key,
            numbers(*divergence.numbers), row_weight, *need, name,
        )  # fmt: skip
        return _output(loss, token.detach().view(shape), ready.mask)

    def sweep(h: Tensor, w: Tensor, b: Tensor | None, need: tuple[bool, bool, bool]) -> Fused:
        call = student._replace(hidden=h, weight=w, bias=b)
        return run(name, call, teachers, ready.weights, divergence, ready.keep, row_weight, need)

    if any(need):
        loss, token, *_ = FusedLoss.apply(*student[:3], name, sweep)
    else:
        loss, token, *_ = sweep(*student[:3], need)
    return _output(loss, token.view(shape), ready.mask)


def _output(loss: Tensor, token: Tensor, mask: Tensor) -> LossOutput:
    return LossOutput(loss, token, {"infinite": token.isinf().sum() / mask.sum().clamp_min(1)})
