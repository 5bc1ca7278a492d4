"""QuACK's chunked cross entropy: a mean over tokens, so the objective without advantages."""

from __future__ import annotations

from torch import Tensor

from bench.inputs import Inputs
from bench.providers.base import Provider, logits


def quack(x: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x.hidden, x.weight, x.target)


def mean(x: Inputs) -> Tensor:
    return -logits(x).log_softmax(-1).gather(1, x.target[:, None]).mean()


PROVIDERS = (Provider("quack", quack, "QuACK, cross entropy only", 3, 6, mean, needs=("quack", "cutlass"), gpu=True),)
