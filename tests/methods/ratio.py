"""Inputs and float64 oracles of the ratio family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.oracles import reduced, surrogate

Inputs = dict[str, Any]


def inputs(needs: tuple[str, ...]) -> tuple[list[str], Inputs]:
    """The arguments that receive gradient, and all arguments, float32: 4 sequences of 7 tokens, one of them fully masked."""
    b, t = 4, 7
    logp = -torch.rand(b, t) * 3 - 0.01
    pool = {
        "old_logp": logp + 0.3 * torch.randn(b, t),
        "teacher_logp": logp + 0.6 * torch.randn(b, t),
        "ref_logp": logp + 0.3 * torch.randn(b, t),
        "advantages": torch.randn(b, t),
    }
    mask = torch.rand(b, t) > 0.2
    mask[2] = False
    return ["logp"], {"logp": logp, "mask": mask, **{k: pool[k] for k in needs}}


def grpo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return reduced(surrogate(logp, old_logp, advantages), mask, "token-mean")


def trrd(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return reduced(surrogate(logp, old_logp, advantages, teacher_logp, alpha=0.5), mask, "seq-mean-token-mean")


ORACLES = {"grpo": grpo, "trrd": trrd}
