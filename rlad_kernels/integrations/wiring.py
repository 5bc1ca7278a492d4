"""Wrong wiring, refused with an error that names the fix."""

from __future__ import annotations

import inspect
import pkgutil
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_floats, may_read
from rlad_kernels.core.head import LMHead
from rlad_kernels.engine.call import flat_rows

# What the tests ran on, oldest first; the pins are those of requirements-dev.txt, `make test-newest` runs the newest there is.
TESTED = {"trl": ("1.16.0",), "transformers": ("5.23.0", "5.24.0")}


def framework(name: str, package: str, wanted: str) -> Any:
    """The package that ``name`` works with.

    Raises:
        ImportError: where it cannot be imported, with the command that installs what is ``wanted``.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"{name} needs {package} ({error}): pip install {wanted}") from error


def check_version(name: str, package: str, replaced: Mapping[str, tuple[str, ...]]) -> None:
    """Hold a framework to what is used of it: the names decide, and a version on which the tests have not run is only warned of.

    Args:
        replaced: ``"module:function"`` → the parameters it must have, in order; a last ``"…"`` allows for more.

    Raises:
        RuntimeError: naming each function that is not there, or has other parameters, and the version that has it.
    """
    version, tested = import_module(package).__version__, TESTED[package]
    missing = [x for x in (_difference(path, wanted) for path, wanted in replaced.items()) if x]
    if missing:
        raise RuntimeError(
            f"{name}: {package} {version} has not what it takes: {'; '.join(missing)}; pip install {package}=={tested[-1]}"
        )
    if version not in tested:
        warnings.warn(
            f"{name}: {package} {version} has the names that are replaced, but the tests ran on {', '.join(tested)}", stacklevel=3
        )


def _difference(path: str, wanted: tuple[str, ...]) -> str | None:
    """What is wrong with one function, if anything."""
    try:
        found = tuple(inspect.signature(pkgutil.resolve_name(path)).parameters)
    except (ImportError, AttributeError):
        return f"no {path.replace(':', '.')}"
    begin = wanted[:-1] if wanted[-1:] == ("…",) else wanted
    if found[: len(begin)] == begin and (len(found) == len(begin) or begin != wanted):
        return None
    return f"{path.replace(':', '.')}({', '.join(found)}), wanted ({', '.join(wanted)})"


def check_head(name: str, hidden: Tensor, weight: Tensor) -> None:
    """Raise a ValueError unless hidden ``(…, D)`` fits the head's weight ``(V, D)`` and the weight is whole."""
    if hasattr(weight, "ds_id"):
        raise ValueError(
            f"{name}: the LM head is partitioned by DeepSpeed ZeRO-3 and would be gone in the backward; use ZeRO-2 or FSDP2"
        )
    check_floats(name, "weight", weight)
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


def kept_ids(name: str, argument: str, ids: Tensor, keep: Tensor, size: int, *, slots: bool = False) -> Tensor:
    """``ids`` as int64 in ``keep``'s shape, 0 where masked; −100 is no mask here, but an id that the head does not have.

    ``slots``: ids ``(…, K)`` whose −1 is an empty slot; all of a masked position are.

    Raises:
        ValueError: for another shape, device or dtype, or a kept id outside ``[0, size)`` (on CUDA with ``set_checks(True)``; its
            row is NaN otherwise).
    """
    flat_rows(name, argument, ids, keep.shape, keep.device, ids=True, extra=int(slots))
    low = -1 if slots else 0
    ids = torch.where(keep.unsqueeze(-1) if slots else keep, ids.long(), low)
    wrong = (ids < low) | (ids >= size)
    if may_read(ids) and not torch.compiler.is_compiling() and bool(wrong.any()):
        empty = " or -1" if slots else ""
        raise ValueError(
            f"{name}: {argument} must be in [0, vocab_size={size}){empty} where it is not masked, got {ids[wrong][0].item()}"
        )
    return torch.where(wrong, size, ids)
