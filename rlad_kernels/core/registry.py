"""What the library knows by name: token losses for the fused sweep, and the published methods with what is documented of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlad_kernels.core.check import refuse_options

TOKEN_LOSSES: dict[str, Callable[..., Any]] = {}


def register(name: str, *, rowwise: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a token loss ``(scores, **inputs) → (loss, metrics)`` known by name, so that it compiles fullgraph.

    ``rowwise=False`` marks one that reads other rows: ``fused_linear_loss`` refuses it.
    """

    def add(token_loss: Callable[..., Any]) -> Callable[..., Any]:
        setattr(token_loss, "rowwise", rowwise)  # noqa: B010 - a function has no such attribute to the type checker
        TOKEN_LOSSES[name] = token_loss
        return token_loss

    return add


FAMILIES = ("ratio", "top-k", "divergence", "other")


@dataclass(frozen=True)
class Method:
    """A published method: a public function and the options that make it this method. Calling it calls the function.

    ``confidence`` says how well the formula is sourced: A read in the paper or the official code, B two or more independent
    secondary sources, C one, D derived here.
    """

    name: str
    family: str
    call: Callable[..., Any]
    formula: str  # one line of the documentation
    needs: tuple[str, ...]  # tensors it wants besides the current policy's
    paper: str
    confidence: str
    products: int  # 2·N·D·V matrix products, forward and backward, at best
    note: str = ""  # what is known to go wrong, or is not what the paper claims
    options: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, str] = field(default_factory=dict)  # options without a default, and what they are

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for option, meaning in self.required.items():
            if kwargs.get(option) is None:
                raise ValueError(f"{self.name}: {option} is required ({meaning}), got None")
        try:
            return self.call(*args, **{**self.options, **kwargs})
        except TypeError:
            refuse_options(f"METHODS[{self.name!r}]", kwargs, self.call)
            raise


METHODS: dict[str, Method] = {}


def add_method(name: str, family: str, call: Callable[..., Any], **described: Any) -> None:
    """Add one row to ``METHODS``; the tests then want its oracle, and the documentation its row."""
    if name in METHODS or family not in FAMILIES:
        raise ValueError(f"add_method: name {name!r} must be new, family one of {FAMILIES}, got {family!r}")
    METHODS[name] = Method(name, family, call, **described)
