"""Liger's chunked losses. GRPO: its advantages are per sequence, its value a ratio of 1 whose gradient is the policy gradient."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.inputs import Inputs
from bench.providers.base import Provider, jsd, logits, teacher_states


@cache
def _loss() -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # compiled=True fails in dynamo on torch 2.11
    return LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo")


def liger(x: Inputs) -> Tensor:
    hidden, target = x.hidden.unflatten(0, (-1, x.sequence)), x.target.unflatten(0, (-1, x.sequence))
    mask = torch.ones_like(target)
    loss, _ = _loss()(hidden, x.weight, target, mask, x.advantage[:: x.sequence])
    return loss


def ratio(x: Inputs) -> Tensor:
    logp = logits(x).log_softmax(-1).gather(1, x.target[:, None])[:, 0]
    return -((logp - logp.detach()).exp() * x.advantage).mean()


@cache
def _jsd() -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)


def liger_jsd(x: Inputs) -> Tensor:
    return _jsd()(x.hidden, x.weight, teacher_states(x), x.weight.detach(), x.target)


PROVIDERS = (
    Provider("liger", liger, "Liger LigerFusedLinearGRPOLoss, not compiled", 4, 7, ratio, needs=("liger_kernel",)),
    Provider("liger_jsd", liger_jsd, "Liger LigerFusedLinearJSDLoss", 4, 11, jsd, needs=("liger_kernel",)),
)
