"""TRL 1.16: the log-probs of its GRPO trainer."""

from __future__ import annotations

from torch import Tensor

from bench.inputs import Inputs
from bench.providers.base import Provider


def trl(x: Inputs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    outputs = ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.target, 1.0, 32768, None, 1.0, ())  # its call site's chunk
    return -(outputs[0] * x.advantage).mean()


PROVIDERS = (Provider("trl", trl, "TRL ChunkedLogProbFunction", 4, 7, needs=("trl",)),)
