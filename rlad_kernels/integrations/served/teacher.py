"""Served top-K log-probs → one checked, sorted ``TopK``: fills and duplicates gone, tail mass and target's log-prob known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlad_kernels.core.check import integers, is_integer, is_number
from rlad_kernels.core.types import TopK
from rlad_kernels.integrations.served.formats import NAME, Served, entry_of, parse

CLAMPED = -9999.0  # what vLLM's HTTP server writes for −inf, which JSON does not have
SMALLEST_TAIL = -23 * math.log(2)  # the least mass told from 1 − Σ in float32
OUT_OF_RANGE = ("raise", "tail")
_IGNORE, _NO_ID, _EMPTY = -100, 2**31, -(2**62)  # _EMPTY: no student's id, whatever the offset


def from_logprobs(
    served: Any, target: Any = None, *, token_logprobs: Sequence[Any] | None = None, k: int | None = None,
    vocab_size: int | None = None, offset: int = 0, out_of_range: str = "raise", tolerance: float = 1e-3,
    at_temperature: float | None = None, device: torch.device | str | None = None,
) -> TopK:  # fmt: skip
    """A served teacher's top-K, as vLLM, SGLang or an OpenAI-style server returned it, checked and sorted.

    Args:
        served: an element a position; entry t says what the teacher expected **at** token t, so it belongs to the hidden
            state of t − 1. vLLM: ``choice["prompt_logprobs"]`` or ``choice["logprobs"]["top_logprobs"]`` (asked for with
            ``return_tokens_as_token_ids``), JSON or its own objects. Chat: ``choice["logprobs"]["content"]``. SGLang:
            ``meta_info["input_top_logprobs"]`` or ``["output_top_logprobs"]``. Or a list of such sequences, ragged or
            not, padded to ``(B, T, K)``. Tinker: ``response.topk_prompt_logprobs``, lists of ``(id, logprob)``. Or tensors, arrays
            or nested lists ``(ids, logprobs)``, both ``(…, T, K)``. None is a position that was not scored; −1, −inf, None and
            −9999 (vLLM) or less are empty slots; the sampled token may come twice, or as one more.
        target: the tokens' ids (the student's) in ``served``'s shape, for ``target_logp``; −100 has none. Of a ragged
            batch a list of sequences, or ``(B, T)`` padded with −100.
        token_logprobs: log-probs of the targets, where the server gives them apart: numbers or SGLang's triples.
        k: keep the K largest of each position; None keeps all that came, the sampled token among them.
        vocab_size: the student's; ids must be below it.
        offset: student id = served id − offset.
        out_of_range: ``raise``, or ``tail``: served tokens that the student does not have leave the support, and their
            mass is in the tail.
        tolerance: how far a log-prob may be above 0, a mass above 1, and two log-probs of the same token apart; log-probs that
            were kept in bfloat16 want 0.02.
        at_temperature: temper log-probs of temperature 1: log_softmax(log p/T). Exact only of whole rows, so each position that
            was scored must have all ``vocab_size`` tokens. (A KL that renormalises over the support needs no more than log p/T.)
        device: of the result; None is the served tensors', or the CPU.

    Returns:
        TopK: ids int32, −1 empty; logp float32, descending, the lower id first among equals, −inf empty; tail_logp =
        log(1 − Σ) of the mass outside, at least 2^-23 unless the support is the whole vocabulary; target_logp if ``target``
        is given, −inf where the server gave it no probability, NaN where it did not say (which losses count as
        ``invalid_teacher``). What a server returns is at its own temperature, as a rule 1.

    Raises:
        ValueError: NaN or positive log-probs, a mass above 1, ids that differ in two log-probs, are out of range or are
            text, lengths that do not match the target, an answer that is shifted by a position against it, an
            ``at_temperature`` without the whole vocabulary.

    Example:
        >>> from rlad_kernels.integrations.served import from_logprobs
        >>> answer = [{"1": {"logprob": -0.9}, "7": {"logprob": -0.7}}, {"4": {"logprob": -3.0}, "2": {"logprob": -0.2}}]
        >>> teacher = from_logprobs(answer, [1, 4], k=1)  # vLLM's prompt_logprobs, behind the prompt
        >>> teacher.ids.tolist(), teacher.target_logp
        ([[7], [2]], tensor([-0.9000, -3.0000]))
    """
    if out_of_range not in OUT_OF_RANGE:
        raise ValueError(f"{NAME}: out_of_range must be one of {OUT_OF_RANGE}, got {out_of_range!r}")
    if k is not None and not (is_integer(k) and k > 0):
        raise ValueError(f"{NAME}: k must be a positive int or None, got {k!r}")
    if vocab_size is not None and not (is_integer(vocab_size) and vocab_size > 0):
        raise ValueError(f"{NAME}: vocab_size must be a positive int or None, got {vocab_size!r}")
    if not is_integer(offset):
        raise ValueError(f"{NAME}: offset must be an int, got {offset!r}")
    if not tolerance >= 0:
        raise ValueError(f"{NAME}: tolerance must be at least 0, got {tolerance!r}")
    if token_logprobs is not None and target is None:
        raise ValueError(f"{NAME}: token_logprobs needs target, got None")
    came = parse(served)
    device = came.ids.device if device is None else device
    if target is not None:
        target, came = _fit(target, came)
    raw = came._replace(ids=torch.where(came.ids == -1, _EMPTY, came.ids - offset))
    ids, logp = _checked(raw, vocab_size, offset, out_of_range, tolerance)
    if at_temperature is not None:
        logp = _tempered(ids, logp, vocab_size, at_temperature)
    target_logp = None
    if target is not None:
        _check_shift(target, ids)
        target_logp = _target_logp(target, ids, logp, raw)
        if token_logprobs is not None:
            target_logp = _merge(target_logp, _sampled(token_logprobs, target, came.lengths, offset, tolerance), tolerance)
        target_logp = target_logp.to(device, torch.float32)
    logp, order = logp.sort(dim=-1, descending=True, stable=True)  # ids ascend: the lower one wins
    width = ids.shape[-1] if k is None else k
    more = [0, max(width - ids.shape[-1], 0)]
    ids, logp = pad(ids.gather(-1, order), more, value=-1)[..., :width], pad(logp, more, value=-math.inf)[..., :width]
    tail = _tail(ids, logp, vocab_size).to(device, torch.float32)
    return TopK(ids.to(device, torch.int32), logp.to(device, torch.float32), tail_logp=tail, target_logp=target_logp)


def _integers(target: Any, device: torch.device | str) -> Tensor:
    target = torch.as_tensor(target, device=device)
    return integers(NAME, "target", target).long() if target.numel() else target.long()


def _at(bad: Tensor) -> tuple[int, ...]:
    return tuple(bad.nonzero()[0].tolist())


def _fit(target: Any, came: Served) -> tuple[Tensor, Served]:
    """The target as a tensor, −100 beyond a sequence's end, and what came in its shape."""
    shape = came.ids.shape[:-1]
    if came.lengths is None:
        target = _integers(target, came.ids.device)
        if target.shape != shape:
            raise ValueError(f"{NAME}: target has shape {tuple(target.shape)}, served positions {tuple(shape)}")
        return target, came
    if not isinstance(target, Tensor):
        rows = [_integers(x, "cpu") for x in target]
        if (wanted := [len(x) for x in rows]) != came.lengths:
            raise ValueError(f"{NAME}: served sequences have lengths {came.lengths}, target {wanted}")
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_IGNORE), came
    target = _integers(target, "cpu")
    if target.dim() != 2 or len(target) != shape[0] or target.shape[1] < shape[1]:
        raise ValueError(f"{NAME}: target has shape {tuple(target.shape)}, served sequences have lengths {came.lengths}")
    for b, length in enumerate(came.lengths):
        if bool((target[b, length:] != _IGNORE).any()):
            raise ValueError(
                f"{NAME}: served sequence {b} has {length} positions, target {target.shape[1]} (−100 may end it there)"
            )
    more = [0, 0, 0, target.shape[1] - shape[1]]
    return target, Served(pad(came.ids, more, value=-1), pad(came.logp, more, value=-math.inf), came.lengths)


def _checked(came: Served, vocab_size: int | None, offset: int, out_of_range: str, tolerance: float) -> tuple[Tensor, Tensor]:
    """Ids in ascending order with their log-probs; fills, duplicates and what goes to the tail are −1 and −inf, last."""
    ids, logp, _ = came
    if bool((bad := (ids != _EMPTY) & (logp.isnan() | (logp > tolerance))).any()):
        raise ValueError(
            f"{NAME}: log-prob {logp[bad][0].item():g} at {_at(bad)}, wanted at most 0 (tolerance {tolerance:g}): "
            "no probabilities, no logits"
        )
    logp = torch.where((ids == _EMPTY) | (logp <= CLAMPED), -torch.inf, logp.clamp_max(0))
    empty = logp == -torch.inf
    bound = vocab_size or _NO_ID
    outside = ~empty & ((ids < 0) | (ids >= bound))
    if out_of_range == "raise" and bool(outside.any()):
        raise ValueError(
            f"{NAME}: id {ids[outside][0].item() + offset} at {_at(outside)} less offset {offset} is not in [0, vocab_size={bound})"
            "; out_of_range='tail' leaves tokens that the student does not have to the tail mass"
        )
    ids, order = torch.where(empty | outside, _NO_ID, ids).sort(dim=-1, stable=True)
    logp = torch.where(empty | outside, -torch.inf, logp).gather(-1, order)
    before = logp.roll(1, -1)
    again = (ids == ids.roll(1, -1)) & (ids != _NO_ID) & (torch.arange(ids.shape[-1], device=ids.device) > 0)
    if bool((bad := again & ((logp - before).abs() > tolerance)).any()):
        row, one, other = _at(bad)[:-1], before[bad][0].item(), logp[bad][0].item()
        raise ValueError(
            f"{NAME}: id {ids[bad][0].item() + offset} at {row} has log-probs {one:g} and {other:g}, further apart than tolerance "
            f"{tolerance:g}; padding must be −inf"
        )
    logp = torch.where(again, -torch.inf, logp)
    mass = logp.exp().sum(-1)
    if bool((bad := mass > 1 + tolerance).any()):
        raise ValueError(
            f"{NAME}: probabilities at {_at(bad)} sum to {mass[bad][0].item():.6g}, more than 1 + tolerance {tolerance:g}; "
            "log-probs that were kept in bfloat16 want tolerance=0.02"
        )
    return torch.where(again | (ids == _NO_ID), -1, ids), logp


def _tempered(ids: Tensor, logp: Tensor, vocab_size: int | None, temperature: float) -> Tensor:
    """log_softmax(log p/T) of positions that have the whole vocabulary, and of those that have nothing."""
    if not (is_number(temperature) and 0 < temperature < math.inf):
        raise ValueError(f"{NAME}: at_temperature must be positive and finite, or None, got {temperature!r}")
    came = (ids >= 0).sum(-1)
    if vocab_size is None or bool((bad := (came > 0) & (came < vocab_size)).any()):
        got = "vocab_size=None" if vocab_size is None else f"{came[bad][0].item()} of {vocab_size} tokens at {_at(bad)}"
        raise ValueError(
            f"{NAME}: at_temperature needs each position's whole vocabulary, whose normaliser changes with it; got {got}. Ask the "
            "server for log-probs at that temperature, or take the student's at temperature 1"
        )
    return torch.where(ids >= 0, (logp / temperature).log_softmax(-1), -torch.inf)


def _check_shift(target: Tensor, ids: Tensor) -> None:
    """Raise where every answer has the token beside its own, and not every one its own: vLLM's hold the sampled token itself."""
    known, scored = target >= 0, (ids >= 0).any(-1)

    def held(tokens: Tensor, where: Tensor) -> tuple[int, int]:
        found = (ids == torch.where(tokens < 0, -2, tokens).unsqueeze(-1)).any(-1)
        return int((found & where).sum()), int(where.sum())

    own, positions = held(target, known & scored)
    for shift, beside in ((1, "before"), (-1, "after")):
        there = known.roll(shift, -1) & scored
        there[..., 0 if shift > 0 else -1] = False
        found, count = held(target.roll(shift, -1), there)
        if count >= 4 and found == count and own < positions:
            raise ValueError(
                f"{NAME}: served is shifted by one position against target: all {count} answers hold the token {beside} their own, "
                f"{own} of {positions} their own. Position t of an answer speaks of token t: cut both alike, "
                "from_logprobs(answer[n:], tokens[n:])"
            )


def _tail(ids: Tensor, logp: Tensor, vocab_size: int | None) -> Tensor:
    """log(1 − Σ), at least 2^-23 unless the support is the whole vocabulary."""
    mass = logp.logsumexp(-1) if logp.shape[-1] else logp.sum(-1) - torch.inf
    full = mass > math.log1p(-(2.0**-23))
    tail = torch.where(full, SMALLEST_TAIL, torch.log(-torch.expm1(torch.where(full, -1.0, mass))))
    return torch.where((ids >= 0).sum(-1) == vocab_size, -torch.inf, tail) if vocab_size else tail


def _target_logp(target: Tensor, ids: Tensor, logp: Tensor, raw: Served) -> Tensor:
    """The target's log-prob: −inf where the server gives it no probability, NaN where it does not say."""
    column = torch.where(target < 0, -2, target).unsqueeze(-1)
    found, known = torch.where(ids == column, logp, 0).sum(-1), (ids == column).any(-1)
    ruled_out = ((raw.ids == column) & (raw.logp <= CLAMPED)).any(-1)
    return torch.where(known, found, torch.where(ruled_out, -torch.inf, torch.nan))


def _sampled(token_logprobs: Sequence[Any], target: Tensor, lengths: list[int] | None, offset: int, tolerance: float) -> Tensor:
    """``token_logprobs`` in the target's shape, NaN where there is none; an entry with an id must be the target's."""
    out = torch.full(target.shape, torch.nan, dtype=torch.float64, device="cpu")
    rows, wanted = out.view(-1, target.shape[-1]), target.cpu().view(-1, target.shape[-1]).tolist()
    sequences = [token_logprobs] if lengths is None and len(rows) == 1 else token_logprobs
    if (got := [len(s) for s in sequences]) != (lengths or [rows.shape[1]] * len(rows)):
        raise ValueError(f"{NAME}: token_logprobs has lengths {got}, wanted {lengths or [rows.shape[1]] * len(rows)}")
    for b, sequence in enumerate(sequences):
        for t, x in enumerate(sequence):
            if wanted[b][t] == _IGNORE or x is None or (isinstance(x, Sequence) and x[:1] in ([None], (None,))):
                continue
            entry = (wanted[b][t] + offset, float(x)) if isinstance(x, int | float) else entry_of(x)
            if entry is None:
                raise ValueError(f"{NAME}: token_logprobs must hold numbers, None or [log-prob, id, …], got {x!r} at {(b, t)}")
            if entry[0] - offset != wanted[b][t]:
                raise ValueError(
                    f"{NAME}: token_logprobs scores id {entry[0]} at {(b, t)}, target is {wanted[b][t]} + offset {offset}"
                )
            if not entry[1] <= tolerance:
                raise ValueError(f"{NAME}: token_logprobs has {entry[1]:g} at {(b, t)}, wanted at most 0")
            rows[b, t] = -math.inf if entry[1] <= CLAMPED else min(entry[1], 0.0)
    return out.to(target.device)


def _merge(found: Tensor, given: Tensor, tolerance: float) -> Tensor:
    if bool((bad := (given - found).abs() > tolerance).any()):  # a NaN is not greater
        one, other = given[bad][0].item(), found[bad][0].item()
        raise ValueError(f"{NAME}: the target at {_at(bad)} has {one:g} in token_logprobs and {other:g} among the top ones")
    return torch.where(given.isnan(), found, given)
