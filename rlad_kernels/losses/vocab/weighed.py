"""Two KLs weighed column by column or by the teacher's head and tail, and the KL to a target between teacher and student."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rlad_kernels.core.check import check_range
from rlad_kernels.core.divergence import Divergence, Kind, Ranks
from rlad_kernels.losses.methods import add_divergence
from rlad_kernels.losses.vocab.kl import sym


@dataclass(frozen=True)
class ToDi(Divergence):
    """Σ[σ·p·w − (1−σ)·q·w], σ = sigmoid(βw) held constant (ToDi, arXiv 2505.16297); inf where either KL is.

    Args:
        beta: β > 0.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.ToDi())
        tensor([0.2311])
    """

    beta: float = 1.0

    def check(self) -> None:
        check_range(self.name, "beta", self.beta, 0, math.inf, "()")

    def kind(self) -> Kind:
        return Kind("todi", (self.beta, 0.0, 0.0))


_MOST = math.log(0.501)  # a log-prob beyond it is the largest of its row


def adaptive_coefficients(lq: Tensor, lp: Tensor, mu: float, ranks: Ranks) -> Tensor:
    """AKL's shares of forward and reverse KL: Σ|p − q| over the teacher's head, and over its tail, as parts of the whole.

    The head: tokens by falling p while their cumulative mass is ≤ μ, the first in any case, and all that tie with the last.
    """
    p = lp.exp()
    head = p >= _last_of_head(p, mu, ranks)
    gap = p - lq.exp()
    sure = (lp > _MOST) & (lq > _MOST)  # both near 1: their difference is what the others' leave
    gap = torch.where(sure, ranks.summed(torch.where(sure, 0, gap).sum(1, keepdim=True)), gap).abs_()
    whole, part = ranks.summed(torch.stack([gap.sum(1), torch.where(head, gap, 0).sum(1)]))
    forward = torch.where(whole > 0, part / whole, 0.5)
    return torch.stack([forward, 1 - forward])


def _last_of_head(p: Tensor, mu: float, ranks: Ranks) -> Tensor:
    """The smallest p of the head, ``(R, 1)``, of probabilities ``(R, C)``, the columns on this rank."""
    falling = p.sort(dim=1, descending=True).values
    mass = falling.cumsum(1)
    if ranks.world == 1:
        return falling.gather(1, ((mass <= mu).sum(1, keepdim=True) - 1).clamp_min(0))
    # the smallest number t with Σ of all p ≥ t at most μ, bit by bit: floats from 0 up are in the order of their bits
    mass, rising = F.pad(mass, (1, 0)), falling.neg()
    bits = torch.int32 if p.dtype == torch.float32 else torch.int64
    high = p.new_full((len(p), 1), 2).view(bits)
    low = torch.zeros_like(high)

    def sum_from(t: Tensor) -> Tensor:
        return ranks.summed(mass.gather(1, torch.searchsorted(rising, -t, right=True)))

    for _ in range(torch.iinfo(bits).bits - 1):
        middle = (low + high) // 2
        fits = sum_from(middle.view(p.dtype)) <= mu
        low, high = torch.where(fits, low, middle + 1), torch.where(fits, middle, high)
    t = high.view(p.dtype)
    # of the next p, and those that tie with it, one may still fit
    below = ranks.largest(F.pad(torch.where(p < t, p, -1), (0, 1), value=-1).amax(1, keepdim=True))
    inside = sum_from(t)
    return torch.where((inside == 0) | (inside + below <= mu) & (below >= 0), below, t)


@dataclass(frozen=True)
class AKL(Divergence):
    """(g_head·KL(p‖q) + g_tail·KL(q‖p))/(g_head + g_tail), g = sg Σ|p − q| over the teacher's head and tail (arXiv 2404.02657).

    Sorts the vocabulary of each token; inf where either KL is.

    Args:
        mu: mass of the head in [0, 1], ties with its last token included.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.AKL())
        tensor([0.1155])
    """

    mu: float = 0.5

    def check(self) -> None:
        check_range(self.name, "mu", self.mu, 0, 1)

    def kind(self) -> Kind:
        return Kind("sym", coefficients=lambda lq, lp, ranks: adaptive_coefficients(lq, lp, self.mu, ranks))


@dataclass(frozen=True)
class TAID(Divergence):
    """KL(p_τ‖q), p_τ = sg softmax((1−τ)·z_student + τ·z_teacher) (TAID, arXiv 2501.16937).

    The mixture is of logits, not of probabilities; inf where no column has mass on both sides.

    Args:
        tau: τ in [0, 1]; it rises from 0.4 to 1 in training.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.TAID(0.4))
        tensor([0.0196])
    """

    tau: float

    def check(self) -> None:
        check_range(self.name, "tau", self.tau, 0, 1)

    def kind(self) -> Kind:
        ends = self.tau in (0, 1)  # at 0 the target is the student itself
        return sym(self.tau, 0) if ends else Kind("taid", (self.tau, 0.0, 0.0))


add_divergence(
    "todi",
    ToDi(1.0),
    "Σ[σ·p·w − (1−σ)·q·w], w = log p − log q, σ = sg sigmoid(w)",
    "arXiv 2505.16297",
    "A",
    note="The forward KL dominates where the student is below the teacher.",
    published=(
        "The code: β = 1 (there is none in the paper's form), in float32, the weights detached; its reduction was not read again "
        "(the mean over tokens here)."
    ),
)
add_divergence(
    "akl",
    AKL(0.5),
    "(g_head·KL(p‖q) + g_tail·KL(q‖p))/(g_head + g_tail), g = sg Σ|p − q|",
    "arXiv 2404.02657",
    "A",
    note="Sorts the vocabulary of each token.",
    published=(
        "The code: μ = 0.5 and the top token in the head, gaps detached, the mean over the labelled tokens; what ties with the "
        "head's last token is cut by the sort there, inside here."
    ),
)
add_divergence(
    "taid",
    TAID(0.4),
    "KL(p_τ‖q), p_τ = sg softmax((1−τ)·z_student + τ·z_teacher)",
    "arXiv 2501.16937",
    "A",
    note="The mixture is of logits, not of probabilities; τ rises from 0.4 to 1 in training.",
    published=(
        "The code: cross-entropy to p_τ, detached; τ from 0.4 to 1, moved by the loss (α = 5e-4, momentum 0.99); its reduction was "
        "not read again. Here the KL, which has the same gradient, τ as given, the mean over tokens."
    ),
)
