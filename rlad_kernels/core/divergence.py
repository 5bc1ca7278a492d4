"""A divergence over the whole vocabulary as one object, and what the row pass is told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from rlad_kernels.core.options import Options


class Ranks(Protocol):
    """What a rank that has some columns of each row asks the others; without others each answer is what was given."""

    world: int

    def summed(self, x: Tensor) -> Tensor:
        """Σ over the ranks."""
        ...

    def largest(self, x: Tensor) -> Tensor:
        """The maximum over the ranks."""
        ...


class Kind(NamedTuple):
    """What ``rlad::divergence_`` is told, and what is found from a chunk's log-probs (student's, teacher's) before."""

    family: str
    numbers: tuple[float, float, float] = (0.0, 0.0, 0.0)
    forward: float = 0.0  # coefficients of KL(p‖q) and KL(q‖p) in the family "sym"
    reverse: float = 0.0
    factor: float = 1.0
    coefficients: Callable[[Tensor, Tensor, Ranks], Tensor] | None = None  # log-probs (C, V) → (2, C): forward and reverse


@dataclass(frozen=True)
class Divergence(Options):
    """D(p, q) over the whole vocabulary, p the teacher's distribution, q the student's; only q receives gradient.

    The ones here have a :meth:`kind`, which the kernels know. Your own is a frozen dataclass with :meth:`values`, slower and with
    the memory of its temporaries.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class SquaredError(rk.losses.Divergence):
        ...     def values(self, student_logp, teacher_logp):
        ...         return (student_logp.exp() - teacher_logp.exp()).square().sum(-1)
        >>> hidden, head = torch.zeros(2, 4, requires_grad=True), rk.LMHead(torch.ones(3, 4))
        >>> rk.linear_divergence_loss(hidden, head, hidden, head, SquaredError()).loss.item()
        0.0
    """

    @property
    def products(self) -> int:
        """2·N·D·V matrix products of :func:`linear_divergence_loss`, forward and backward."""
        return 4

    def needed(self) -> tuple[str, ...]:
        """The tensors that a call must give."""
        return ("teacher_hidden", "teacher_head")

    def kind(self) -> Kind | None:
        """What the row pass is told; None for a divergence that is given by :meth:`values`."""
        return None

    def values(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        """``(C,)`` of log-probs ``(C, V)`` of a chunk of tokens, in differentiable PyTorch."""
        raise NotImplementedError(f"{self.name}: kind() or values(student_logp, teacher_logp) must be defined")
