"""linear_divergence and its loss as calls: wrong ones raise and name what was wanted, right ones compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from tests.sweeps import problem
from tests.test_divergence import grads, slow, teacher


@slow
@pytest.mark.parametrize("which", ["token", "loss"])
def test_compiles_fullgraph(which: str) -> None:
    p, t = problem(shape=(2, 3), d=8, v=40), teacher((2, 3), 40)
    weights = torch.rand(2, 3)

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        args = (hidden, rk.LMHead(weight, bias), [t.hidden, t.hidden], [t.head, t.head])
        options = {"divergence": "jsd", "beta": 0.3, "teacher_weights": (0.6, weights)}
        if which == "token":
            return (rk.linear_divergence(*args, **options) * weights).sum()
        return rk.linear_divergence_loss(*args, weights=weights, **options).loss

    want = f(*p.leaves)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(*p.leaves)
    assert torch.allclose(got, want, rtol=1e-6)
    for a, e in zip(grads(2 * got, p), grads(2 * want, p), strict=True):
        assert torch.allclose(a, e, rtol=1e-6, atol=1e-7)


ONES = [1.0] * 4
BAD: list[tuple[dict[str, Any], str]] = [  # a list stands for a tensor of it: made in the test, on the device under test
    ({"divergence": "kl"}, r"linear_divergence_loss: divergence must be a callable or one of .*got 'kl'"),
    ({"beta": 0.5}, r"divergence 'forward_kl' has no parameter, got beta=0.5"),
    ({"divergence": "jsd", "lam": 0.5}, r"divergence 'jsd' has only beta, got lam=0.5"),
    ({"divergence": "jsd", "beta": 1.5}, r"divergence 'jsd' wants beta in \[0, 1\], got 1.5"),
    ({"divergence": "skew_kl", "lam": 1.0}, r"divergence 'skew_kl' wants lam in \[0, 1\), got 1.0"),
    ({"divergence": "todi", "beta": 0.0}, r"divergence 'todi' wants beta in \(0, inf\], got 0.0"),
    ({"divergence": "taid"}, r"divergence 'taid' wants tau in \[0, 1\], got None"),
    ({"divergence": "alpha", "alpha": float("nan")}, r"divergence 'alpha' wants alpha in finite, got nan"),
    ({"divergence": lambda a, b: a.sum(1), "beta": 0.3}, r"belong to a named divergence, got a callable"),
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
    given = {"hidden": p.hidden, "head": p.head, "teacher_hidden": t.hidden, "teacher_head": t.head, **with_tensors(bad)}
    if isinstance(given["teacher_head"], Tensor):
        given["teacher_head"] = rk.LMHead(given["teacher_head"])
    with rk.set_checks(True), pytest.raises(ValueError, match=message):
        rk.linear_divergence_loss(**given)


def test_several_teachers_need_weights() -> None:
    p, t = problem(shape=(3,), d=8, v=40), teacher((3,), 40)
    with pytest.raises(ValueError, match=r"2 teachers need teacher_weights, a float or a tensor \(3,\) each, got None"):
        rk.linear_divergence(p.hidden, p.head, [t.hidden] * 2, [t.head] * 2)
    with pytest.raises(ValueError, match=r"linear_divergence_loss takes callables"):
        rk.linear_divergence(p.hidden, p.head, t.hidden, t.head, divergence=lambda a, b: a)  # type: ignore[arg-type]
