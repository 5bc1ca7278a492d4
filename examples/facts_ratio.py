"""Facts of the ratio family that need no language model, computed with the library: claim, expected, found.

    python examples/facts_ratio.py        # a few seconds on a CPU

Expectations over a policy are exact: every token of a vocabulary of 64 is a row, and rows are weighed by the policy. The exit code
is 1 if a fact does not hold. The last line is

    TRRD, α = .3, the teacher clamp binds: gradient / (−Âr)                      0.3           0.3

Claims: the estimators' gradients and ExOPD's optimum (arXiv 2506.02208, 2602.12125), and what TRRD's
anchor does at its first step (arXiv 2602.22495).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import GRPO, LossOutput, Reference
from rlad_kernels.losses.ratio.opd import OPD
from rlad_kernels.losses.ratio.trrd import TRRD

VOCAB = 64
SUM = rk.Reduction("token-mean", denominator=1)


class Fact(NamedTuple):
    claim: str
    expected: float
    found: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return abs(self.found - self.expected) <= self.tolerance


def policies(seed: int = 0, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """Logits of random policies over the vocabulary."""
    random = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(VOCAB, generator=random, dtype=dtype)


def expected_gradient(z: Tensor, loss: Callable[[Tensor], LossOutput]) -> Tensor:
    """Σ_y π(y)·∇_z loss(log π(y)), by enumeration; ``loss`` sees every token once and must reduce with a denominator of 1."""
    z = z.detach().requires_grad_()
    logp = z.log_softmax(0)
    (slope,) = torch.autograd.grad(loss(logp).loss, logp, retain_graph=True)
    return torch.autograd.grad(logp, z, logp.detach().exp() * slope)[0]


def gap(x: Tensor, y: Tensor) -> float:
    """Largest difference, in units of the largest entry of ``y``."""
    return ((x - y).abs().max() / y.abs().max()).item()


def estimators() -> Iterator[Fact]:
    """Which KL an estimator's value, and which its backpropagated gradient, has in expectation."""
    rows = policies()
    z, b = next(rows), next(rows).log_softmax(0)
    q, x = z.softmax(0), z.log_softmax(0) - b
    given = {"advantages": torch.zeros_like(b), "ref_logp": b, "reduction": SUM}
    reverse, forward = q * (x - (q * x).sum()), q - b.exp()
    values = {"reverse": (q * x).sum().item(), "forward": -(b.exp() * x).sum().item()}
    for name in ("k2", "k3", "k3+", "k3++", "k4", "k5"):

        def loss(s: Tensor, name: str = name) -> LossOutput:
            return GRPO(reference=Reference(1.0, name))(s, old_logp=s, **given)

        kind, slope = ("forward", forward) if name in ("k3", "k5") else ("reverse", reverse)
        yield Fact(f"{name}: gradient is the {kind} KL's, relative error", 0, gap(expected_gradient(z, loss), slope), 1e-12)
        if name != "k2":
            value = (q * loss(z.log_softmax(0)).token_loss).sum().item()
            kind = "forward" if name == "k5" else "reverse"
            yield Fact(f"{name}: value is the {kind} KL", values[kind], value, 1e-12)
    naive = z.detach().requires_grad_()
    s = naive.log_softmax(0)
    (k1,) = torch.autograd.grad((q * (s - b)).sum(), naive)
    yield Fact("k1 backpropagated: largest entry of the gradient", 0, k1.abs().max().item(), 1e-12)
    opd = expected_gradient(z, lambda s: OPD()(s, old_logp=s.detach(), teacher_logp=b, reduction=SUM))
    yield Fact("sampled-token OPD: gradient is the reverse KL's, relative error", 0, gap(opd, reverse), 1e-12)


def extrapolation(weight: float = 1.25, steps: int = 200) -> Iterator[Fact]:
    """ExOPD on a table: its optimum is λ·log π* + (1 − λ)·log π_ref, and gradient descent finds it."""
    rows = policies(1)
    teacher, base, z = next(rows).log_softmax(0), next(rows).log_softmax(0), next(rows)
    best = (weight * teacher + (1 - weight) * base).log_softmax(0)

    opd = OPD(extrapolation=weight)

    def loss(s: Tensor) -> LossOutput:
        return opd(s, old_logp=s.detach(), teacher_logp=teacher, base_logp=base, reduction=SUM)

    yield Fact("ExOPD λ=1.25: gradient at λ·log π* + (1−λ)·log π_ref", 0, expected_gradient(best, loss).abs().max().item(), 1e-12)
    here = z.clone()
    optimiser = torch.optim.Adam([here], lr=0.2)
    for _ in range(steps):
        here.grad = expected_gradient(here, loss)
        optimiser.step()
    distance = (best.exp() * (best - here.log_softmax(0))).sum().item()
    yield Fact(f"ExOPD λ=1.25: KL to it after {steps} steps of Adam", 0, distance, 1e-4)
    toward = (best.exp() * (best - teacher)).sum().item()
    yield Fact("… and it is not the teacher: KL of the optimum to π*, at least .01", 1, float(toward > 0.01), 0)


def slope(log_r: float, loss: Callable[[Tensor], LossOutput]) -> float:
    s = torch.tensor([log_r], dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(s).loss, s)[0].item()


def edge(loss: Callable[[Tensor], LossOutput], live: float, dead: float) -> float:
    """Where the gradient stops, by bisection between a log-prob that has one and one that has none."""
    for _ in range(45):
        middle = (live + dead) / 2
        live, dead = (middle, dead) if slope(middle, loss) else (live, middle)
    return live


def anchor() -> Iterator[Fact]:
    """TRRD at α = .5, ε = .2."""

    def log(*x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float64).log()

    def trrd(s: Tensor, old: Tensor, teacher: Tensor, advantage: float, loss: TRRD | None = None) -> LossOutput:
        given = {"old_logp": old, "teacher_logp": teacher, "advantages": advantage * torch.ones_like(s)}
        return (loss or TRRD())(s, **given, reduction="token-mean")

    def grpo(s: Tensor, old: Tensor) -> LossOutput:
        return GRPO()(s, old_logp=old, advantages=torch.ones_like(s))

    zero = log(1.0)
    up = edge(lambda s: trrd(s, s.detach(), zero, 1.0), 0.0, 2.0)
    down = edge(lambda s: trrd(s, s.detach(), zero, -1.0), 0.0, -2.0)
    yield Fact("TRRD, first step, Â > 0: no gradient beyond s − t, nats", math.log(1.2) / 0.5, up, 1e-9)
    yield Fact("TRRD, first step, Â < 0: no gradient beyond t − s, nats", -math.log(0.8) / 0.5, -down, 1e-9)
    old, teacher = log(0.2), log(0.8)
    ratio = trrd(old, old, teacher, 1.0).metrics["ratio_mean"].item()
    yield Fact("π_old = .2, π_T = .8: TRRD's ratio at the first step", 0.5, ratio, 1e-9)
    bound = edge(lambda s: trrd(s, old, teacher, 1.0), old.item(), 0.0)
    yield Fact("π_old = .2, π_T = .8: TRRD pushes the token up to", 0.48, math.exp(bound), 1e-9)
    bound = edge(lambda s: grpo(s, old), old.item(), 0.0)
    yield Fact("… and GRPO up to", 0.24, math.exp(bound), 1e-9)
    yield Fact("TRRD, Â = 0: gradient", 0, slope(-1.0, lambda s: trrd(s, old, teacher, 0.0)), 0)
    plain = slope(-1.6, lambda s: grpo(s, old))
    alone = slope(-1.6, lambda s: trrd(s, old, log(0.0), 1.0, TRRD(alpha=1.0)))
    yield Fact("TRRD, α = 1, π_T = 0: gradient is GRPO's", plain, alone, 0)
    r = math.exp(0.3 * (-1.0 - old.item()) + 0.7 * -0.5)  # s − t = −.777 binds at −.5
    clamp = TRRD(alpha=0.3, teacher_clamp=0.5, clip=(1.0, 9.0))
    clamped = slope(-1.0, lambda s: trrd(s, old, teacher, 1.0, clamp))
    yield Fact("TRRD, α = .3, the teacher clamp binds: gradient / (−Âr)", 0.3, clamped / -r, 1e-9)


SECTIONS = (estimators, extrapolation, anchor)


def main() -> int:
    facts = [fact for section in SECTIONS for fact in section()]
    width = max(len(fact.claim) for fact in facts)
    print(f"{'claim':{width}}  {'expected':>12}  {'found':>12}")
    for fact in facts:
        print(f"{fact.claim:{width}}  {fact.expected:12.6g}  {fact.found:12.6g}  {'' if fact.holds else 'DOES NOT HOLD'}")
    return 0 if all(fact.holds for fact in facts) else 1


if __name__ == "__main__":
    sys.exit(main())
