"""Losses: one small file a method, each a frozen class whose ``tokens`` is the formula of a token.

The classes of all files here are this package's names: ``rk.losses.GRPO``. A method exists because its file does.
"""

from importlib import import_module
from pkgutil import walk_packages
from typing import Any

from rlad_kernels.core.divergence import Divergence
from rlad_kernels.core.options import Options
from rlad_kernels.core.types import LossOutput
from rlad_kernels.losses.ratio.kdrl import annealed_coef
from rlad_kernels.losses.ratio.kl import Reference
from rlad_kernels.losses.ratio.rollout import ICEPOP, TIS, Rollout

__all__ = ["ICEPOP", "TIS", "Divergence", "LossOutput", "Reference", "Rollout", "annealed_coef"]


def load() -> None:
    """Import every file of this folder, and take the losses that it defines."""
    for module in walk_packages(__path__, f"{__name__}."):
        for name, x in vars(import_module(module.name)).items():
            if isinstance(x, type) and issubclass(x, Options) and x.__module__ == module.name and name not in __all__:
                globals()[name] = x
                __all__.append(name)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"rlad_kernels.losses has no {name!r}; it has {', '.join(sorted(__all__))}")


load()
