"""The registered methods as test cases: their inputs by name, their oracles, and how a method is called on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses.methods import METHODS, Method
from tests.methods import divergence, other, ratio, topk

FAMILIES = {"ratio": ratio, "top-k": topk, "divergence": divergence, "other": other}


def split(
    method: Method, *, reduction: str | None = None, seq_ids: Tensor | None = None, denominator: float | None = None, **given: Any
) -> tuple[Method, rk.TokenScores, dict[str, Any]]:
    """A case's inputs: the method with those that are fields of its loss, the scores, and what a call is given besides."""
    options = {f.name: given.pop(f.name) for f in fields(method.loss) if f.name in given}
    scores = rk.TokenScores(**{k: given.pop(k) for k in rk.TokenScores._fields if k in given})
    given["reduction"] = rk.Reduction(reduction, seq_ids, denominator)
    return replace(method, loss=replace(method.loss, **options)), scores, given


def on_scores(method: Method, **given: Any) -> rk.losses.LossOutput:
    """A method on scores, tensors and options by name."""
    chosen, scores, rest = split(method, **given)
    return chosen(scores, **rest)


def case(name: str) -> tuple[Callable[..., rk.losses.LossOutput], list[str], dict[str, Any]]:
    """A method called by name of its inputs, which of these receive gradient, and the inputs."""
    method = METHODS[name]
    family = FAMILIES[method.family]
    leaves, given = getattr(family, "INPUTS", {}).get(name, family.inputs)(method.needs)
    call = getattr(family, "call", on_scores)  # a family whose arguments are made of the inputs
    return lambda **xs: call(method, **xs), leaves, given | getattr(family, "OPTIONS", {}).get(name, {})
