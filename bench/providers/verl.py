"""verl: its PyTorch chunks (FSDP's default) and its Triton kernels, without verl's package initialisation, which wants Ray."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor

from bench.inputs import Inputs
from bench.providers.base import Provider


@cache
def _room(name: str) -> Any:
    """The module ``name`` with its parent packages left empty."""
    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("not installed: verl")
    path, parts = spec.submodule_search_locations[0], name.split(".")[:-1]
    for i, part in enumerate(parts):
        path = path if i == 0 else f"{path}/{part}"
        package = ModuleType(".".join(parts[: i + 1]))
        package.__path__ = [path]
        sys.modules.setdefault(package.__name__, package)
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
