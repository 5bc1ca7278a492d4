"""Frozen options: a loss or a divergence is configured once, checked once, and told to a compiled op by a key and its floats."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Base of what is configured once: a frozen dataclass whose fields are the options, and whose :meth:`check` refuses bad ones.

    Equal by value, hashable, picklable. Under ``torch.compile`` one graph serves all values of the floats among the options. The
    others may be anything that can be hashed: bool, int, str, None, enum, tuple, another frozen dataclass (as a default by
    ``field(default_factory=lambda: …)``, where options are made inside a compiled function: that traces no object among defaults).
    """

    key: ClassVar[str]  # the class and the options that are no floats; set for each object, no field and no option

    def __post_init__(self) -> None:
        self.check()
        object.__setattr__(self, "key", _key(_structure(self, self.name)))

    @property
    def name(self) -> str:
        """The class's name, which errors begin with."""
        return type(self).__name__

    @property
    def numbers(self) -> list[float]:
        """The floats, in the order of the fields. Not kept: to ``torch.compile`` a copy would be another number than the option."""
        return _floats(self)

    def check(self) -> None:
        """Raise a ValueError that names the option, what came and what was wanted."""

    def __reduce__(self) -> tuple[Any, ...]:  # a key is this process's own
        return _made, (type(self), {f.name: getattr(self, f.name) for f in fields(self) if f.init})


_KEYS: dict[Hashable, str] = {}
_STRUCTURES: dict[str, Any] = {}


def _key(structure: Any) -> str:
    """The structure's key. Options made inside a compiled function have theirs while it is traced, before its ops run."""
    key = _KEYS.setdefault(structure, f"{structure[0].__qualname__} {len(_KEYS)}")
    _STRUCTURES[key] = structure
    return key


# As torch.compiler.assume_constant_result does, which imports the whole compiler for it.
_key._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def revived(key: str, numbers: list[float]) -> Any:
    """The options of this key with these floats."""
    return _filled(_STRUCTURES[key], iter(numbers))


def _made(kind: Any, options: dict[str, Any]) -> Any:
    return kind(**options)


def _floats(x: Any) -> list[float]:
    if isinstance(x, float):
        return [float(x)]
    return [number for _, part in _parts(x) for number in _floats(part)]


def _parts(x: Any) -> list[tuple[str, Any]]:
    """What options are made of, and the ends of their names."""
    if is_dataclass(x) and not isinstance(x, type):
        return [(f".{f.name}", getattr(x, f.name)) for f in fields(x) if f.init]
    return [(f"[{i}]", y) for i, y in enumerate(x)] if isinstance(x, tuple) else []


def _structure(x: Any, name: str) -> Hashable:
    """All of ``x`` but the floats: its type, and the structures of its parts, or itself."""
    if isinstance(x, float):
        return float
    options = is_dataclass(x) and not isinstance(x, type)
    if options and not type(x).__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ValueError(f"{name} must be a frozen dataclass, got {type(x).__name__}, which may change: dataclass(frozen=True)")
    if options or isinstance(x, tuple):
        return type(x), *(_structure(part, name + end) for end, part in _parts(x))
    if isinstance(x, Tensor):
        raise ValueError(f"{name} must be a number, got a tensor; options are frozen, tensors are passed to the call")
    try:
        hash(x)
    except TypeError:
        raise ValueError(f"{name} must be hashable (a tuple in place of a list), got {type(x).__name__}") from None
    return type(x), x


def _filled(structure: Any, floats: Iterator[float]) -> Any:
    """The inverse of :func:`_structure`."""
    if structure is float:
        return next(floats)
    kind, *rest = structure
    if is_dataclass(kind):
        names = [f.name for f in fields(kind) if f.init]
        return _made(kind, {k: _filled(x, floats) for k, x in zip(names, rest, strict=True)})
    if issubclass(kind, tuple):
        parts = [_filled(x, floats) for x in rest]
        return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
    return rest[0]
