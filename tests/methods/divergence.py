"""Inputs and float64 oracles of the divergence family: both sides' logits, and each formula as its paper has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.divergence import Divergence

Inputs = dict[str, Any]
SIZES = {"hidden": (10, 12), "weight": (67, 12), "bias": (67,)}
TEACHER = {"teacher_hidden": (10, 20), "teacher_weight": (67, 20)}


def inputs(needs: tuple[str, ...]) -> tuple[list[str], Inputs]:
    """The arguments that receive gradient, and all arguments, float32: 10 packed tokens, a teacher of another width."""
    given: Inputs = {k: torch.randn(*s) * (0.5 if "weight" in k else 1) for k, s in {**SIZES, **TEACHER}.items()}
    mask = torch.rand(10) > 0.2
    return ["hidden", "weight", "bias"], {**given, "mask": mask}


def call(
    method: Any, *, hidden: Tensor, weight: Tensor, bias: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, **rest: Any
) -> Any:
    """The sweep on these arguments; the multi-teacher row gets the teacher and its rolled twin."""
    head, teacher = rk.LMHead(weight, bias), rk.LMHead(teacher_weight)
    if method.name == "multi_teacher_rkl":
        rolled = teacher_hidden.roll(1, 0)
        both = {"teacher_weights": (0.7, 0.3)}
        sides = [teacher_hidden, rolled], [teacher, teacher]
        return rk.linear_divergence_loss(hidden, head, *sides, method.loss, **both, **rest)
    return rk.linear_divergence_loss(hidden, head, teacher_hidden, teacher, method.loss, **rest)


def kl(lx: Tensor, ly: Tensor) -> Tensor:
    return (lx.exp() * (lx - ly)).sum(-1)


def mixture(lp: Tensor, lq: Tensor, share: float) -> Tensor:
    return (share * lp.exp() + (1 - share) * lq.exp()).log()


def jsd(lq: Tensor, lp: Tensor, beta: float = 0.5) -> Tensor:
    m = mixture(lp, lq, beta)
    return beta * kl(lp, m) + (1 - beta) * kl(lq, m)


def abkd(lq: Tensor, lp: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    q, p, s = lq.exp(), lp.exp(), alpha + beta
    own_p, own_q = p**alpha * p**beta, q**alpha * q**beta  # of the power s, which is not the sum of the others to the last place
    return -(p**alpha * q**beta - alpha / s * own_p - beta / s * own_q).sum(-1) / (alpha * beta)


def power(lq: Tensor, lp: Tensor, lam: float = 2 / 3) -> Tensor:
    return (lp.exp() * (((lp - lq) * lam).exp() - 1)).sum(-1) / (lam * (lam + 1))


def todi(lq: Tensor, lp: Tensor, beta: float = 1.0) -> Tensor:
    share = torch.sigmoid(beta * (lp - lq)).detach()
    return (share * lp.exp() * (lp - lq) + (1 - share) * lq.exp() * (lq - lp)).sum(-1)


def akl(lq: Tensor, lp: Tensor, mu: float = 0.5) -> Tensor:
    p, order = lp.exp().sort(-1, descending=True)
    gap = (p - lq.exp().gather(-1, order)).abs().detach()
    tail = p.cumsum(-1) > mu
    tail[..., 0] = False
    tail &= p < torch.where(tail, torch.inf, p).amin(-1, keepdim=True)  # what ties with the head's last is in it
    g_head, g_tail = torch.where(tail, 0, gap).sum(-1), torch.where(tail, gap, 0).sum(-1)
    whole = g_head + g_tail
    return (g_head * kl(lp, lq) + g_tail * kl(lq, lp)) / torch.where(whole == 0, 1, whole)


def taid(lq: Tensor, lp: Tensor, tau: float = 0.4) -> Tensor:
    return kl(((1 - tau) * lq.detach() + tau * lp).log_softmax(-1), lq)


VALUES = {
    "forward_kl": lambda lq, lp: kl(lp, lq),
    "reverse_kl": lambda lq, lp: kl(lq, lp),
    "jeffreys": lambda lq, lp: (kl(lp, lq) + kl(lq, lp)) / 2,
    "gkd_jsd": jsd,
    "skew_kl": lambda lq, lp, lam=0.1: kl(lp, mixture(lp, lq, lam)),
    "skew_rkl": lambda lq, lp, lam=0.1: kl(lq, mixture(lp, lq, 1 - lam)),
    "abkd": abkd,
    "alpha_divergence": lambda lq, lp, alpha=0.5: (1 - (alpha * lp + (1 - alpha) * lq).exp().sum(-1)) / (alpha * (1 - alpha)),
    "power_divergence": power,
    "redistill": power,
    "hellinger": lambda lq, lp: 1 - ((lp + lq) / 2).exp().sum(-1),
    "total_variation": lambda lq, lp: (lp.exp() - lq.exp()).abs().sum(-1) / 2,
    "todi": todi,
    "akl": akl,
    "taid": taid,
    "multi_teacher_rkl": lambda lq, lp: 0.7 * kl(lq, lp) + 0.3 * kl(lq, lp.roll(1, 0)),
}


def _oracle(name: str) -> Any:
    def value(hidden: Tensor, weight: Tensor, bias: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, mask: Tensor) -> Tensor:
        lq = (hidden @ weight.T + bias).log_softmax(-1)
        lp = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
        return VALUES[name](lq, lp)[mask].mean()

    return value


ORACLES = {name: _oracle(name) for name in VALUES}
_LOSSES = {name: rk.METHODS[name].loss for name in VALUES if name not in ("multi_teacher_rkl", "redistill")}
DIVERGENCES = {name: loss for name, loss in _LOSSES.items() if isinstance(loss, Divergence)}  # each formula with one teacher
