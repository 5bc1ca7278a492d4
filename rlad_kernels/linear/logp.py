"""Log-probs of given tokens, and what else one sweep gives."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlad_kernels.core.check import check_eps, check_k, needed_grad
from rlad_kernels.core.config import settings
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.reduction import keep_mask
from rlad_kernels.core.sizes import byte_size
from rlad_kernels.core.types import TokenScores
from rlad_kernels.engine.call import Call, flat_call, flat_rows, maybe_rows, target_shape
from rlad_kernels.engine.logp import Logp, logp_op
from rlad_kernels.engine.mean import check_no_softcap
from rlad_kernels.engine.mean import mean_logits as mean_of
from rlad_kernels.engine.rows import IGNORE

EXTRAS = ("mean_logits", "is_top1", "log_sum_sq_probs")


def linear_logp(
    hidden: Tensor,
    head: LMHead,
    target: Tensor,
    *,
    topk_ids: Tensor | None = None,
    entropy: bool = False,
    tail: bool = False,
    mean_logits: bool = False,
    extras: Iterable[str] = (),
    mask: Tensor | None = None,
    filter_eps: float = 0.0,
    keep: int | str | None = None,
) -> TokenScores:
    """log π(y) = z_y − logsumexp(z) for every token, and what else one sweep gives, without N×V logits.

    Args:
        hidden: ``(…, D)`` float32, bfloat16 or float16 (float64 on CPU), the head's dtype (or under autocast).
        head: :class:`LMHead`.
        target: ``(…)`` ints; −100 is masked.
        topk_ids: ``(…, K)`` ints whose log-probs to return, differentiable; −1 is an empty slot, duplicates are
            independent slots; K ≤ 4,096.
        entropy: also −Σ p log p, differentiable.
        tail: also the log-mass outside ``topk_ids``, differentiable, to 1e-3 relative down to a mass of 1e-7.
        mean_logits: also the mean of the logits over the vocabulary, differentiable, for a head without softcap (label smoothing).
        extras: any of ``mean_logits``, ``is_top1``, ``log_sum_sq_probs``; no gradient.
        mask: bool or 0/1 ``(…)``; masked rows are never computed and exactly 0 in outputs and gradients.
        filter_eps: 0.0 is the exact backward. Above it, each block of 128 tokens sends gradient only through the columns to
            which one of them gives p > filter_eps, its targets and its ``topk_ids``; for d_hidden the rest goes through their
            mean weighted by p, their d_weight is zero. |Δd_hidden_t| ≤ |cotangent_t|·dropped_mass_t·max‖W_v − mean‖; the
            dropped mass of each token is ``extras["dropped_mass"]``. Outputs stay exact. A block that would keep most columns keeps
            all: exact, and faster. Blocks have 512 tokens on CUDA.
        keep: memory for speed: bytes, or a string such as "2GiB", in which the logits of as many rows as fit wait for the backward,
            which computes those of the others again. None is what :func:`~rlad_kernels.set_keep` says, 0 at first.

    Returns:
        TokenScores in the target's shape, float32 (float64 for float64). Gradient reaches hidden, weight and bias only, and
        is accumulated in float32; rows whose every upstream gradient is zero are dropped from the backward sweep.

    Raises:
        ValueError: naming the argument, what came and what was wanted. On CUDA an id out of range gives a NaN row instead,
            or raises under ``set_checks(True)``.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> hidden, head = torch.zeros(2, 8, requires_grad=True), rk.LMHead(torch.ones(4, 8))
        >>> scores = rk.linear_logp(hidden, head, torch.tensor([0, 3]), entropy=True)
        >>> scores.logp
        tensor([-1.3863, -1.3863], grad_fn=<ViewBackward0>)
        >>> scores.logp.sum().backward()
    """
    extras = (extras,) if isinstance(extras, str) else tuple(extras)
    return score(
        "linear_logp",
        hidden,
        head,
        target,
        topk_ids=topk_ids,
        entropy=entropy,
        tail=tail,
        mean_logits=mean_logits,
        extras=extras,
        mask=mask,
        filter_eps=filter_eps,
        keep=keep,
    )


def score(
    name: str,
    hidden: Tensor,
    head: LMHead,
    target: Tensor,
    *,
    topk_ids: Tensor | None = None,
    entropy: bool = False,
    tail: bool = False,
    mean_logits: bool = False,
    extras: tuple[str, ...] = (),
    mask: Tensor | None = None,
    filter_eps: float = 0.0,
    keep: int | str | None = None,
    ids_name: str = "topk_ids",
) -> TokenScores:
    """:func:`linear_logp` for a public function ``name``, whose argument ``ids_name`` holds the ids."""
    call = flat_call(name, hidden, head)
    shape = target_shape(name, hidden, target)
    check_eps(name, filter_eps)
    unknown = [x for x in extras if x not in EXTRAS]
    if unknown:
        raise ValueError(f"{name}: extras must be among {EXTRAS}, got {unknown[0]!r}")
    if tail and topk_ids is None:
        raise ValueError(f"{name}: tail=True needs topk_ids, got None")
    if mean_logits:
        check_no_softcap(name, call)
    ids = maybe_rows(name, ids_name, topk_ids, shape, hidden.device, ids=True, extra=1)
    if ids is not None:
        check_k(name, ids.shape[1], call.vocab_size, f"{ids_name} (…, K)")
    need = needed_grad(*call[:3])
    eps = float(filter_eps) if any(need) else 0.0
    # frozen head, one direction per token; a group's would be summed over the ranks twice
    ahead = need == (True, False, False) and not (entropy or ids is not None or eps or call.group)
    flat_target = flat_rows(name, "target", target, shape, hidden.device, ids=True)
    flat_mask = maybe_rows(name, "mask", mask, shape, hidden.device)
    memory = settings.keep if keep is None else byte_size(name, "keep", keep)
    memory = 0 if ahead or eps or not any(need) else memory  # whose backward computes no logits, or few
    asked = (entropy, tail, bool(extras), eps, ahead, memory, name)
    out = Logp._make(logp_op(*call[:3], flat_target, ids, flat_mask, *call[3:], *asked))
    found = {k: getattr(out, k).detach().view(shape) for k in EXTRAS if k in extras}
    if eps:
        found["dropped_mass"] = out.dropped.detach().view(shape)
    return TokenScores(
        out.logp.view(shape),
        out.lse.view(shape),
        out.entropy.view(shape) if entropy else None,
        None if ids is None else out.topk_logp.view(*shape, ids.shape[1]),
        out.tail_logp.view(shape) if tail else None,
        _mean(name, call, target, mask).view(shape) if mean_logits else None,
        found,
    )


def _mean(name: str, call: Call, target: Tensor, mask: Tensor | None) -> Tensor:
    return mean_of(call, (keep_mask(name, mask, target) & (target != IGNORE)).reshape(-1))
