"""What teachers say: supports of a truncated loss, which ids and the log-probs there; and several teachers as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlad_kernels.core.check import check_tensor, integers, is_number, may_read
from rlad_kernels.core.types import TopK, checked_topk, first_occurrence

SAME = 0.01  # nats by which two sources of one teacher's log-prob may differ, in bfloat16 and across kernels


def union(teacher: TopK, other: TopK) -> TopK:
    """Ids of either support; both must hold the **teacher's** log-probs. K is the sum; an id of both keeps its first slot.

    A teacher that is served gives log-probs at its own K ids only: what it gives the student's other ids cannot be known, so
    use :func:`intersection` or :func:`with_sampled`. With the teacher's weights at hand, :func:`linear_support` scores the
    student's ids, and scoring ``union(a, b).ids`` once more gives the tail to the sweep's accuracy: here it is the smaller of
    the two tails less what the union adds, which loses the digits that the two share, and −∞ where nothing is left.

    Args:
        teacher, other: TopK of one shape but for K.

    Returns:
        TopK, its slots the teacher's and then the other's; lse, target_logp and entropy of whichever has them.

    Raises:
        ValueError: where the two disagree about an id (on CUDA with ``set_checks(True)``): one then holds other log-probs,
            the student's for instance.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> teacher = rk.TopK(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.25]]).log(), target_logp=torch.tensor([0.125]).log())
        >>> other = rk.TopK(torch.tensor([[1, 2]]), torch.tensor([[0.25, 0.125]]).log())
        >>> rk.supports.union(teacher, other).ids
        tensor([[ 3,  1, -1,  2]])
    """
    teacher, other = _pair("union", teacher, other)
    ids, logp = torch.cat([teacher.ids, other.ids], -1), torch.cat([teacher.logp, other.logp], -1)
    _agree("union", teacher, other)
    first = _first(ids)
    k = teacher.ids.shape[-1]
    tail = None
    if teacher.tail_logp is not None and other.tail_logp is not None:
        theirs = _first(other.ids)
        mine = ~_member(teacher.ids, other.ids) & _first(teacher.ids)  # what the other support lacks
        from_teacher = _less(teacher.tail_logp, logp[..., k:], first[..., k:])
        from_other = _less(other.tail_logp, teacher.logp, mine)
        tail = torch.where(teacher.tail_logp <= other.tail_logp, from_teacher, from_other)
        unknown = (theirs & other.logp.isnan()).any(-1) | (_first(teacher.ids) & teacher.logp.isnan()).any(-1)
        tail = torch.where(unknown, torch.nan, tail)
    either = {k: x if x is not None else getattr(other, k) for k, x in teacher._asdict().items()}
    return TopK(**{**either, "ids": torch.where(first, ids, -1), "logp": torch.where(first, logp, -torch.inf), "tail_logp": tail})


def intersection(teacher: TopK, ids: Tensor) -> TopK:
    """The teacher's slots whose id is also in ``ids (…, J)``, the student's top-K for instance; the others become empty.

    Needs no more of the teacher than its own K, so a served teacher will do. What leaves goes to the tail.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> teacher = rk.TopK(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.25]]).log(), target_logp=torch.tensor([0.125]).log())
        >>> rk.supports.intersection(teacher, torch.tensor([[1, 2]])).ids
        tensor([[-1,  1]])
    """
    teacher, ids = checked_topk("intersection", "teacher", teacher), integers("intersection", "ids", ids)
    if ids.dim() < 1 or ids.shape[:-1] != teacher.ids.shape[:-1]:
        raise ValueError(f"intersection: ids has shape {tuple(ids.shape)}, wanted {tuple(teacher.ids.shape[:-1])} and J")
    return _keep_slots(teacher, _member(teacher.ids, ids))


def symmetric_difference(teacher: TopK, other: TopK) -> TopK:
    """Ids of one support but not of both (thunlp/OPD's ``union-intersection``); arguments and errors as of :func:`union`.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> teacher = rk.TopK(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.25]]).log(), target_logp=torch.tensor([0.125]).log())
        >>> other = rk.TopK(torch.tensor([[1, 2]]), torch.tensor([[0.25, 0.125]]).log())
        >>> rk.supports.symmetric_difference(teacher, other).ids
        tensor([[ 3, -1, -1,  2]])
    """
    teacher, other = _pair("symmetric_difference", teacher, other)
    both = union(teacher, other)
    shared = _member(both.ids, teacher.ids) & _member(both.ids, other.ids)
    return _keep_slots(both, ~shared)


def with_sampled(teacher: TopK, target: Tensor, target_logp: Tensor | None = None) -> TopK:
    """The teacher's support and the sampled token y: one more slot, empty where y is in the support already (or −100).

    Args:
        teacher: TopK.
        target: ``(…)`` ints.
        target_logp: the teacher's log-prob of y ``(…)``; defaults to ``teacher.target_logp``.

    Returns:
        TopK with K + 1 slots; the tail is less by p(y) where y is new, −∞ where nothing is left.

    Raises:
        ValueError: without a ``target_logp``: no teacher's top-K says what lies outside it.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> teacher = rk.TopK(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.25]]).log(), target_logp=torch.tensor([0.125]).log())
        >>> rk.supports.with_sampled(teacher, torch.tensor([7])).ids
        tensor([[3, 1, 7]])
    """
    name = "with_sampled"
    teacher, target = checked_topk(name, "teacher", teacher), integers(name, "target", target)
    logp = teacher.target_logp if target_logp is None else target_logp
    if logp is None:
        raise ValueError(f"{name}: target_logp is None and teacher.target_logp too; the teacher's log-prob of y is needed")
    check_tensor(name, "target_logp", logp)
    shape = teacher.ids.shape[:-1]
    if target.shape != shape or logp.shape != shape:
        raise ValueError(
            f"{name}: target has shape {tuple(target.shape)}, target_logp {tuple(logp.shape)}, wanted {tuple(shape)} of teacher.ids"
        )
    one, logp = target.to(torch.int32).unsqueeze(-1), logp.detach().to(teacher.logp.dtype).unsqueeze(-1)
    new = (one >= 0) & ~_member(one, teacher.ids)
    tail = None if teacher.tail_logp is None else _less(teacher.tail_logp, logp, new)
    return teacher._replace(
        ids=torch.cat([teacher.ids, torch.where(new, one, -1)], -1),
        logp=torch.cat([teacher.logp, torch.where(new, logp, -torch.inf)], -1),
        tail_logp=tail,
        target_logp=logp.squeeze(-1),
    )


def probability_band(teacher: TopK, low: float | Tensor, high: float | Tensor, *, target: Tensor | None = None) -> TopK:
    """Only slots with low ≤ p ≤ high, and the target's: the high-density region of given bounds (after arXiv 2407.10068).

    The bounds are given; the published method learns them with a network that is not described well enough to port, so this
    is not it. Renormalisation is left to ``normalize=``.

    Args:
        teacher: TopK.
        low, high: bounds on the teacher's probability as given (not renormalised), floats or tensors ``(…)``.
        target: ``(…)`` ints; the target's slot stays whatever its probability.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> teacher = rk.TopK(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.25]]).log(), target_logp=torch.tensor([0.125]).log())
        >>> rk.supports.probability_band(teacher, 0.3, 1.0).ids
        tensor([[ 3, -1]])
    """
    name = "probability_band"
    teacher = checked_topk(name, "teacher", teacher)
    target = None if target is None else integers(name, "target", target)
    shape = teacher.ids.shape[:-1]
    for argument, bound in (("low", low), ("high", high), ("target", target)):
        if bound is not None and not isinstance(bound, Tensor) and not is_number(bound):
            raise ValueError(f"{name}: {argument} must be a number or a tensor {tuple(shape)}, got {bound!r}")
        if isinstance(bound, Tensor) and bound.shape not in (shape, ()):
            raise ValueError(f"{name}: {argument} has shape {tuple(bound.shape)}, wanted a number or {tuple(shape)}")
    low, high = (x.unsqueeze(-1) if isinstance(x, Tensor) else x for x in (low, high))
    p = teacher.logp.exp()
    inside = (p >= low) & (p <= high)
    return _keep_slots(teacher, inside if target is None else inside | (teacher.ids == target.unsqueeze(-1)))


def _keep_slots(teacher: TopK, keep: Tensor) -> TopK:
    """Slots outside ``keep (…, K)`` become empty; their mass goes to the tail."""
    dropped = ~keep & _first(teacher.ids)
    tail = teacher.tail_logp
    if tail is not None:
        out = torch.where(dropped, teacher.logp, -torch.inf)
        tail = torch.cat([tail.unsqueeze(-1), out], -1).logsumexp(-1)
    ids, logp = torch.where(keep, teacher.ids, -1), torch.where(keep, teacher.logp, -torch.inf)
    return teacher._replace(ids=ids, logp=logp, tail_logp=tail)


def _less(tail: Tensor, logp: Tensor, gone: Tensor) -> Tensor:
    """log(e^tail − Σ_{gone} e^logp) in float64, −∞ where nothing is left; NaN where a value that goes is NaN."""
    mass = torch.where(gone, logp, -torch.inf).double().logsumexp(-1) - tail.double()
    left = torch.where((mass < 0) & (tail > -torch.inf), tail + torch.log1p(-mass.exp()), -torch.inf)
    return torch.where(mass.isnan() & (tail > -torch.inf), torch.nan, left).to(tail.dtype)


def _first(ids: Tensor) -> Tensor:
    return first_occurrence(ids.flatten(0, -2) if ids.dim() > 1 else ids.unsqueeze(0)).view(ids.shape)


def _member(ids: Tensor, of: Tensor) -> Tensor:
    """Whether each real id stands in ``of``."""
    return _found(ids, of)[0]


def _found(ids: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each real id stands in ``of (…, J)``, and its first place there; by sorting: no ``(…, K, J)`` tensor is made."""
    wide = torch.promote_types(ids.dtype, of.dtype)
    ordered, order = of.to(wide).sort(dim=-1, stable=True)
    at = torch.searchsorted(ordered, ids.to(wide).contiguous()).clamp(max=of.shape[-1] - 1)
    return (ordered.gather(-1, at) == ids) & (ids >= 0), order.gather(-1, at)


def _pair(name: str, teacher: TopK, other: TopK) -> tuple[TopK, TopK]:
    teacher, other = checked_topk(name, "teacher", teacher), checked_topk(name, "other", other)
    if teacher.ids.shape[:-1] != other.ids.shape[:-1]:
        raise ValueError(f"{name}: other.ids has shape {tuple(other.ids.shape)}, wanted {tuple(teacher.ids.shape[:-1])} and K")
    return teacher, other


def _agree(name: str, teacher: TopK, other: TopK) -> None:
    if not may_read(teacher.ids) or torch.compiler.is_compiling():
        return
    both, place = _found(teacher.ids, other.ids)
    theirs = other.logp.gather(-1, place)
    wrong = both & ((teacher.logp - theirs).abs() > SAME)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: log-probs of id {teacher.ids[at].item()} differ, {teacher.logp[at].item():.4g} in teacher and "
            f"{theirs[at].item():.4g} in other: both must be the teacher's, as linear_support gives them"
        )


def combine_teachers(logps: Tensor | Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ_m w_m·t_m of M teachers' log-probs, to be passed as ``teacher_logp``; without gradient.

    With weights that sum to 1 the reverse KL to it is Σ_m w_m·KL(π‖π_m), up to a constant. One-hot weights choose a teacher for
    each token. A teacher of weight 0 has no effect, whatever its value.

    Args:
        logps: ``(M, …)``, or M tensors ``(…)``.
        weights: ``(M,)``, or ``(M, …)`` for weights that differ from token to token; finite, not negative.

    Raises:
        ValueError: for another shape.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.supports.combine_teachers(torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([0.5, 0.5]))
        tensor([-2., -3.])
    """
    for x in [logps] if isinstance(logps, Tensor) else logps:
        check_tensor("combine_teachers", "logps", x)
    check_tensor("combine_teachers", "weights", weights)
    stacked = (logps if isinstance(logps, Tensor) else torch.stack(list(logps))).detach()
    weights = weights.detach().to(stacked.dtype)
    if weights.shape == stacked.shape[:1]:
        weights = weights.view(-1, *[1] * (stacked.dim() - 1))
    elif weights.shape != stacked.shape:
        raise ValueError(
            f"combine_teachers: weights has shape {tuple(weights.shape)}, wanted ({stacked.shape[0]},) or {tuple(stacked.shape)}"
        )
    return torch.where(weights == 0, 0, weights * stacked).sum(0)
