"""TRL: our head under its trainers by one call, and a GRPO trainer with a teacher.

``use_rlad_kernels()`` is all a script needs; ``RLADTrainer`` and ``RLADConfig`` are imported on first use.
"""

from importlib import import_module
from typing import Any

from rlad_kernels.integrations.trl.patch import ChunkedDivergenceFunction, ChunkedLogProbFunction, use_rlad_kernels
from rlad_kernels.integrations.wiring import TESTED, framework

__all__ = ["ChunkedDivergenceFunction", "ChunkedLogProbFunction", "RLADConfig", "RLADTrainer", "use_rlad_kernels"]


def __getattr__(name: str) -> Any:
    if name in ("RLADConfig", "RLADTrainer"):
        framework(name, "trl", f"trl=={TESTED['trl'][-1]} peft")
        return getattr(import_module("rlad_kernels.integrations.trl.trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
