"""What is measured: one forward and backward of a policy-gradient loss, or of a top-K extraction, per provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import rlad_kernels as rk

EPS32 = 2.0**-23


@dataclass
class Inputs:
    """Hidden states and a head whose logits have a standard deviation of about 3, targets and per-token weights."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    advantage: Tensor

    @classmethod
    def make(cls, n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            x = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
            return x.mul_(scale).requires_grad_()

        hidden, weight = normal(n, d), normal(v, d, scale=3 / d**0.5)
        target = torch.randint(v, (n,), generator=generator, device=device)
        advantage = torch.empty(n, device=device).normal_(generator=generator)
        return cls(hidden, weight, target, advantage)

    def to(self, dtype: torch.dtype) -> Inputs:
        twins = (x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight))
        return Inputs(*twins, self.target, self.advantage.to(dtype if dtype == torch.float64 else torch.float32))


def naive(x: Inputs) -> Tensor:
    """What trainers write by hand: all logits, log_softmax, gather."""
    logp = F.log_softmax((x.hidden @ x.weight.T).to(torch.promote_types(x.hidden.dtype, torch.float32)), dim=-1)
    return -(logp.gather(1, x.target[:, None])[:, 0] * x.advantage).mean()


def linear_logp(x: Inputs) -> Tensor:
    """Ours, arbitrary cotangent: four products."""
    return -(rk.linear_logp(x.hidden, rk.LMHead(x.weight), x.target).logp * x.advantage).mean()


def _pg(scores: rk.TokenScores, advantage: Tensor) -> Tensor:
    return -scores.logp * advantage


def fused(x: Inputs) -> Tensor:
    """Ours, the loss inside the sweep: three products."""
    return rk.fused_linear_loss(x.hidden, rk.LMHead(x.weight), x.target, _pg, inputs={"advantage": x.advantage}).loss


def topk(x: Inputs) -> Tensor:
    """Ours, top-64 with lse, tail mass and target log-prob: one product, no gradient."""
    top = rk.linear_topk(x.hidden, rk.LMHead(x.weight), 64, target=x.target)
    assert top.target_logp is not None
    return -(top.target_logp * x.advantage).mean()


PROVIDERS: dict[str, Callable[[Inputs], Tensor]] = {"naive": naive, "linear_logp": linear_logp, "fused": fused, "topk": topk}
PRODUCTS = {"naive": 3, "linear_logp": 4, "fused": 3, "topk": 1}


def step(provider: str, x: Inputs) -> Tensor:
    """One forward and, where the provider has one, backward."""
    loss = PROVIDERS[provider](x)
    if loss.requires_grad:
        x.hidden.grad = x.weight.grad = None
        loss.backward()
    return loss.detach()


def gate(provider: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Errors against float64 at a small shape, relative Frobenius for gradients; raises if ours leaves the contract."""
    x = Inputs.make(96, 64, 4096, dtype, device)
    truth = x.to(torch.float64)
    errors = {"loss": abs(step(provider, x).item() - step("naive", truth).item())}
    if x.hidden.grad is not None:
        for name in ("hidden", "weight"):
            mine, exact = getattr(x, name).grad.double(), getattr(truth, name).grad
            errors[f"d_{name}"] = ((mine - exact).norm() / exact.norm()).item()
    bound = 1e-5 if dtype == torch.float32 else 3e-3
    if provider != "naive" and max(errors.values()) > bound:
        raise SystemExit(f"bench: {provider} in {dtype} is wrong, not slow: {errors}")
    return errors
