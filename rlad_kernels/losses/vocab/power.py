"""The α-β family and its kin, and total variation; p is the teacher's distribution, q the student's."""

from __future__ import annotations

from dataclasses import dataclass

from rlad_kernels.core.check import check_numbers
from rlad_kernels.core.divergence import Divergence, Kind
from rlad_kernels.losses.methods import add_divergence


def _alpha_beta(alpha: float, beta: float, factor: float = 1.0) -> Kind:
    return Kind("log_square", factor=factor) if alpha == beta == 0 else Kind("alpha_beta", (alpha, beta, 0.0), factor=factor)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """−Σ[p^α q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)]/(αβ), and its limits at α, β, α+β = 0 (ABKD, arXiv 2505.04560).

    Args:
        alpha, beta: α and β, finite; inf with a negative exponent, or at α = 0 or β = 0, where a KL is.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.AlphaBeta())
        tensor([0.1272])
    """

    alpha: float = 0.2
    beta: float = 0.7

    def check(self) -> None:
        check_numbers(self.name, alpha=self.alpha, beta=self.beta)

    def kind(self) -> Kind:
        return _alpha_beta(self.alpha, self.beta)


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """(1 − Σp^α q^(1−α))/(α(1−α)): :class:`AlphaBeta` with β = 1−α.

    Args:
        alpha: α, finite.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.AlphaDivergence())
        tensor([0.1148])
    """

    alpha: float = 0.5

    def check(self) -> None:
        check_numbers(self.name, alpha=self.alpha)

    def kind(self) -> Kind:
        return _alpha_beta(self.alpha, 1 - self.alpha)


@dataclass(frozen=True)
class PowerDivergence(Divergence):
    """Σp[(p/q)^λ − 1]/(λ(λ+1)) (Cressie and Read 1984); λ→0 is the forward KL, λ→−1 the reverse KL; −1−λ exchanges p and q.

    Args:
        lam: λ, finite.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.PowerDivergence())
        tensor([0.1077])
    """

    lam: float = 2 / 3

    def check(self) -> None:
        check_numbers(self.name, lam=self.lam)

    def kind(self) -> Kind:
        return _alpha_beta(1 + self.lam, -self.lam)


@dataclass(frozen=True)
class Hellinger(Divergence):
    """1 − Σ√(pq).

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.Hellinger())
        tensor([0.0287])
    """

    def kind(self) -> Kind:
        return _alpha_beta(0.5, 0.5, 0.25)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """½Σ|p − q|, gradient 0 where p = q.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.TotalVariation())
        tensor([0.2311])
    """

    def kind(self) -> Kind:
        return Kind("total_variation")


add_divergence(
    "abkd",
    AlphaBeta(0.2, 0.7),
    "−Σ[p^α q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)]/(αβ)",
    "arXiv 2505.04560",
    "A",
    published="The code: α = 0.2, β = 0.7 for GPT-2, the mean over the labelled tokens, p detached. The same here.",
)
add_divergence(
    "alpha_divergence",
    AlphaDivergence(0.5),
    "(1 − Σp^α q^(1−α))/(α(1−α))",
    "textbook",
    "D",
    published="No source of its own: abkd's with β = 1 − α, the mean over tokens; α = 0.5 is four times hellinger.",
)
add_divergence(
    "power_divergence",
    PowerDivergence(2 / 3),
    "Σp[(p/q)^λ − 1]/(λ(λ+1))",
    "Cressie and Read 1984",
    "B",
    note="The textbook direction, which weighs p > q up.",
    published="A goodness-of-fit statistic, λ = 2/3, twice this times the sample size; the mean over tokens here.",
)
add_divergence(
    "redistill",
    PowerDivergence(2 / 3),
    "Σp[(p/q)^λ − 1]/(λ(λ+1)), λ = 2/3",
    "arXiv 2602.04677",
    "B",
    note="Its equation was not read, nor which of p and q is divided: this is Cressie and Read's direction, the teacher as what is "
    "observed. PowerDivergence(-5/3) is the other one, Σq[(q/p)^λ − 1]/(λ(λ+1)).",
    published="λ = 2/3 in the place of distillation's KL, for image classifiers. Temperature, weight and T²: not stated in what "
    "was read, the abstract and a summary.",
)
add_divergence(
    "hellinger",
    Hellinger(),
    "1 − Σ√(pq)",
    "textbook",
    "D",
    published="No source of its own: the squared distance, the mean over tokens.",
)
add_divergence(
    "total_variation",
    TotalVariation(),
    "½Σ|p − q|",
    "arXiv 2604.00626",
    "A",
    published="The survey's D_f with f = ½·abs(u − 1); DistiLLM's code has the mean over the labelled tokens, as here.",
)
