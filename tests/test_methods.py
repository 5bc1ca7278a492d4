"""Every registered method against its oracle: the loss and each gradient. A method without an oracle fails."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.reduction import REDUCTIONS
from rlad_kernels.losses.methods import METHODS
from tests.methods import FAMILIES, case
from tests.oracles import hold

SMALL = 2e-5  # a budget above this share of the largest element would let a wrong number pass


def test_every_method_has_an_oracle():
    assert set(METHODS) == {name for family in FAMILIES.values() for name in family.ORACLES}
    assert all(METHODS[name].family == family for family, module in FAMILIES.items() for name in module.ORACLES)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_its_source_sets(name: str):
    published = METHODS[name].published
    assert published and "\n" not in published and "|" not in published  # a cell of a table


@pytest.mark.parametrize("kind", sorted({type(m.loss) for m in METHODS.values()}, key=lambda kind: kind.__name__))
def test_a_loss_is_a_value_whose_parts_have_names(kind: type):
    """Options and tensors by name, equal options equal losses, none changed once it is checked."""
    made = vars(kind)["__dataclass_params__"]
    assert made.frozen and made.eq
    if issubclass(kind, rk.TokenLoss):
        assert {f.name for f in fields(kind) if not f.kw_only} <= {"direction"}  # TopKKL("reverse")
        _, scores, *tensors = inspect.signature(kind.tokens).parameters.values()
        assert scores.name == "scores" and all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in tensors)


@pytest.mark.parametrize("name", METHODS)
def test_value_and_gradients(name):
    call, leaves, given = case(name)
    oracle = FAMILIES[METHODS[name].family].ORACLES[name]
    tensors = {k: given[k].detach().requires_grad_() for k in leaves}
    out = call(**{**given, **tensors})
    out.loss.backward()
    assert torch.equal(out.token_loss, torch.where(given["mask"], out.token_loss, 0))

    def value(*xs: Tensor) -> Tensor:
        return oracle(**{k: _as(v, xs[0].dtype) for k, v in given.items()} | dict(zip(leaves, xs, strict=True)))

    signed = out.loss.item() / out.token_loss.sum().item()  # the reduction's weight; terms of either sign cancel, their errors not
    scale = abs(signed) * out.token_loss.abs().sum().item()
    assert hold(out.loss.detach(), value, *tensors.values(), scale=scale) <= SMALL * scale
    for i, x in enumerate(tensors.values()):

        def slope(*xs: Tensor, i: int = i) -> Tensor:
            xs = tuple(x.detach().requires_grad_() for x in xs)
            return torch.autograd.grad(value(*xs), xs[i])[0]

        assert x.grad is not None
        assert x.grad.abs().max() > 0
        assert hold(x.grad, slope, *(y.detach() for y in tensors.values())) <= SMALL * x.grad.abs().max()


def _as(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def test_trrd_at_alpha_1_is_grpo():
    _, _, given = case("trrd")
    rest = {k: given[k] for k in ("old_logp", "advantages", "mask")}
    assert (~given["mask"]).any() and len(set(given["mask"].sum(1).tolist())) > 2  # on sequences of several lengths
    loss = METHODS["trrd"].loss
    assert isinstance(loss, rk.TokenLoss)
    trrd = replace(loss, alpha=1.0)(given["logp"], teacher_logp=given["teacher_logp"], **rest)
    assert torch.equal(trrd.loss, METHODS["grpo"](given["logp"], **rest).loss)
    assert not torch.allclose(trrd.loss, METHODS["bnpo"](given["logp"], **rest).loss)


@pytest.mark.parametrize(
    ("name", "kind"), [("grpo", "seq-mean-token-mean"), ("icepop", "seq-mean-token-mean"), ("tis", "token-mean")]
)
def test_a_ragged_mask_tells_the_reductions_apart(name: str, kind: str):
    call, _, given = case(name)
    own, losses = call(**given).loss, {k: call(**given, reduction=k).loss for k in REDUCTIONS}
    assert {k for k, x in losses.items() if torch.equal(x, own)} == {kind}


@pytest.mark.parametrize("name", ["opd_clipped", "exopd"])
def test_a_token_far_above_the_old_policy_pays_three_advantages(name: str):
    """r = e² and Â < 0: the dual clip of 3, and no gradient."""
    s = torch.tensor([-1.0], requires_grad=True)
    given = {k: torch.tensor([-4.0]) for k in ("teacher_logp", "base_logp") if k in METHODS[name].needs}
    out = METHODS[name](s, old_logp=torch.tensor([-3.0]), **given)
    torch.testing.assert_close(out.loss, torch.tensor(3.0))
    assert torch.autograd.grad(out.loss, s)[0] == 0


def test_verls_top_k_advantage_has_its_dual_clip():
    scores = rk.TokenScores(logp=torch.tensor([-1.0], requires_grad=True), topk_logp=torch.tensor([[-2.0]]))
    teacher = rk.TopK(torch.tensor([[0]]), torch.tensor([[0.0]]))
    out = METHODS["verl_topk_pg"](scores, old_logp=torch.tensor([-3.0]), teacher=teacher)
    torch.testing.assert_close(out.loss, torch.tensor(3 * 2.0))
    assert torch.autograd.grad(out.loss, scores.logp)[0] == 0
