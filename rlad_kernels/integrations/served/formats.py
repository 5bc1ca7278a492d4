"""The shapes in which vLLM, SGLang and OpenAI-style servers write log-probs → padded tensors of ids and log-probs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAME = "from_logprobs"

Entry = tuple[int, float]


class Served(NamedTuple):
    """What came: ids with −1 and log-probs with −inf where a row is shorter than the longest."""

    ids: Tensor  # (…, W) int64
    logp: Tensor  # (…, W) float64
    lengths: list[int] | None  # of the sequences of a padded batch (B, T, W)


def token_id(key: Any, value: Any = None) -> int:
    """An int, ``"token_id:7"``, or the ``"7"`` of vLLM's ``prompt_logprobs``, whose values are no plain numbers."""
    if isinstance(key, str):
        digits = key.removeprefix("token_id:")
        if digits.isdecimal() and (digits != key or not isinstance(value, int | float)):
            return int(digits)
        raise ValueError(f"{NAME}: key {key!r} can be a token's text, wanted its id; ask the server for return_tokens_as_token_ids")
    if not _whole(key):
        raise ValueError(f"{NAME}: token ids must be integers, got {key!r}")
    return key.__index__()


def value_of(x: Any) -> float:
    """A log-prob: a number, or a dict or object with ``logprob``; None is −inf, a slot without a value."""
    x = x.get("logprob") if isinstance(x, Mapping) else getattr(x, "logprob", x)
    return -math.inf if x is None else float(x)


def entry_of(x: Any) -> Entry | None:
    """SGLang's ``[log-prob, id, text]``, Tinker's ``(id, log-prob)`` or a chat server's ``{"token": "token_id:7", "logprob": …}``.

    None: it is neither. Of two whole numbers, as 0 and 7, the log-prob is the one that is not positive.
    """
    if isinstance(x, Mapping):
        return (token_id(x["token"]), value_of(x)) if "token" in x and "top_logprobs" not in x else None
    if isinstance(x, str) or not isinstance(x, Sequence) or not 2 <= len(x) <= 3:
        return None
    first, second = x[0], x[1]
    if len(x) == 2 and _whole(first) and (second is None or isinstance(second, float) or (_whole(second) and second < 0)):
        return first.__index__(), value_of(second)
    number = first is None or isinstance(first, int | float)
    return (second.__index__(), value_of(first)) if number and _whole(second) else None


def _whole(x: Any) -> bool:
    return hasattr(x, "__index__") and not isinstance(x, bool)


def _position(x: Any) -> list[Entry] | None:
    """The entries of one position; None: ``x`` is a sequence of positions."""
    if x is None:
        return []
    if isinstance(x, Mapping) and "top_logprobs" in x:  # a chat server's, with the sampled token beside its top ones
        x = [*x["top_logprobs"], {"token": x["token"], "logprob": x["logprob"]}]
    if isinstance(x, Mapping):
        return [(token_id(k, v), value_of(v)) for k, v in x.items()]
    if isinstance(x, str) or not isinstance(x, Iterable):
        raise ValueError(f"{NAME}: a position must be None, a dict of ids or a list of entries, got {x!r}")
    entries = [entry_of(y) for y in x]
    found = [e for e in entries if e is not None]
    return found if len(found) == len(entries) else None


def parse(served: Any) -> Served:
    """Tensors as they are; one sequence as ``(T, W)``; a list of sequences, ragged or not, as ``(B, T, W)``.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(served, tuple) and len(served) == 2 and all(hasattr(x, "shape") or _nested(x) for x in served):
        try:
            ids, logp = map(torch.as_tensor, served)
        except ValueError as error:
            raise ValueError(
                f"{NAME}: (ids, logprobs) as lists must be as long everywhere, wanted (…, T, K) both: {error}"
            ) from None
        if ids.shape != logp.shape or ids.dim() < 2:
            raise ValueError(f"{NAME}: ids have shape {tuple(ids.shape)}, logprobs {tuple(logp.shape)}; wanted (…, T, K) both")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{NAME}: ids must be integers, got {ids.dtype}")
        return Served(ids.long(), logp.detach().double(), None)
    if isinstance(served, str | Mapping) or not isinstance(served, Sequence):
        raise ValueError(
            f"{NAME}: wanted a list with an element a position (choice['prompt_logprobs'], choice['logprobs']['top_logprobs'], "
            f"meta_info['input_top_logprobs']), a list of such lists, or (ids, logprobs) tensors; got {type(served).__name__}"
        )
    rows = [_position(x) for x in served]
    if not any(row is None for row in rows):
        ids, logp = _pad([row or [] for row in rows])
        return Served(ids, logp, None)
    sequences = [[_position(y) for y in x or ()] for x in served]
    if any(row is None for row in chain(*sequences)):
        raise ValueError(f"{NAME}: lists nest too deeply, wanted positions or sequences of positions")
    lengths = [len(s) for s in sequences]
    longest = max(lengths)
    ids, logp = _pad([row or [] for s in sequences for row in s + [[]] * (longest - len(s))])
    shape = (len(sequences), longest, ids.shape[1])
    return Served(ids.view(shape), logp.view(shape), lengths)


def _nested(x: Any) -> bool:
    """Whether these are lists of lists of numbers: ids, or log-probs, of each position."""
    while isinstance(x, list) and x and isinstance(x[0], list):
        x = x[0]
        if x and not isinstance(x[0], list):
            return all(isinstance(y, int | float) for y in x)
    return False


def _pad(rows: list[list[Entry]]) -> tuple[Tensor, Tensor]:
    with torch.device("cpu"):
        counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        width = int(counts.max()) if rows else 0
        ids = torch.full((len(rows), width), -1, dtype=torch.int64)
        logp = torch.full((len(rows), width), -math.inf, dtype=torch.float64)
        inside = torch.arange(width) < counts.unsqueeze(1)
        ids[inside] = torch.tensor([e[0] for e in chain(*rows)], dtype=torch.int64)
        logp[inside] = torch.tensor([e[1] for e in chain(*rows)], dtype=torch.float64)
    return ids, logp
