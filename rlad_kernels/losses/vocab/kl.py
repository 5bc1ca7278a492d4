"""The two KLs and their mixtures; p is the teacher's distribution, q the student's."""

from __future__ import annotations

from dataclasses import dataclass

from rlad_kernels.core.check import check_range
from rlad_kernels.core.divergence import Divergence, Kind
from rlad_kernels.losses.methods import add_divergence


def sym(forward: float, reverse: float) -> Kind:
    """forward·KL(p‖q) + reverse·KL(q‖p)."""
    return Kind("sym", forward=forward, reverse=reverse)


def _mix(forward: float, reverse: float, share: float) -> Kind:
    """forward·KL(p‖m) + reverse·KL(q‖m), m = share·p + (1 − share)·q."""
    return Kind("mix", (forward, reverse, share))


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """Σp·w: KL(p‖q); inf where q = 0 < p.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.ForwardKL())
        tensor([0.1109])
    """

    def kind(self) -> Kind:
        return sym(1, 0)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """−Σq·w: KL(q‖p) (MiniLLM's, arXiv 2306.08543); inf where p = 0 < q.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.ReverseKL())
        tensor([0.1201])
    """

    def kind(self) -> Kind:
        return sym(0, 1)


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """½KL(p‖q) + ½KL(q‖p); inf where either is.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.Jeffreys())
        tensor([0.1155])
    """

    def kind(self) -> Kind:
        return sym(0.5, 0.5)


@dataclass(frozen=True)
class JSD(Divergence):
    """β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q (GKD, arXiv 2306.13649).

    The formula tends to 0 at the ends; as in TRL and Liger, β = 0 is the forward and β = 1 the reverse KL.

    Args:
        beta: β in [0, 1].

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.JSD())
        tensor([0.0285])
    """

    beta: float = 0.5

    def check(self) -> None:
        check_range(self.name, "beta", self.beta, 0, 1)

    def kind(self) -> Kind:
        beta = self.beta
        return sym(1, 0) if beta == 0 else sym(0, 1) if beta == 1 else _mix(beta, 1 - beta, beta)


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p‖λp + (1−λ)q) (DistiLLM, arXiv 2402.03898).

    Args:
        lam: λ in [0, 1).

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.SkewKL())
        tensor([0.0906])
    """

    lam: float = 0.1

    def check(self) -> None:
        check_range(self.name, "lam", self.lam, 0, 1, "[)")

    def kind(self) -> Kind:
        return _mix(1, 0, self.lam) if self.lam else sym(1, 0)


@dataclass(frozen=True)
class SkewRKL(Divergence):
    """KL(q‖(1−λ)p + λq) (DistiLLM, arXiv 2402.03898).

    Args:
        lam: λ in [0, 1).

    Example:
        >>> import torch, rlad_kernels as rk
        >>> student, teacher = rk.LMHead(torch.zeros(2, 1)), rk.LMHead(torch.tensor([[0.0], [1.0]]))
        >>> rk.linear_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher, rk.losses.SkewRKL())
        tensor([0.0950])
    """

    lam: float = 0.1

    def check(self) -> None:
        check_range(self.name, "lam", self.lam, 0, 1, "[)")

    def kind(self) -> Kind:
        return _mix(0, 1, 1 - self.lam) if self.lam else sym(0, 1)


add_divergence(
    "forward_kl",
    ForwardKL(),
    "Σp·log(p/q)",
    "arXiv 1503.02531",
    "A",
    published=(
        "Soft targets at temperature T, the loss times T², beside the data's cross-entropy; an example is a class, not a sequence. "
        "Here T = 1 unless the heads have one, no factor, the mean over tokens."
    ),
)
add_divergence(
    "reverse_kl",
    ReverseKL(),
    "Σq·log(q/p)",
    "arXiv 2306.08543",
    "A",
    published=(
        "The KL of whole sequences by a policy gradient with teacher-mixed sampling (0.2) and length normalisation. Here its "
        "single-step part, exact over the vocabulary, as in the code of DistiLLM and TRL; the mean over tokens."
    ),
)
add_divergence(
    "jeffreys",
    Jeffreys(),
    "½KL(p‖q) + ½KL(q‖p)",
    "textbook",
    "D",
    published="No source of its own: the mean of the two KLs, over tokens.",
)
add_divergence(
    "gkd_jsd",
    JSD(0.5),
    "β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q",
    "arXiv 2306.13649",
    "A",
    note="β = 0 and 1 are the forward and the reverse KL, as in TRL and Liger; the formula itself tends to 0 there.",
    published=(
        "The mean over a sequence's tokens, then over sequences; β from 0.1 to 0.9; no gradient through the sampling. Here the "
        "mean over tokens, as in TRL, whose default β is 0.5."
    ),
)
add_divergence(
    "skew_kl",
    SkewKL(0.1),
    "KL(p‖λp + (1−λ)q)",
    "arXiv 2402.03898",
    "A",
    published="λ = 0.1, the mean over the labelled tokens; the code drops Σp·log p, which has no gradient. The same gradient here.",
)
add_divergence(
    "skew_rkl",
    SkewRKL(0.1),
    "KL(q‖(1−λ)p + λq)",
    "arXiv 2402.03898",
    "A",
    published="λ = 0.1, the mean over the labelled tokens; the gradient through the mixture too. The same here.",
)
add_divergence(
    "multi_teacher_rkl",
    ReverseKL(),
    "Σ_i w_i·KL(q‖p_i)",
    "DeepSeek-V4 report",
    "C",
    published=(
        "Secondary sources: exact over the vocabulary, weights w_i of the domains' teachers; the weights and the reduction were "
        "not seen (token mean here)."
    ),
)
