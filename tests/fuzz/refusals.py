"""A right call with one thing wrong: an error must name it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from tests.fuzz.draws import Case, pick

Draw = Callable[..., Any]
Call = dict[str, Any]


def _at(x: Tensor, keep: Tensor, value: Any) -> Tensor:
    """``x`` with ``value`` in the first row that counts."""
    x = x.clone()
    x[tuple(keep.nonzero()[0])] = value
    return x


# what is spoiled, and the word that the error has for it
SPOILS: dict[str, tuple[str, Callable[[Case, Call], Call]]] = {
    "target beyond the vocabulary": ("target", lambda c, x: {"target": _at(x["target"], c.keep, c.vocab)}),
    "target −1": ("target", lambda c, x: {"target": _at(x["target"], c.keep, -1)}),
    "target of another shape": ("target", lambda c, x: {"target": x["target"].unsqueeze(-1)}),
    "target of floats": ("target", lambda c, x: {"target": x["target"].double()}),
    "hidden of another width": ("hidden", lambda c, x: {"hidden": torch.cat([x["hidden"], x["hidden"][..., :1]], -1)}),
    "hidden of another dtype": (
        "dtype", lambda c, x: {"hidden": x["hidden"].to(torch.float32 if c.hidden.dtype != torch.float32 else torch.bfloat16)},
    ),
    "hidden of ints": ("hidden", lambda c, x: {"hidden": torch.zeros(c.hidden.shape, dtype=torch.int64)}),
    "hidden None": ("hidden", lambda c, x: {"hidden": None}),
    "a weight for a head": ("head", lambda c, x: {"head": c.weight}),
    "a temperature of 0": ("temperature", lambda c, x: {"head": _tempered(c, 0.0)}),
    "a temperature of NaN": ("temperature", lambda c, x: {"head": _tempered(c, float("nan"))}),
    "a mask of halves": ("mask", lambda c, x: {"mask": torch.full(c.shape, 0.5)}),
    "a mask of another shape": ("mask", lambda c, x: {"mask": torch.ones(*c.shape, 2)}),
    "an id beyond the vocabulary": ("topk_ids", lambda c, x: {"topk_ids": _at(c.ids, c.keep, c.vocab)}),
    "an id of −2": ("topk_ids", lambda c, x: {"topk_ids": _at(c.ids, c.keep, -2)}),
    "ids of another shape": ("topk_ids", lambda c, x: {"topk_ids": c.ids[..., :1].squeeze(-1)}),
    "more ids than the vocabulary": ("topk_ids", lambda c, x: {"topk_ids": torch.zeros(*c.shape, c.vocab + 1, dtype=torch.int64)}),
    "a tail of nothing": ("topk_ids", lambda c, x: {"tail": True, "topk_ids": None}),
    "filter_eps of 1": ("filter_eps", lambda c, x: {"filter_eps": 1.0}),
    "filter_eps of NaN": ("filter_eps", lambda c, x: {"filter_eps": float("nan")}),
    "keep without a unit": ("keep", lambda c, x: {"keep": "much"}),
    "an unknown extra": ("extras", lambda c, x: {"extras": ("perplexity",)}),
}  # fmt: skip


def _tempered(case: Case, temperature: float) -> rk.LMHead:
    rows = _at(torch.ones(case.shape), case.keep, temperature)
    return rk.LMHead(case.weight, case.bias, **{**case.options, "temperature": rows})


def refused(draw: Draw, case: Case) -> str:
    """One spoilt call of linear_logp, or of the other ops where they have the argument."""
    if not case.keep.any():
        case.mask, case.keep = None, torch.ones_like(case.keep)
        case.target = torch.zeros_like(case.target)
        case.ids = case.ids.clamp_min(-1)
        case.options["temperature"] = 1.0
    what = pick(draw, *SPOILS)
    word, spoil = SPOILS[what]
    call = {"hidden": case.hidden, "head": case.head, "target": case.target, "mask": case.mask}
    changed = call | spoil(case, call)
    ops: list[Callable[[], Any]] = [lambda: rk.linear_logp(**changed)]
    shared = set(changed) <= set(call)
    if shared:
        ops.append(lambda: rk.linear_topk(k=1, **changed))
        ops.append(lambda: rk.linear_loss(loss=rk.losses.CrossEntropy(), **changed))
        if word != "target":
            ops.append(lambda: rk.linear_gather(ids=case.ids, **{k: v for k, v in changed.items() if k != "target"}))
    op = pick(draw, *range(len(ops)))
    with case.world(), rk.set_checks(True), pytest.raises((ValueError, TypeError), match=word):
        ops[op]()
    return what
