"""Inputs and float64 oracles of the rest: losses on the targets, from hidden states."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk
from tests.oracles import reduced

Inputs = dict[str, Any]


def inputs(needs: tuple[str, ...], weighted: bool = False) -> tuple[list[str], Inputs]:
    """The arguments that receive gradient, and all arguments: 4 sequences of 5 tokens, one fully masked, vocabulary 23."""
    b, t, d, v = 4, 5, 8, 23
    pool = {"weights": torch.rand(b, t) + 0.1} if weighted else {}
    mask = torch.rand(b, t) > 0.2
    mask[2] = False
    given = {"hidden": torch.randn(b, t, d), "weight": torch.randn(v, d), "target": torch.randint(v, (b, t)), "mask": mask}
    return ["hidden", "weight"], {**given, **pool}


INPUTS = {name: partial(inputs, weighted=True) for name in ("cross_entropy_z_loss", "label_smoothing")}


def call(method: Any, *, hidden: Tensor, weight: Tensor, target: Tensor, **rest: Any) -> Any:
    return rk.linear_loss(hidden, rk.LMHead(weight), target, method.loss, **rest)


def seq_kd(hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return reduced(-logp, mask, "token-mean")


def cross_entropy_z_loss(hidden: Tensor, weight: Tensor, target: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    z = hidden @ weight.T
    nll = z.logsumexp(-1) - z.gather(-1, target[..., None])[..., 0]
    return reduced(weights * nll + 1e-4 * z.logsumexp(-1) ** 2, mask, "token-mean")


def label_smoothing(hidden: Tensor, weight: Tensor, target: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy to the label with a tenth of its mass spread over the vocabulary."""
    logp = (hidden @ weight.T).log_softmax(-1)
    label = torch.full_like(logp, 0.1 / logp.shape[-1])
    label = label.scatter_add(-1, target[..., None], torch.full_like(logp[..., :1], 0.9))
    return reduced(-weights * (label * logp).sum(-1), mask, "token-mean")


ORACLES = {"seq_kd": seq_kd, "cross_entropy_z_loss": cross_entropy_z_loss, "label_smoothing": label_smoothing}
