"""Our head under TRL's trainers by one call."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import check_floats, check_range
from rlad_kernels.core.head import LMHead
from rlad_kernels.engine.call import flat_rows
from rlad_kernels.integrations.wiring import TESTED, check_head, check_plain_head, check_version, check_vocab, framework
from rlad_kernels.linear.divergence import linear_divergence
from rlad_kernels.linear.logp import EXTRAS, score
from rlad_kernels.losses.vocab.kl import JSD


class ChunkedLogProbFunction:
    """``trl.kernels.ChunkedLogProbFunction`` on :func:`rlad_kernels.linear_logp`: float32 logits, one sweep.

    Example:
        >>> import torch
        >>> from rlad_kernels.integrations.trl import ChunkedLogProbFunction
        >>> hidden, weight, targets = torch.zeros(2, 8), torch.ones(4, 8), torch.tensor([0, 3])
        >>> logp, entropy, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 256)
        >>> logp
        tensor([-1.3863, -1.3863])
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", *EXTRAS),
    ) -> tuple[Tensor | None, ...]:
        """(logp, entropy, log_sum_sq_probs, mean_logits, is_top1) of ``hidden (N, H)``, None for what is not in ``outputs``.

        ``targets (N,)`` are ints; −100 gives 0. ``outputs`` may also name log_probs, which always come. ``chunk_size`` is ignored:
        the tiles are ours (:func:`rlad_kernels.set_tile`). What does not fit raises a ValueError.
        """
        name = "ChunkedLogProbFunction"
        check_head(name, hidden, weight)
        flat_rows(name, "targets", targets, hidden.shape[:-1], hidden.device, ids=True)
        known = ("log_probs", "entropy", *EXTRAS)
        if isinstance(outputs, str) or any(x not in known for x in outputs):
            raise ValueError(f"{name}: outputs must be a tuple of names among {known}, got {outputs!r}")
        head = _head(name, hidden, weight, bias, temperature, logit_scale, final_logit_softcapping)
        extras = tuple(x for x in EXTRAS if x in outputs)
        scores = score(name, hidden, head, targets, entropy="entropy" in outputs, extras=extras)
        found = scores.extras
        is_top1 = found["is_top1"].bool() if "is_top1" in found else None
        return scores.logp, scores.entropy, found.get("log_sum_sq_probs"), found.get("mean_logits"), is_top1


class ChunkedDivergenceFunction:
    """``trl.kernels.chunked_divergence.ChunkedDivergenceFunction`` on :func:`rlad_kernels.linear_divergence`.

    Example:
        >>> import torch
        >>> from rlad_kernels.integrations.trl import ChunkedDivergenceFunction
        >>> hidden, weight = torch.zeros(2, 8), torch.ones(4, 8)
        >>> divergence, entropy = ChunkedDivergenceFunction.apply(hidden, weight, None, hidden, weight, None, 0.5)
        >>> divergence
        tensor([0., 0.])
    """

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(divergence, student's entropy) of each token; the entropy has no gradient and costs one product of its own.

        As in TRL β = 0 is the forward KL(teacher‖student), β = 1 the reverse one, and between them the generalised JSD. Hidden
        states are ``(N, H)``, of both sides for the same N tokens; what does not fit raises a ValueError.
        """
        name = "ChunkedDivergenceFunction"
        check_head(name, student_hidden, student_weight)
        check_head(name + " (teacher)", teacher_hidden, teacher_weight)
        flat_rows(name, "teacher_hidden", teacher_hidden[..., 0], student_hidden.shape[:-1], student_hidden.device)
        check_range(name, "beta", beta, 0, 1)
        check_vocab(name, len(student_weight), len(teacher_weight), "cut the larger head to the ids both tokenizers have")
        student = _head(
            name, student_hidden, student_weight, student_bias, temperature, student_logit_scale, student_final_logit_softcapping
        )
        teacher = _head(
            name, teacher_hidden, teacher_weight, teacher_bias, temperature, teacher_logit_scale, teacher_final_logit_softcapping
        )
        value = linear_divergence(student_hidden, student, teacher_hidden, teacher, JSD(beta))
        with torch.no_grad():
            target = torch.zeros(student_hidden.shape[:-1], dtype=torch.int64, device=student_hidden.device)
            entropy = score(name, student_hidden, student, target, entropy=True).entropy
        assert entropy is not None
        return value, entropy


def _head(
    name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, logit_scale: float, softcap: float | None
) -> LMHead:
    """TRL multiplies in the dtype of the hidden states, whatever the head's."""
    if bias is not None:
        check_floats(name, "bias", bias)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
    return LMHead(weight, bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap)


def _compact(device: torch.device) -> bool:
    """Our op gains from dropped rows on every device."""
    return True


class _Patch:
    """One use of the patch; ``undo()``, or leaving the ``with`` block, ends it. The last one to end restores TRL."""

    def __init__(self) -> None:
        self._on = True

    def undo(self) -> None:
        """Give TRL its own functions back, in models made under the patch as well. Undoing twice does nothing."""
        if self._on:
            self._on = False
            _uses.remove(self)
            if not _uses:
                for module, theirs, ours in _replaced():
                    _swap(module, ours, theirs)

    def __enter__(self) -> _Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


_uses: list[_Patch] = []
_pairs: list[tuple[str, Any, Any]] = []


def _replaced() -> list[tuple[str, Any, Any]]:
    """(modules by prefix, TRL's object, ours)."""
    if not _pairs:
        kernels = importlib.import_module("trl.kernels")
        divergence = importlib.import_module("trl.kernels.chunked_divergence")
        utils = importlib.import_module("trl.trainer.utils")
        importlib.import_module("trl.trainer.distillation_trainer")
        theirs = utils.add_fused_lm_head

        def add_fused_lm_head(
            model: Any, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: tuple[str, ...] = ("log_probs",)
        ) -> None:
            """TRL's, for a model whose head it can read; every call of the model then goes through our op."""
            check_plain_head("add_fused_lm_head", model)
            mine, forward = "forward" in vars(model), model.forward
            theirs(model, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32, outputs=outputs)
            try:
                _check_reading(model)
            except (RuntimeError, ValueError):
                model.forward = forward
                if not mine:
                    del model.forward
                raise

        _pairs.extend(
            [
                ("trl", kernels.ChunkedLogProbFunction, ChunkedLogProbFunction),
                ("trl", divergence.ChunkedDivergenceFunction, ChunkedDivergenceFunction),
                ("trl", theirs, add_fused_lm_head),
                ("trl.trainer", utils._use_triton, _compact),  # elsewhere it chooses TRL's own kernels
            ]
        )
    return _pairs


def _check_reading(model: Any) -> None:
    """Raise a ValueError unless TRL, which reads the configuration, took the head for what the model's forward does."""
    read, head = inspect.getclosurevars(model.forward.__func__).nonlocals, LMHead.from_model(model)
    if unread := {"logit_scale", "final_logit_softcapping"} - read.keys():
        raise RuntimeError(
            f"add_fused_lm_head: this TRL keeps no {', '.join(sorted(unread))} to hold its reading of the head against; "
            f"pip install trl=={TESTED['trl'][-1]}"
        )
    found = {"logit_scale": head.logit_scale, "softcap": head.softcap, "ids": head.vocab_size}
    theirs = {"logit_scale": read["logit_scale"], "softcap": read["final_logit_softcapping"], "ids": len(head.weight)}
    if any(theirs[k] != x and not (x and theirs[k] and math.isclose(theirs[k], x, rel_tol=1e-6)) for k, x in found.items()):
        raise ValueError(
            f"add_fused_lm_head: TRL takes the head of {type(model).__name__} for {theirs}, from its configuration, its forward "
            f"does {found}; make the configuration say so, or train without TRL's fused head"
        )


def _swap(prefix: str, old: Any, new: Any) -> None:
    """Rebind every name of the loaded modules under ``prefix`` that is bound to ``old``; later imports copy from these."""
    for name, module in list(sys.modules.items()):
        if name == prefix or name.startswith(prefix + "."):
            for key in [k for k, v in list(vars(module).items()) if v is old]:
                setattr(module, key, new)


def _names() -> dict[str, tuple[str, ...]]:
    """What is replaced, with the parameters that ours have."""
    logp, divergence = (
        ("ctx", *inspect.signature(x.apply).parameters) for x in (ChunkedLogProbFunction, ChunkedDivergenceFunction)
    )
    return {
        "trl.kernels:ChunkedLogProbFunction.forward": logp,
        "trl.kernels.chunked_divergence:ChunkedDivergenceFunction.forward": divergence,
        "trl.trainer.utils:add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
        "trl.trainer.utils:_use_triton": ("device",),
    }


def use_rlad_kernels() -> _Patch:
    """Put our head under TRL's trainers (GRPO, RLOO, DPO, KTO, SFT, Distillation, …), whether made before or after this call.

    Returns:
        A handle: ``.undo()`` restores TRL, and so does leaving it as a context manager.

    Raises:
        RuntimeError: for a TRL without the names that are replaced, or with other parameters of them. A version on which the
            tests have not run, but with these names, is warned of.
    """
    framework("use_rlad_kernels", "trl", f"trl=={TESTED['trl'][-1]}")
    if not _uses:
        check_version("use_rlad_kernels", "trl", _names())
    for module, theirs, ours in _replaced():
        _swap(module, theirs, ours)
    _uses.append(_Patch())
    return _uses[-1]
