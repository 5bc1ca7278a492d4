"""linear_divergence and its loss as calls: wrong ones raise and name what was wanted, right ones compile."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import rlad_kernels as rk
from rlad_kernels.core.divergence import Divergence
from rlad_kernels.core.options import revived
from rlad_kernels.losses.vocab.kl import JSD, ForwardKL, SkewKL, SkewRKL
from rlad_kernels.losses.vocab.power import AlphaBeta, AlphaDivergence, PowerDivergence
from rlad_kernels.losses.vocab.weighed import AKL, TAID, ToDi
from tests.methods.divergence import DIVERGENCES
from tests.sweeps import problem
from tests.test_divergence import Chernoff, grads, slow, teacher


@slow
@pytest.mark.parametrize("divergence", [JSD(0.3), Chernoff(0.3)], ids=["ours", "own"])
@pytest.mark.parametrize("which", ["token", "loss"])
def test_compiles_fullgraph(which: str, divergence: Divergence) -> None:
    p, t = problem(shape=(2, 3), d=8, v=40), teacher((2, 3), 40)
    weights = torch.rand(2, 3)

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        args = (hidden, rk.LMHead(weight, bias), [t.hidden, t.hidden], [t.head, t.head])
        options = {"divergence": divergence, "teacher_weights": (0.6, weights)}
        if which == "token":
            return (rk.linear_divergence(*args, **options) * weights).sum()
        return rk.linear_divergence_loss(*args, weights=weights, **options).loss

    want = f(*p.leaves)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(*p.leaves)
    assert torch.allclose(got, want, rtol=1e-6)
    for a, e in zip(grads(2 * got, p), grads(2 * want, p), strict=True):
        assert torch.allclose(a, e, rtol=1e-6, atol=1e-7)


@slow
def test_options_made_inside_a_compiled_function() -> None:
    """Of a structure that nothing outside has made before."""
    p, t = problem(shape=(3,), d=8, v=40), teacher((3,), 40)

    def f(hidden: Tensor, alpha: float) -> Tensor:
        made = AlphaBeta(alpha, 3)  # type: ignore[arg-type]
        return rk.linear_divergence_loss(hidden, p.head, t.hidden, t.head, made).loss

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got = [compiled(p.hidden, alpha).item() for alpha in (0.2, 0.3)]
    assert got == [f(p.hidden, alpha).item() for alpha in (0.2, 0.3)]


@slow
def test_one_graph_serves_all_numbers() -> None:
    p, t = problem(shape=(3,), d=8, v=40), teacher((3,), 40)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def f(hidden: Tensor, divergence: Divergence) -> Tensor:
        return rk.linear_divergence_loss(hidden, p.head, t.hidden, t.head, divergence).loss

    found = [f(p.hidden, JSD(beta)).item() for beta in (0.2, 0.4, 0.6, 0.8)]
    assert len(set(found)) == 4
    assert counter.frame_count <= 2  # the second call finds out that the number is dynamic


@pytest.mark.parametrize("divergence", [*DIVERGENCES.values(), Chernoff(0.3)], ids=str)
def test_equal_by_value(divergence: Divergence) -> None:
    again = pickle.loads(pickle.dumps(divergence))
    assert (again, hash(again), again.key, again.numbers) == (divergence, hash(divergence), divergence.key, divergence.numbers)
    assert revived(divergence.key, list(divergence.numbers)) == divergence


ONES = [1.0] * 4
BAD: list[tuple[dict[str, Any], str]] = [  # a list stands for a tensor of it: made in the test, on the device under test
    ({"divergence": "kl"}, r"linear_divergence_loss: divergence must be a Divergence \(rk.losses.ForwardKL\(\).*got 'kl'"),
    ({"divergence": lambda a, b: a.sum(1)}, r"linear_divergence_loss: divergence must be a Divergence .*got <function"),
    ({"divergence": rk.losses.JSD}, r"linear_divergence_loss: divergence must be a Divergence .*got <class"),
    ({"divergence": rk.losses.GRPO()}, r"linear_divergence_loss: divergence must be a Divergence .*got GRPO\("),
    ({"scale": float("inf")}, r"scale must be finite, got inf"),
    ({"teacher_weights": (0.5, 0.5)}, r"teacher_weights must have one entry a teacher, 1, got 2"),
    ({"teacher_weights": (ONES,)}, r"teacher_weights has shape \(4,\), wanted \(3,\)"),
    ({"weights": ONES}, r"weights has shape \(4,\), wanted \(3,\)"),
    ({"mask": [0.5] * 3}, r"mask must hold bools, or numbers equal to 0 or 1, got 0.5"),
    ({"teacher_hidden": [[0.0] * 10] * 4}, r"\(teacher\): teacher_hidden has shape \(4, 10\), wanted \(3, 'D'\)"),
    ({"teacher_hidden": [[0.0] * 9] * 3}, r"\(teacher\): weight \(V, D\) has D=10, hidden has D=9"),
    ({"teacher_head": [[0.0] * 10] * 41}, r"student's head has 40 tokens, the teacher's 41; .*LMHead\(vocab_size="),
    ({"teacher_hidden": []}, r"teacher_hidden holds 0 teachers, teacher_head 1"),
]  # fmt: skip


def with_tensors(bad: dict[str, Any]) -> dict[str, Any]:
    def made(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(made, x))
        return torch.tensor(x) if isinstance(x, list) and x else x

    return {k: made(x) for k, x in bad.items()}


@pytest.mark.parametrize("bad, message", BAD, ids=[f"{i}-{next(iter(b))}" for i, (b, _) in enumerate(BAD)])
def test_wrong_calls_raise(bad: dict[str, Any], message: str) -> None:
    p, t = problem(shape=(3,), d=8, v=40), teacher((3,), 40)
    given = {"hidden": p.hidden, "head": p.head, "teacher_hidden": t.hidden, "teacher_head": t.head, "divergence": ForwardKL()}
    given |= with_tensors(bad)
    if isinstance(given["teacher_head"], Tensor):
        given["teacher_head"] = rk.LMHead(given["teacher_head"])
    with rk.set_checks(True), pytest.raises(ValueError, match=message):
        rk.linear_divergence_loss(**given)


def test_several_teachers_need_weights() -> None:
    p, t = problem(shape=(3,), d=8, v=40), teacher((3,), 40)
    with pytest.raises(ValueError, match=r"2 teachers need teacher_weights, a float or a tensor \(3,\) each, got None"):
        rk.linear_divergence(p.hidden, p.head, [t.hidden] * 2, [t.head] * 2, ForwardKL())


def test_a_divergence_is_an_object() -> None:
    p, t = problem(shape=(3,), d=8, v=40), teacher((3,), 40)
    with pytest.raises(ValueError, match=r"linear_divergence: divergence must be a Divergence .*got <function"):
        rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, lambda a, b: a)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="divergence"):
        rk.linear_divergence(p.hidden, p.head, t.hidden, t.head)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="beta"):
        rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, JSD(), beta=0.5)  # type: ignore[call-arg]
    with pytest.raises(NotImplementedError, match=r"Empty: kind\(\) or values\(student_logp, teacher_logp\) must be defined"):
        rk.linear_divergence_loss(p.hidden, p.head, t.hidden, t.head, Empty())


class Empty(Divergence):
    pass


WRONG: list[tuple[Callable[..., Divergence], dict[str, Any], str]] = [
    (JSD, {"beta": 1.5}, r"JSD: beta must be in \[0, 1\], got 1.5"),
    (JSD, {"beta": "half"}, r"JSD: beta must be in \[0, 1\], got 'half'"),
    (SkewKL, {"lam": 1.0}, r"SkewKL: lam must be in \[0, 1\), got 1.0"),
    (SkewRKL, {"lam": -0.1}, r"SkewRKL: lam must be in \[0, 1\), got -0.1"),
    (ToDi, {"beta": 0.0}, r"ToDi: beta must be in \(0, inf\), got 0.0"),
    (ToDi, {"beta": float("inf")}, r"ToDi: beta must be in \(0, inf\), got inf"),
    (AKL, {"mu": None}, r"AKL: mu must be in \[0, 1\], got None"),
    (TAID, {"tau": True}, r"TAID: tau must be in \[0, 1\], got True"),
    (AlphaDivergence, {"alpha": float("nan")}, r"AlphaDivergence: alpha must be a finite number, got nan"),
    (AlphaBeta, {"beta": float("inf")}, r"AlphaBeta: beta must be a finite number, got inf"),
    (PowerDivergence, {"lam": "2"}, r"PowerDivergence: lam must be a finite number, got '2'"),
]


@pytest.mark.parametrize(("made", "options", "message"), WRONG, ids=[f"{m.__name__} {o}" for m, o, _ in WRONG])
def test_wrong_options_raise(made: Callable[..., Divergence], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_options_that_do_not_exist_raise() -> None:
    for made, options in ((ForwardKL, {"beta": 0.5}), (JSD, {"lam": 0.5}), (TAID, {})):
        with pytest.raises(TypeError, match=next(iter(options), "tau")):
            made(**options)
