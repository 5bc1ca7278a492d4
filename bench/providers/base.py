"""What a provider is, and the plain float64 truths it is held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.inputs import Inputs

Loss = Callable[[Inputs], Tensor]


def logits(x: Inputs) -> Tensor:
    return (x.hidden @ x.weight.T).to(torch.promote_types(x.hidden.dtype, torch.float32))


def policy_gradient(x: Inputs) -> Tensor:
    """What trainers write by hand, and everybody's objective: mean of −advantage·logp."""
    return -(logits(x).log_softmax(-1).gather(1, x.target[:, None])[:, 0] * x.advantage).mean()


def teacher_states(x: Inputs) -> Tensor:
    """Hidden states of a teacher with the student's head: the next token's."""
    return x.hidden.detach().roll(1, 0)


def jsd(x: Inputs) -> Tensor:
    """Jensen–Shannon divergence to the teacher over the whole vocabulary, by hand."""
    lq = logits(x).log_softmax(-1)
    lp = (teacher_states(x) @ x.weight.detach().T).to(lq.dtype).log_softmax(-1)
    m = torch.logaddexp(lq, lp) - math.log(2)
    return ((lp.exp() * (lp - m)).sum(-1) + (lq.exp() * (lq - m)).sum(-1)).mean() / 2


@dataclass(frozen=True)
class Provider:
    """A way to compute a loss, what it is called, and what it costs by count."""

    name: str
    loss: Loss
    what: str
    products: float  # matrix products of 2·N·D·V FLOPs, forward and backward
    passes: float  # times N×V logits cross memory or cache
    truth: Loss = policy_gradient
    bound: tuple[float, float] | None = None  # our contract in float32 and bf16; a peer's error is only reported
    peaked: bool = False  # inputs as peaked as a trained model's
    needs: tuple[str, ...] = ()
    gpu: bool = False
    logits: bool = False  # it holds them all

    def step(self, x: Inputs) -> Tensor:
        """One forward and, where there is one, backward; gradients stay on the inputs."""
        x.hidden.grad = x.weight.grad = None
        loss = self.loss(x)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()
