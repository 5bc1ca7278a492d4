"""verl: its PyTorch chunks (FSDP's default) and its Triton kernels, without verl's package initialisation, which wants Ray."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

from torch import Tensor

from bench.inputs import Inputs
from bench.providers.base import Provider


@cache
def _room(name: str) -> Any:
    """The module ``name`` with its parent packages left empty."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        spec = find_spec(".".join(parts[:i]))
        if spec is None:
            raise ImportError("not installed: verl")
        sys.modules.setdefault(spec.name, module_from_spec(spec))  # found, but not executed
    return import_module(name)


def torch_chunks(x: Inputs) -> Tensor:
    fused = _room("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    logp, _ = fused(x.hidden[None], x.weight, x.target[None])
    return -(logp[0] * x.advantage).mean()


def kernels(x: Inputs) -> Tensor:
    logp, _ = _room("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy(x.hidden, x.weight, x.target, 1.0, "none")
    return -(logp * x.advantage).mean()


PROVIDERS = (
    Provider("verl", torch_chunks, "verl FusedLinearForPPO, PyTorch chunks", 4, 12, needs=("verl",)),
    Provider("verl_triton", kernels, "verl linear_cross_entropy, Triton", 4, 4, needs=("verl",), gpu=True),
)
