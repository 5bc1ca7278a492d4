"""Apple's cut-cross-entropy: its default filters the gradient, so its error is part of its figure."""

from __future__ import annotations

from torch import Tensor

from bench.inputs import Inputs
from bench.providers.base import Provider


def cce(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return (linear_cross_entropy(x.hidden, x.weight, x.target, reduction="none") * x.advantage).mean()


PROVIDERS = (Provider("cce", cce, "cut-cross-entropy, default filter", 4, 0, needs=("cut_cross_entropy",), gpu=True),)
