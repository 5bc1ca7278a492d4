"""Per-token quantities from hidden states and a head: log-probs, top-K, gathered logits. Checks, flattens, calls the op."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlad_kernels import ops as _ops
from rlad_kernels.check import check_eps, check_floats, check_k, check_tensor, integers
from rlad_kernels.head import LMHead
from rlad_kernels.modes import ordinary, transformed

EXTRAS = ("mean_logits", "is_top1", "log_sum_sq_probs")


class TokenScores(NamedTuple):
    """What one sweep gives per token, in the target's shape; nats; float32 (float64 for float64 inputs)."""

    logp: Tensor  # (…) log π(target)
    lse: Tensor  # (…) logsumexp of the tempered logits
    entropy: Tensor | None  # (…) −Σ p log p
    topk_logp: Tensor | None  # (…, K) log-probs at topk_ids, −inf in empty slots
    tail_logp: Tensor | None  # (…) log-mass outside topk_ids
    extras: dict[str, Tensor]  # without gradient


class TopK(NamedTuple):
    """The K most likely tokens of each position, without gradient: of :func:`linear_topk`, or :meth:`from_logprobs` of a server."""

    ids: Tensor  # (…, K) int32, −1 empty
    logp: Tensor  # (…, K) descending
    lse: Tensor | None = None  # (…)
    tail_logp: Tensor | None = None  # (…) log-mass outside the K
    target_logp: Tensor | None = None  # (…)
    entropy: Tensor | None = None  # (…)

    @classmethod
    def from_logprobs(
        cls, served: Any, target: Any = None, *, token_logprobs: Sequence[Any] | None = None, k: int | None = None,
        vocab_size: int | None = None, offset: int = 0, out_of_range: str = "raise", tolerance: float = 1e-3,
        device: torch.device | str | None = None,
    ) -> TopK:  # fmt: skip
        """A served teacher's top-K, as vLLM, SGLang or an OpenAI-style server returned it, checked and sorted.

        Args:
            served: an element a position; entry t says what the teacher expected **at** token t, so it belongs to the hidden
                state of t − 1. vLLM: ``choice["prompt_logprobs"]`` or ``choice["logprobs"]["top_logprobs"]`` (asked for with
                ``return_tokens_as_token_ids``), JSON or its own objects. Chat: ``choice["logprobs"]["content"]``. SGLang:
                ``meta_info["input_top_logprobs"]`` or ``["output_top_logprobs"]``. Or a list of such sequences, ragged or
                not, padded to ``(B, T, K)``. Or tensors ``(ids, logprobs)``, both ``(…, T, K)``. None is a position that was
                not scored; −1, −inf, None and vLLM's −9999 are empty slots; the sampled token may come twice, or as one more.
            target: the tokens' ids (the student's) in ``served``'s shape, for ``target_logp``; −100 has none. Of a ragged
                batch a list of sequences, or ``(B, T)`` padded with −100.
            token_logprobs: log-probs of the targets, where the server gives them apart: numbers or SGLang's triples.
            k: keep the K largest of each position; None keeps all that came, the sampled token among them.
            vocab_size: the student's; ids must be below it.
            offset: student id = served id − offset.
            out_of_range: ``raise``, or ``tail``: served tokens that the student does not have leave the support, and their
                mass is in the tail.
            tolerance: how far a log-prob may be above 0, a mass above 1, and two log-probs of the same token apart.
            device: of the result; None is the served tensors', or the CPU.

        Returns:
            TopK: ids int32, −1 empty; logp float32, descending, the lower id first among equals, −inf empty; tail_logp =
            log(1 − Σ) of the mass outside, at least 2^-23 unless the support is the whole vocabulary; target_logp if ``target``
            is given, −inf where the server gave it no probability, NaN where it did not say (which losses count as
            ``invalid_teacher``). What a server returns is at its own temperature, as a rule 1.

        Raises:
            ValueError: NaN or positive log-probs, a mass above 1, ids that differ in two log-probs, are out of range or are
                text, lengths that do not match the target.
        """
        from rlad_kernels.integrations.served import from_logprobs

        return from_logprobs(
            served, target, token_logprobs=token_logprobs, k=k, vocab_size=vocab_size, offset=offset, out_of_range=out_of_range,
            tolerance=tolerance, device=device,
        )  # fmt: skip


def checked_topk(name: str, argument: str, x: TopK) -> TopK:
    """``x`` with ids that −1 fits in; a ValueError unless ids and log-probs are tensors ``(…, K)`` of one shape."""
    if not isinstance(x, TopK):
        raise ValueError(f"{name}: {argument} must be a TopK, got {type(x).__name__}; linear_topk or TopK(ids, logp) gives one")
    ids = integers(name, f"{argument}.ids", x.ids)
    check_tensor(name, f"{argument}.logp", x.logp)
    if ids.shape != x.logp.shape or not ids.dim():
        raise ValueError(f"{name}: {argument}.ids has shape {tuple(ids.shape)}, {argument}.logp {tuple(x.logp.shape)}, not (…, K)")
    return x._replace(ids=ids)


class Call(NamedTuple):
    """The flattened arguments that every sweep op takes."""

    hidden: Tensor  # (N, D)
    weight: Tensor
    bias: Tensor | None
    inv_temp: Tensor  # (N,) or (1,)
    logit_scale: float
    softcap: float
    vocab_size: int


def check_states(name: str, hidden: Tensor, head: LMHead) -> None:
    """Raise a ValueError unless these are hidden states and a head."""
    if not isinstance(head, LMHead):
        fix = "pass LMHead(weight, bias) or LMHead.from_model(model)"
        raise ValueError(f"{name}: head must be an LMHead, got {type(head).__name__}; {fix}")
    check_floats(name, "hidden", hidden)


def flat_call(name: str, hidden: Tensor, head: LMHead) -> Call:
    """Check hidden states against the head and flatten them to ``(N, D)``.

    Raises:
        ValueError: for a shape, dtype or device that does not fit.
    """
    check_states(name, hidden, head)
    weight, bias = head.weight, head.bias
    if transformed(hidden, weight, bias):
        raise NotImplementedError(
            f"{name}: hidden or the head is followed by forward-mode AD or a torch.func transform (jvp, grad, vmap), which this "
            "call does not support; use reverse-mode autograd on ordinary tensors, with the batch as leading dimensions"
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        got = tuple(hidden.shape)[-1:] or "no dimension"
        raise ValueError(f"{name}: weight (V, D) has D={weight.shape[1]}, hidden has D={got[0] if got != 'no dimension' else got}")
    if hidden.device != weight.device:
        raise ValueError(f"{name}: hidden is on {hidden.device}, weight on {weight.device}; they must share a device")
    if torch.is_autocast_enabled(hidden.device.type):
        low = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = (x if x.dtype == torch.float64 else x.to(low) for x in (hidden, weight))  # as in torch's own products
        bias = None if bias is None else bias.to(weight.dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{name}: hidden has dtype {hidden.dtype}, weight {weight.dtype}; they must match (or use autocast)")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"{name}: bias has dtype {bias.dtype}, weight {weight.dtype}; they must match (or use autocast)")
    hidden, shape, t = ordinary(hidden), hidden.shape[:-1], head.temperature
    if isinstance(t, Tensor) and t.numel() != 1 and t.shape != shape:
        raise ValueError(f"{name}: temperature has shape {tuple(t.shape)}, wanted the target's shape {tuple(shape)}")
    hidden = hidden.flatten(0, -2) if shape else hidden.unsqueeze(0)
    hidden = hidden if hidden.stride(-1) == 1 or hidden.shape[-1] == 1 else hidden.contiguous()
    return Call(hidden, weight, bias, _inv_temp(hidden, head), head.logit_scale, head.softcap or 0.0, head.vocab_size or 0)


def _inv_temp(hidden: Tensor, head: LMHead) -> Tensor:
    dtype = _ops.acc_dtype(hidden.dtype)
    if not isinstance(head.temperature, Tensor):
        return torch.ones(1, dtype=dtype, device=hidden.device) * (1.0 / head.temperature)
    temperature = head.temperature.detach().to(hidden.device, dtype).reshape(-1)
    return 1 / temperature


def flat_rows(
    name: str, argument: str, x: Tensor, shape: torch.Size, device: torch.device, *, ids: bool = False, extra: int = 0
) -> Tensor:
    """``x`` with the leading ``shape`` flattened; ``extra`` trailing dimensions are kept; ``ids`` are int32 or int64.

    Raises:
        ValueError: for another shape or device, or with ``ids`` for a dtype that is not an integer.
    """
    check_tensor(name, argument, x)
    if x.device != device:
        raise ValueError(f"{name}: {argument} is on {x.device}, hidden on {device}; they must share a device")
    leading = x.shape[: x.dim() - extra] if x.dim() >= extra else None
    if leading != shape:
        wanted = f"{tuple(shape)}" if not extra else f"({', '.join(map(str, (*shape, 'K')))})"
        raise ValueError(f"{name}: {argument} has shape {tuple(x.shape)}, wanted {wanted}")
    return flat(integers(name, argument, x) if ids else x, len(shape))


def flat(x: Tensor, dims: int) -> Tensor:
    """``x``, detached, with its first ``dims`` dimensions flattened to one: a single token's has none, and gets it."""
    x = ordinary(x.detach())
    return x.flatten(0, dims - 1) if dims else x.unsqueeze(0)


def maybe_rows(
    name: str, argument: str, x: Tensor | None, shape: torch.Size, device: torch.device, *, ids: bool = False, extra: int = 0
) -> Tensor | None:
    """:func:`flat_rows` of an optional argument."""
    return None if x is None else flat_rows(name, argument, x, shape, device, ids=ids, extra=extra)


def linear_logp(
    hidden: Tensor, head: LMHead, target: Tensor, *, topk_ids: Tensor | None = None, entropy: bool = False, tail: bool = False,
    extras: Iterable[str] = (), mask: Tensor | None = None, filter_eps: float = 0.0,
) -> TokenScores:  # fmt: skip
    """log π(y) = z_y − logsumexp(z) for every token, and what else one sweep gives, without N×V logits.

    Args:
        hidden: ``(…, D)`` float32, bfloat16 or float16 (float64 on CPU), the head's dtype (or under autocast).
        head: :class:`LMHead`.
        target: ``(…)`` ints; −100 is masked.
        topk_ids: ``(…, K)`` ints whose log-probs to return, differentiable; −1 is an empty slot, duplicates are
            independent slots; K ≤ 1,024.
        entropy: also −Σ p log p, differentiable.
        tail: also the log-mass outside ``topk_ids``, differentiable, to 1e-3 relative down to a mass of 1e-7.
        extras: any of ``mean_logits``, ``is_top1``, ``log_sum_sq_probs``; no gradient.
        mask: bool or 0/1 ``(…)``; masked rows are never computed and exactly 0 in outputs and gradients.
        filter_eps: 0.0 is the exact backward. Above it, each block of 128 tokens sends gradient only through the columns to
            which one of them gives p > filter_eps, its targets and its ``topk_ids``; for d_hidden the rest goes through their
            mean weighted by p, their d_weight is zero. |Δd_hidden_t| ≤ |cotangent_t|·dropped_mass_t·max‖W_v − mean‖; the
            dropped mass of each token is ``extras["dropped_mass"]``. Outputs stay exact.

    Returns:
        TokenScores in the target's shape, float32 (float64 for float64). Gradient reaches hidden, weight and bias only, and
        is accumulated in float32; rows whose every upstream gradient is zero are dropped from the backward sweep.

    Raises:
        ValueError: naming the argument, what came and what was wanted. On CUDA an id out of range gives a NaN row instead,
            or raises under ``set_checks(True)``.
    """
    extras = (extras,) if isinstance(extras, str) else tuple(extras)
    return score(
        "linear_logp", hidden, head, target, topk_ids=topk_ids, entropy=entropy, tail=tail, extras=extras, mask=mask,
        filter_eps=filter_eps,
    )  # fmt: skip


def score(
    name: str, hidden: Tensor, head: LMHead, target: Tensor, *, topk_ids: Tensor | None = None, entropy: bool = False,
    tail: bool = False, extras: tuple[str, ...] = (), mask: Tensor | None = None, filter_eps: float = 0.0,
    ids_name: str = "topk_ids",
) -> TokenScores:  # fmt: skip
    """:func:`linear_logp` for a public function ``name``, whose argument ``ids_name`` holds the ids."""
    call = flat_call(name, hidden, head)
    shape = target_shape(name, hidden, target)
    check_eps(name, filter_eps)
    unknown = [x for x in extras if x not in EXTRAS]
    if unknown:
        raise ValueError(f"{name}: extras must be among {EXTRAS}, got {unknown[0]!r}")
    if tail and topk_ids is None:
        raise ValueError(f"{name}: tail=True needs topk_ids, got None")
    ids = maybe_rows(name, ids_name, topk_ids, shape, hidden.device, ids=True, extra=1)
    if ids is not None:
        check_k(name, ids.shape[1], call.vocab_size, f"{ids_name} (…, K)")
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in call[:3]]
    eps = float(filter_eps) if any(need) else 0.0
    ahead = need == [True, False, False] and not (entropy or ids is not None or eps)  # frozen head, one direction per token
    out = torch.ops.rlad.linear_logp(
        *call[:3], flat_rows(name, "target", target, shape, hidden.device, ids=True), ids,
        maybe_rows(name, "mask", mask, shape, hidden.device), *call[3:],
        entropy, tail, bool(extras), eps, ahead, name,
    )  # fmt: skip
    scores = token_scores(out, shape, entropy, ids is not None, tail, extras)
    if eps:
        scores.extras["dropped_mass"] = out[10].detach().view(shape)
    return scores


def token_scores(
    out: tuple[Tensor, ...], shape: torch.Size, entropy: bool, topk: bool, tail: bool, extras: Iterable[str]
) -> TokenScores:
    """The op's outputs in the target's shape, None for what was not asked."""
    logp, lse, h, topk_logp, tail_logp, *more = out[:8]
    found = {k: x.detach().view(shape) for k, x in zip(EXTRAS, more, strict=True) if k in extras}
    return TokenScores(
        logp.view(shape), lse.view(shape), h.view(shape) if entropy else None,
        topk_logp.view(*shape, topk_logp.shape[-1]) if topk else None,
        tail_logp.view(shape) if tail else None, found,
    )  # fmt: skip


def target_shape(name: str, hidden: Tensor, target: Tensor) -> torch.Size:
    check_tensor(name, "hidden", hidden)
    check_tensor(name, "target", target)
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"{name}: target has shape {tuple(target.shape)}, hidden (…, D) {tuple(hidden.shape)}")
    return target.shape


def linear_topk(
    hidden: Tensor, head: LMHead, k: int, *, target: Tensor | None = None, entropy: bool = False, mask: Tensor | None = None
) -> TopK:
    """The K largest log-probs of every token with their ids, lse, tail mass, target log-prob and entropy; no gradient.

    Args:
        hidden: ``(…, D)``.
        head: :class:`LMHead`.
        k: 1 ≤ K ≤ 1,024 and ≤ vocab_size.
        target: ``(…)`` ints for ``target_logp``; −100 is masked.
        entropy: also −Σ p log p over the whole vocabulary.
        mask: bool or 0/1 ``(…)``; masked rows are exactly 0.

    Returns:
        TopK: ids int32 ``(…, K)``, logp ``(…, K)`` descending (the lower id wins among equal logits), lse, tail_logp ``(…)``,
        target_logp and entropy or None.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "linear_topk"
    with torch.no_grad():
        call = flat_call(name, hidden, head)
        shape = hidden.shape[:-1] if target is None else target_shape(name, hidden, target)
        check_k(name, k, call.vocab_size)
        flat_target = maybe_rows(name, "target", target, shape, hidden.device, ids=True)
        flat_mask = maybe_rows(name, "mask", mask, shape, hidden.device)
        out = torch.ops.rlad.linear_topk(*call[:3], flat_target, flat_mask, *call[3:], k, entropy)
    ids, logp, lse, tail_logp, target_logp, h = out
    return TopK(
        ids.view(*shape, k), logp.view(*shape, k), lse.view(shape), tail_logp.view(shape),
        None if target is None else target_logp.view(shape), h.view(shape) if entropy else None,
    )  # fmt: skip


def linear_gather(hidden: Tensor, head: LMHead, ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Logits z at ``ids`` after scale, softcap and temperature: K rows of the head a token, no sweep; differentiable.

    Args:
        hidden: ``(…, D)``.
        head: :class:`LMHead`.
        ids: ``(…, K)`` ints; −1 is an empty slot.
        mask: bool or 0/1 ``(…)``; masked rows are exactly 0.

    Returns:
        ``(…, K)`` float32 (float64 for float64), −inf in empty slots. d_weight touches only the rows in ``ids``.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    return gather("linear_gather", hidden, head, ids, mask=mask)


def gather(name: str, hidden: Tensor, head: LMHead, ids: Tensor, *, mask: Tensor | None = None, ids_name: str = "ids") -> Tensor:
    """:func:`linear_gather` for a public function ``name``, whose argument ``ids_name`` holds the ids."""
    call = flat_call(name, hidden, head)
    shape = hidden.shape[:-1]
    flat_ids = flat_rows(name, ids_name, ids, shape, hidden.device, ids=True, extra=1)
    check_k(name, flat_ids.shape[1], call.vocab_size, f"{ids_name} (…, K)")
    flat_mask = maybe_rows(name, "mask", mask, shape, hidden.device)
    raw = torch.ops.rlad.linear_gather(*call[:3], flat_ids, flat_mask, call.inv_temp, call.vocab_size, name)
    z = raw * call.logit_scale
    if call.softcap:
        z = call.softcap * torch.tanh(z / call.softcap)
    z = torch.where(flat_ids < 0, -torch.inf, z * call.inv_temp.unsqueeze(1))
    if flat_mask is not None:
        z = torch.where(flat_mask.unsqueeze(1) != 0, z, 0)
    return z.view(ids.shape)
