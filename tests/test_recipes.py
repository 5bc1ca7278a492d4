"""examples/recipes.py against loops and float64, and its rewards in front of ratio methods."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rlad_kernels as rk
from tests.sweeps import leaf, relative

EXAMPLE = Path(__file__).parent.parent / "examples" / "recipes.py"
pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def recipes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipes"] = module
    spec.loader.exec_module(module)
    return module


def test_it_runs(recipes: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    recipes.main()
    losses = [float(line.split("loss ")[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert losses[1] < losses[0] and losses[3] < losses[2] and losses[5] < losses[4]


def test_the_reward_of_an_explanation(recipes: ModuleType) -> None:
    b, t = 3, 7
    s, teacher = -torch.rand(b, t), -torch.rand(b, t)
    think, solution = torch.zeros(b, t, dtype=torch.bool), torch.zeros(b, t, dtype=torch.bool)
    for i, (one, two) in enumerate([(2, 5), (3, 7), (1, 6)]):
        think[i, :one], solution[i, one:two] = True, True
    got = recipes.explanation_reward(s, teacher, think, solution)
    for i in range(b):
        kl, y = (teacher - s)[i][think[i]], s[i][solution[i]]
        want = 5 * y.mean() + 0.05 * y.min() - 5 * kl.mean() - 0.05 * kl.max()
        assert torch.allclose(got[i], want, atol=1e-6)
    better = torch.where(solution, s * 0.5, s)  # the student finds the solution more easily, the explanation is as it was
    assert (recipes.explanation_reward(better, teacher, think, solution) > got).all()
    stranger = torch.where(think, teacher + 1, teacher)  # the explanation is further from what the student would say
    assert (recipes.explanation_reward(s, stranger, think, solution) < got - 5).all()


def test_the_score_of_a_structure(recipes: ModuleType) -> None:
    think, query, answer = torch.rand(3, 50, 5) > 0.4
    got = recipes.structure_score(think, query, answer)
    for i in range(50):
        total = 0.0
        for k in range(5):
            if not think[i, k]:
                break
            total += (1 if query[i, k] else 0.5) * (1 if answer[i, k] else 0.5)
        assert got[i] == total


@pytest.mark.parametrize("name", ["grpo", "dapo", "sapo", "cispo", "trrd", "kdrl", "gspo"])
def test_a_score_is_the_advantage_of_any_ratio_method(name: str, recipes: ModuleType) -> None:
    """Higher scores of a group rise, lower ones fall, whatever the scale of the score."""
    b, t, d, v = 6, 5, 8, 20
    hidden, head, target = torch.randn(b, t, d, requires_grad=True), rk.LMHead(torch.randn(v, d)), torch.randint(v, (b, t))
    old = rk.linear_logp(hidden, head, target).logp.detach()
    score = torch.tensor([3.0, 1.0, 2.0, 40.0, 40.0, 70.0])
    advantages = recipes.group_advantages(score, 3)
    assert torch.allclose(advantages, recipes.group_advantages(1000 * score - 7, 3), atol=1e-3)
    assert torch.allclose(advantages.view(2, 3).sum(1), torch.zeros(2), atol=1e-5)
    given = {"old_logp": old, "advantages": advantages, "teacher_logp": old}
    loss = rk.METHODS[name].loss
    assert isinstance(loss, rk.TokenLoss)
    out = rk.linear_loss(hidden, head, target, loss, **{k: given[k] for k in loss.needed()})
    step = hidden.detach() - 0.1 * torch.autograd.grad(out.loss, hidden)[0]
    moved = (rk.linear_logp(step, head, target).logp - old).mean(1)
    assert torch.equal(moved > 0, advantages > 0)


@pytest.mark.parametrize("step", [0, 150, 250])
def test_staged_distillation(step: int, recipes: ModuleType) -> None:
    b, t, d, v = 3, 4, 8, 15
    hidden, weight, other, teacher = torch.randn(b, t, d), torch.randn(v, d), torch.randn(b, t, 6), torch.randn(v, 6)
    target, weights = torch.randint(v, (b, t)), torch.rand(b, t) * (torch.rand(b, t) > 0.3)
    low, high = [leaf(x) for x in (hidden, weight)], [leaf(x.double()) for x in (hidden, weight)]
    loss = recipes.staged_distillation(*low, other, teacher, target, weights, step)
    z, zt, (_, temperature, soft) = high[0] @ high[1].T, other.double() @ teacher.double().T, recipes.stage_of(step)
    lq, lp = (z / temperature).log_softmax(-1), (zt / temperature).log_softmax(-1)
    kl, ce = (lp.exp() * (lp - lq)).sum(-1), -z.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    want = (weights * (soft * temperature**2 * kl + (1 - soft) * ce)).sum() / weights.sum()
    assert torch.allclose(loss.double(), want, rtol=1e-5)
    for got, exact in zip(torch.autograd.grad(loss, low), torch.autograd.grad(want, high), strict=True):
        assert relative(got, exact) <= 1e-5


def test_the_soft_gradient_keeps_its_size_as_the_temperature_rises(recipes: ModuleType) -> None:
    """Hinton, Vinyals and Dean: T²·KL tends to half the mean squared gap of the centred logits."""
    z, other, eye = torch.randn(1, 3, 9, requires_grad=True), torch.randn(1, 3, 9), torch.eye(9)
    stages = [recipes.Stage(0, 300.0, 1.0)]
    loss = recipes.staged_distillation(z, eye, other, eye, torch.zeros(1, 3).long(), torch.ones(1, 3), 0, stages)
    gap = (z - z.mean(-1, keepdim=True)) - (other - other.mean(-1, keepdim=True))
    assert torch.allclose(loss, gap.square().mean() / 2, rtol=1e-2)
