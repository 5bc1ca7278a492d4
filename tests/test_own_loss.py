"""A user's own TokenLoss: options of any frozen kind, metrics of its own; eager and compiled, on log-probs and in the sweep."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import LossOutput
from tests.oracles import reduced
from tests.sweeps import Own, problem, support
from tests.test_compiled_calls import Compiled

N, K = 9, 3


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> None:
    torch._dynamo.reset()


class Shape(Enum):
    LINEAR = "linear"
    SQUARE = "square"


class Window(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Bonus:
    coef: float = 0.1
    power: int = 2
    windows: tuple[Window, ...] = (Window(0.0, 1.0), Window(1.0, 4.0))


USUAL = Bonus()  # by a function: torch.compile traces no object among defaults


@dataclass(frozen=True, kw_only=True)
class Mixed(rk.TokenLoss):
    """Every kind of option changes the value; one of them chooses the metrics."""

    clip: tuple[float, float] = (0.5, 2.0)
    signed: bool = True
    floor: float | None = None
    shape: Shape = Shape.SQUARE
    bonus: Bonus | None = field(default_factory=lambda: USUAL)
    repeat: int = 2
    name_of_metric: str = "mine"

    needs = ("w", "teacher")
    takes = ("extra",)
    reads = ("logp", "entropy", "topk_logp", "tail_logp")

    def tokens(self, scores: rk.TokenScores, *, w: Tensor, teacher: rk.TopK, extra: Tensor | None = None) -> Any:
        ratio = (scores.logp + 3).exp()
        loss = (w if self.signed else 1 + w.abs()) * ratio.clamp(*self.clip)
        if self.floor is not None:
            loss = torch.maximum(loss, torch.full_like(loss, self.floor))
        if self.shape is Shape.SQUARE:
            loss = loss.square()
        metrics = {self.name_of_metric: ratio, "least_max": scores.logp - 100}
        if self.bonus is not None:
            widths = sum(x.high - x.low for x in self.bonus.windows)
            for _ in range(self.bonus.power):
                loss = loss + self.bonus.coef * widths * scores.entropy
            metrics["bonus"] = scores.entropy
        for _ in range(self.repeat):
            loss = loss + scores.topk_logp.exp().sum(-1) + 0.1 * scores.tail_logp.exp()
        return loss if extra is None else loss + extra, metrics


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {}, "tuple": {"clip": (0.8, 1.2)}, "bool": {"signed": False}, "number for None": {"floor": 0.3},
    "enum": {"shape": Shape.LINEAR}, "None for a dataclass": {"bonus": None}, "dataclass": {"bonus": Bonus(0.3, power=3)},
    "tuple of tuples": {"bonus": Bonus(windows=(Window(0.0, 0.5),))}, "int": {"repeat": 1}, "str": {"name_of_metric": "ratio"},
    "reduction": {"reduction": "seq-mean-token-mean"},
}  # fmt: skip


def fused(loss: rk.TokenLoss, hidden: Tensor, weight: Tensor, target: Tensor, given: dict[str, Any], **more: Any) -> LossOutput:
    return rk.linear_loss(hidden, rk.LMHead(weight), target, loss, **given, **more)


def on_scores(loss: rk.TokenLoss, hidden: Tensor, weight: Tensor, target: Tensor, given: dict[str, Any], **more: Any) -> LossOutput:
    ids = given["teacher"].ids if "teacher" in given else None
    scores = rk.linear_logp(hidden, rk.LMHead(weight), target, topk_ids=ids, entropy=True, tail=ids is not None, mask=more["mask"])
    return loss(scores, **given, **more)


ROADS: dict[str, Callable[..., LossOutput]] = {"sweep": fused, "log-probs": on_scores}
any_road = pytest.mark.parametrize("road", ROADS)


def sequences(n: int) -> Tensor:
    """Of 3 tokens, and of the rest."""
    return (torch.arange(n) > 2).long()


def world(taught: bool = True, n: int = N) -> tuple[list[Tensor], tuple[Any, ...], dict[str, Any]]:
    """What receives gradient, a road's arguments after the loss, and its keywords."""
    p = problem(n=n, v=31, k=K, bias=False)
    given = {"w": torch.randn(n), **({"teacher": support(p.ids)} if taught else {})}
    more = {"mask": torch.rand(n) > 0.2}
    if taught:
        more["reduction"] = rk.Reduction(seq_ids=sequences(n))
    return p.leaves, (p.hidden, p.weight, p.target, given), more


def result(out: LossOutput, leaves: list[Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(out.loss, leaves)
    return {"loss": out.loss, "token_loss": out.token_loss, **out.metrics, "d_hidden": gradients[0], "d_weight": gradients[1]}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for k, x in want.items():
        assert (got[k] - x).abs().max() <= 32 * torch.finfo(torch.float32).eps * (1 + x.abs().max()), k


def by_hand(loss: Mixed, hidden: Tensor, weight: Tensor, target: Tensor, given: dict[str, Any], **more: Any) -> LossOutput:
    """The same from logits: plain PyTorch, and no part of the library but the loss's own formula."""
    logp = (hidden @ weight.T).log_softmax(-1)
    outside = torch.ones_like(logp, dtype=torch.bool).scatter(1, given["teacher"].ids, False)
    scores = rk.TokenScores(
        logp.gather(1, target[:, None])[:, 0], None, -(logp.exp() * logp).sum(1), logp.gather(1, given["teacher"].ids),
        torch.where(outside, logp, -torch.inf).logsumexp(1),
    )  # fmt: skip
    token, metrics = loss.tokens(scores, **given)
    mask = more["mask"]
    kept = {k: x[mask] for k, x in {**metrics, "entropy": scores.entropy}.items()}
    mean = reduced(token, mask, loss.reduction, sequences(N))
    means = {k: (x.max() if k.endswith("_max") else x.mean()).detach() for k, x in kept.items()}
    return LossOutput(mean, torch.where(mask, token, 0).detach(), means)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("variant", VARIANTS)
@any_road
def test_options_of_every_kind(road: str, variant: str) -> None:
    """Eager as from logits, and compiled as eager where the loss is made inside the graph."""
    call, options = ROADS[road], VARIANTS[variant]
    leaves, args, more = world()
    loss = Mixed(**options)
    want = result(by_hand(loss, *args, **more), leaves)
    eager = result(call(loss, *args, **more), leaves)
    rows_skipped = eager.pop("rows_skipped", None)
    assert (rows_skipped is not None) == (road == "sweep")
    same(eager, want)
    defaults = result(call(Mixed(), *args, **more), leaves)
    assert variant in ("defaults", "str") or (defaults["loss"] - eager["loss"]).abs() > 1e-3
    compiled = Compiled(lambda *xs, **ys: call(Mixed(**options), *xs, **ys), "aot_eager")
    got = result(compiled.call(*args, **more), leaves)
    got.pop("rows_skipped", None)
    same(got, eager)


@pytest.mark.slow_interpreted
@any_road
def test_a_graph_is_not_used_for_other_options(road: str) -> None:
    """One compiled function that is given one loss after the other."""
    leaves, args, more = world()
    call = torch.compile(ROADS[road], fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=4 * len(VARIANTS)):
        for _ in range(2):
            for options in VARIANTS.values():
                loss = Mixed(**options)
                same(result(call(loss, *args, **more), leaves), result(ROADS[road](loss, *args, **more), leaves))


@dataclass(frozen=True, kw_only=True)
class Annealed(rk.TokenLoss):
    coef: float = 1.0
    pair: tuple[float, float | None] = (0.5, None)
    bonus: Bonus = field(default_factory=lambda: USUAL)

    needs = ("w",)
    reads = ("logp", "entropy")

    def tokens(self, scores: rk.TokenScores, *, w: Tensor) -> Any:
        loss = self.coef * w * scores.logp - self.pair[0] * scores.logp.exp() + self.bonus.coef * scores.entropy
        return loss, {"mine": self.coef * scores.logp}


ANNEALED: dict[str, Callable[[float], Annealed]] = {
    "field": lambda c: Annealed(coef=c), "in a tuple": lambda c: Annealed(pair=(c, None)),
    "in a dataclass": lambda c: Annealed(bonus=Bonus(c)), "all": lambda c: Annealed(coef=c, pair=(-c, None), bonus=Bonus(2 * c)),
}  # fmt: skip


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("made", ["inside", "outside"])
@pytest.mark.parametrize("name", ANNEALED)
@any_road
def test_floats_do_not_recompile(road: str, name: str, made: str) -> None:
    """Once as a constant, once as a number."""
    make = ANNEALED[name]
    leaves, args, more = world(taught=False)

    def f(x: Any) -> LossOutput:
        return ROADS[road](make(x) if made == "inside" else x, *args, **more)

    compiled = Compiled(f, "aot_eager")
    for step in range(5):
        c = 0.9 - 0.1 * step
        given = c if made == "inside" else make(c)
        same(result(compiled.call(given), leaves), result(f(given), leaves))
    assert compiled.graphs == 2


@dataclass(frozen=True, kw_only=True)
class Switched(rk.TokenLoss):
    coef: float = 0.0

    reads = ("logp", "entropy")

    def tokens(self, scores: rk.TokenScores) -> Any:
        loss = -scores.logp
        return (loss - self.coef * scores.entropy, {"bonus": self.coef * scores.entropy}) if self.coef else (loss, {})


@pytest.mark.slow_interpreted
@any_road
def test_a_number_that_switches_a_metric(road: str) -> None:
    leaves, (*args, _), more = world(taught=False)
    call = torch.compile(lambda c, *xs: ROADS[road](Switched(coef=c), *xs, {}, **more), fullgraph=True, backend="aot_eager")
    for c in (0.5, 0.25, 0.0, 0.75):
        got, want = result(call(c, *args), leaves), result(ROADS[road](Switched(coef=c), *args, {}, **more), leaves)
        same(got, want)
        assert ("bonus" in got) == (c != 0)


@pytest.mark.slow_interpreted
@any_road
def test_any_number_of_tokens(road: str) -> None:
    loss, compiled = Mixed(), Compiled(ROADS[road], dynamic=True)
    for n in (N, 2 * N, N + 3):
        leaves, args, more = world(n=n)
        same(result(compiled.call(loss, *args, **more), leaves), result(ROADS[road](loss, *args, **more), leaves))
    assert compiled.graphs == 1


def _class_of(factor: float) -> rk.TokenLoss:
    @dataclass(frozen=True, kw_only=True)
    class Same(rk.TokenLoss):
        def tokens(self, scores: rk.TokenScores) -> Any:
            return factor * scores.logp, {}

    return Same()


@any_road
def test_two_classes_of_one_name(road: str) -> None:
    """As a notebook makes them when a cell runs again."""
    leaves, (*args, _), more = world(taught=False)
    for loss in (_class_of(1.0), _class_of(-2.0)):
        f = torch.compile(lambda *xs, loss=loss: ROADS[road](loss, *xs, {}, **more), fullgraph=True, backend="aot_eager")
        same(result(f(*args), leaves), result(ROADS[road](loss, *args, {}, **more), leaves))
        torch._dynamo.reset()


def test_equal_options_are_equal() -> None:
    for options in VARIANTS.values():
        loss = Mixed(**options)
        again = [Mixed(**options), replace(loss), copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
        assert all(x == loss and hash(x) == hash(loss) and (x.key, x.numbers) == (loss.key, loss.numbers) for x in again)
    losses = {Mixed(**options) for options in VARIANTS.values()}
    assert len(losses) == len(VARIANTS)
    assert Mixed(repeat=1).key != Mixed(repeat=True).key
    with pytest.raises(AttributeError, match="cannot assign to field 'repeat'"):
        Mixed().repeat = 3  # type: ignore[misc]


@dataclass
class Loose:
    coef: float = 1.0


@dataclass(frozen=True)
class Holder:
    things: Any = ()


REFUSED: dict[str, tuple[Any, str]] = {
    "tensor": (torch.tensor(0.5), r"Holds.x must be a number, got a tensor; options are frozen, tensors are passed to the call"),
    "tensor in a tuple": ((0.5, torch.ones(3)), r"Holds.x\[1\] must be a number, got a tensor"),
    "tensor in a dataclass": (Holder(torch.ones(3)), r"Holds.x.things must be a number, got a tensor"),
    "parameter": (torch.nn.Parameter(torch.ones(())), r"Holds.x must be a number, got a tensor"),
    "list": ([0.5, 2.0], r"Holds.x must be hashable \(a tuple in place of a list\), got list"),
    "dict": ({"low": 0.5}, r"Holds.x must be hashable .*, got dict"),
    "set": ({1}, r"Holds.x must be hashable .*, got set"),
    "array": (np.ones(3), r"Holds.x must be hashable .*, got ndarray"),
    "list in a dataclass": (Holder(([1],)), r"Holds.x.things\[0\] must be hashable .*, got list"),
    "dataclass that may change": (Loose(), r"Holds.x must be a frozen dataclass, got Loose, which may change"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Holds(rk.TokenLoss):
    x: Any = None

    def tokens(self, scores: rk.TokenScores) -> Any:
        return scores.logp, {}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_could_change_are_refused(case: str) -> None:
    value, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        Holds(x=value)


@dataclass(frozen=True, kw_only=True)
class Fickle(rk.TokenLoss):
    """Its metrics depend on the data, as they must not."""

    more: bool = True

    def tokens(self, scores: rk.TokenScores) -> Any:
        return scores.logp, {"sometimes": scores.logp} if (scores.logp.numel() > 0) == self.more else {}


@pytest.mark.parametrize("more", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_metrics_that_come_and_go(compiled: bool, more: bool) -> None:
    _, (*args, _), kept = world(taught=False)
    call = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    with pytest.raises(
        ValueError, match=r"^Fickle: tokens gave the metrics .*sometimes.*; which there are must not depend on data"
    ):
        call(Fickle(more=more), *args, {}, **kept)


@dataclass(frozen=True, kw_only=True)
class OneMetric(rk.TokenLoss):
    value: Any = 1.0

    def tokens(self, scores: rk.TokenScores) -> Any:
        return scores.logp, {"mine": self.value}


@any_road
def test_a_metric_is_one_value_a_token(road: str) -> None:
    _, (*args, _), more = world(taught=False)
    for value, got in ((1.0, "float"), (None, "NoneType")):
        with pytest.raises(ValueError, match=rf"^OneMetric: tokens must return mine of one value a token, .*got {got}"):
            ROADS[road](OneMetric(value=value), *args, {}, **more)


@any_road
def test_a_loss_alone_needs_no_metrics(road: str) -> None:
    leaves, (*args, given), more = world(taught=False)
    loss = Own(lambda s: s.logp)
    compiled = torch.compile(ROADS[road], fullgraph=True, backend="aot_eager")
    same(result(compiled(loss, *args, given, **more), leaves), result(ROADS[road](loss, *args, given, **more), leaves))


@any_road
def test_maxima_may_be_negative_and_are_0_of_no_token(road: str) -> None:
    _, args, more = world()
    out = ROADS[road](Mixed(), *args, **more)
    assert out.metrics["least_max"] < -100
    none = ROADS[road](Mixed(), *args, **{**more, "mask": torch.zeros(N, dtype=torch.bool)})
    assert all(x == 0 for x in none.metrics.values())
