"""Wrong wiring, refused with an error that names the fix."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlad_kernels.head import LMHead


def check_version(name: str, package: str, version: str, supported: tuple[str, ...]) -> None:
    """Raise a RuntimeError unless ``version`` is one of the supported ones."""
    if version not in supported:
        raise RuntimeError(
            f"{name}: {package} {version} is not supported, only {', '.join(supported)}: pip install {package}=={supported[-1]}"
        )


def check_head(name: str, hidden: Tensor, weight: Tensor) -> None:
    """Raise a ValueError unless hidden ``(…, D)`` fits the head's weight ``(V, D)`` and the weight is whole."""
    if hasattr(weight, "ds_id"):
        raise ValueError(
            f"{name}: the LM head is partitioned by DeepSpeed ZeRO-3 and would be gone in the backward; use ZeRO-2 or FSDP2"
        )
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: weight (V, D) has shape {tuple(weight.shape)}, hidden (…, D) has D={hidden.shape[-1]}; "
            "pass the head of the model that gave the hidden states"
        )


def check_vocab(name: str, student: int, teacher: int, fix: str) -> None:
    """Raise a ValueError unless both heads have the same number of ids."""
    if student != teacher:
        raise ValueError(f"{name}: the student's head has {student} ids, the teacher's {teacher}; {fix}")


def check_plain_head(name: str, model: Any) -> None:
    """Raise a ValueError unless the model's own logits are those of ``LMHead.from_model(model)``; the model is asked once."""
    try:
        LMHead.from_model(model)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('LMHead.from_model: ')}") from error
