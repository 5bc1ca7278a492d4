"""The published methods by name: a loss configured as its source has it, and what is documented of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlad_kernels.core.divergence import Divergence
from rlad_kernels.core.token_loss import TokenLoss

FAMILIES = ("ratio", "top-k", "divergence", "other")
REWARDS = {"advantages", "correct"}


@dataclass(frozen=True)
class Method:
    """A published method. Calling it calls its loss on log-probs; ``help(METHODS[name])`` says with what.

    ``confidence`` says how well the formula is sourced: A read in the paper or the official code, B two or more independent
    secondary sources, C one, D derived here.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> rk.METHODS["dapo"].loss == rk.losses.GRPO(clip=(0.2, 0.28))
        True
        >>> logp = torch.zeros(2, 3)
        >>> rk.METHODS["dapo"](logp, old_logp=logp, advantages=torch.tensor([1.0, -2.0])).loss
        tensor(0.5000)
    """

    name: str
    family: str
    loss: TokenLoss | Divergence
    formula: str  # one line of the documentation
    paper: str
    confidence: str
    note: str = ""  # what is known to go wrong, or is not what the paper claims
    published: str = ""  # the source's own settings: reduction, clip, coefficients, what is detached; and where ours differ
    required: Mapping[str, str] = field(default_factory=dict)  # fields of Reduction without a default, and what they are

    def __post_init__(self) -> None:
        about = " ".join(x for x in (self.note, self.published and f"As published: {self.published}") if x)
        shown = f"{self.name}({self.signature()})\n\n{self.formula} ({self.paper}). {about}\n\n"
        object.__setattr__(self, "__doc__", f"{shown}{self.loss!r}\n\n{type(self.loss).__doc__}")

    @property
    def products(self) -> int:
        """2·N·D·V matrix products from hidden states, forward and backward."""
        return self.loss.products

    @property
    def needs(self) -> tuple[str, ...]:
        """The tensors that a call must give besides the current policy's."""
        return self.loss.needed()

    @property
    def access(self) -> str:
        """What is wanted of the teacher: ``head`` (hidden states and head), ``top-k``, ``sampled``, ``text`` or ``none``."""
        if isinstance(self.loss, Divergence):
            return "head"
        known = {"teacher": "top-k", "teacher_logp": "sampled", "advantages": "none"}
        return next((access for tensor, access in known.items() if tensor in self.needs), "text")

    @property
    def signal(self) -> str:
        """What is learned from: ``reward``, ``teacher``, or ``both``."""
        rewarded = bool(REWARDS & {*self.needs})
        return ("both" if rewarded else "teacher") if self.access != "none" else "reward"

    @property
    def granularity(self) -> str:
        """Whether a position's loss reads the scores of its own ``token`` or of its whole ``sequence``."""
        return "sequence" if isinstance(self.loss, TokenLoss) and not self.loss.rowwise else "token"

    def signature(self) -> str:
        """What a call is given, in order."""
        if isinstance(self.loss, Divergence):
            return "hidden, head, teacher_hidden, teacher_head, *, mask=None, reduction=None"
        first = self.loss.read()
        needs = self.loss.needed()
        takes = [f"{k}=None" for k in self.loss.takes if k not in needs]
        return ", ".join([first[0] if len(first) == 1 else "scores", "*", *needs, "mask=None", "reduction=None", *takes])

    def __call__(self, scores: Any, **given: Any) -> Any:
        if isinstance(self.loss, Divergence):
            raise TypeError(f"METHODS[{self.name!r}] compares two heads: linear_divergence_loss(…, METHODS[{self.name!r}].loss)")
        reduction = given.get("reduction")
        for option, meaning in self.required.items():
            if getattr(reduction, option, None) is None:
                raise ValueError(f"{self.name}: Reduction({option}=…) is required ({meaning}), got {reduction!r}")
        return self.loss(scores, **given)


METHODS: dict[str, Method] = {}


def add_method(name: str, family: str, loss: TokenLoss | Divergence, **described: Any) -> None:
    """Add one row to ``METHODS``; the tests then want its oracle, and the documentation its row."""
    if name in METHODS or family not in FAMILIES:
        raise ValueError(f"add_method: name {name!r} must be new, family one of {FAMILIES}, got {family!r}")
    METHODS[name] = Method(name, family, loss, **described)


def add_divergence(name: str, loss: Divergence, formula: str, paper: str, confidence: str, **described: Any) -> None:
    """Add the row of a divergence."""
    add_method(name, "divergence", loss, formula=formula, paper=paper, confidence=confidence, **described)
