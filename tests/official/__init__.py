"""Other packages' loss functions as the truth that our methods are held to: a line a method in trl.py, openrlhf.py and verl.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.divergence import Divergence
from rlad_kernels.losses import LossOutput
from rlad_kernels.losses.methods import METHODS
from tests.oracles import budget, gradient, within

Given = dict[str, Tensor]
B, T, V, K = 5, 7, 23, 4
LENGTHS = [7, 3, 5, 1, 6]
SEEDS = range(3)
SMALL = 2e-5  # a budget above this share of the largest element would let a wrong number pass
NO_CLIP = 1e9


@dataclass(frozen=True)
class Case:
    """Ours and theirs on the same batch, the gradient by ``leaf``. ``theirs`` is run in float64: it is the formula of a budget."""

    ours: Callable[[Given], LossOutput]
    theirs: Callable[[Given], Tensor]
    leaf: str = "logp"
    per_sequence: bool = False  # one advantage a sequence
    guard: float = 0.0  # what they add to a divisor
    selects: bool = False  # the roundings of a budget would change which tokens they choose: float64 alone has a budget


def batch(seed: int, per_sequence: bool = False) -> Given:
    """Ragged sequences with noise at the masked tokens: 5 of up to 7 tokens, a vocabulary of 23."""
    made = torch.Generator("cpu").manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=made, device="cpu")

    logp, z, t = -3 * noise(B, T).abs() - 0.01, 2 * noise(B, T, V), 2 * noise(B, T, V)
    advantages = noise(B, 1).expand(B, T).contiguous() if per_sequence else noise(B, T)
    spread = {"old": 1.0, "ref": 1.0, "teacher": 2.0, "base": 1.0, "rollout": 1.0}  # far enough for every clip to bind
    near = {f"{who}_logp": (logp + far * noise(B, T)).clamp(max=-0.01) for who, far in spread.items()}
    ids = t.topk(K).indices
    mask = torch.arange(T, device="cpu") < torch.tensor(LENGTHS, device="cpu").unsqueeze(1)
    return {**near, "logp": logp, "advantages": advantages, "mask": mask, "logits": z, "teacher_logits": t, "ids": ids}


def ours(
    name: str, reduction: str | None = None, denominator: float | None = None, **options: Any
) -> Callable[[Given], LossOutput]:
    """A method on sampled tokens, with other options where a package sets others."""

    def call(x: Given) -> LossOutput:
        loss = replace(METHODS[name].loss, **options)
        assert isinstance(loss, rk.TokenLoss)
        tensors: dict[str, Any] = {k: x[k] for k in loss.needed()}
        return loss(x["logp"], mask=x["mask"], reduction=rk.Reduction(reduction, denominator=denominator), **tensors)

    return call


def ours_topk(name: str, **options: Any) -> Callable[[Given], LossOutput]:
    """A method on the teacher's top-K, from logits, with the log-masses outside it."""

    def call(x: Given) -> LossOutput:
        loss = replace(METHODS[name].loss, **options)
        assert isinstance(loss, rk.TokenLoss)
        lq, lp = (x[k].log_softmax(-1) for k in ("logits", "teacher_logits"))
        topk, outside = lp.gather(-1, x["ids"]), torch.ones_like(lp).scatter(-1, x["ids"], 0.0) > 0
        tails = [torch.where(outside, y, -torch.inf).logsumexp(-1) for y in (lq, lp)]
        scores = rk.TokenScores(logp=x["logp"], topk_logp=lq.gather(-1, x["ids"]), tail_logp=tails[0])
        tensors: dict[str, Any] = {k: x[k] for k in loss.needed() if k != "teacher"}
        return loss(scores, teacher=rk.TopK(x["ids"].int(), topk, tail_logp=tails[1]), mask=x["mask"], **tensors)

    return call


def ours_divergence(name: str, **options: Any) -> Callable[[Given], LossOutput]:
    """A divergence over the vocabulary, from logits: the hidden states of a head that is the identity."""

    def call(x: Given) -> LossOutput:
        loss = replace(METHODS[name].loss, **options)
        assert isinstance(loss, Divergence)
        head = rk.LMHead(torch.eye(V, dtype=x["logits"].dtype))
        return rk.linear_divergence_loss(x["logits"], head, x["teacher_logits"], head, loss, mask=x["mask"])

    return call


def compare(case: Case, seed: int, dtype: torch.dtype) -> bool:
    """Hold value and gradient to what rounding can do to their function, and say whether there is a gradient."""
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch(seed, case.per_sequence).items()}
    exact = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}

    def theirs(x: Tensor) -> Tensor:
        return case.theirs({**exact, case.leaf: x})

    leaf = given[case.leaf].clone().requires_grad_()
    out = case.ours({**given, case.leaf: leaf})
    (grad,) = torch.autograd.grad(out.loss, leaf)
    scale = max(out.token_loss.abs().max().item(), out.loss.abs().item())
    eps = torch.finfo(dtype).eps * (2 if dtype == torch.float64 else 1)  # in float64 theirs has roundings of its own
    for got, formula, size in ((out.loss, theirs, scale), (grad, gradient(theirs), grad.abs().max().item())):
        want, bound = budget(formula, exact[case.leaf], scale=size, eps=eps)
        within(got, want, bound + case.guard * size)
        assert bound + case.guard * size <= SMALL * size
    return bool(grad.any())


def runs(cases: dict[str, Case]) -> list[tuple[str, torch.dtype]]:
    """The cases, whose name begins with a method's, in each dtype."""
    assert not (unknown := [name for name in cases if name.split(",")[0].split(" ")[0] not in METHODS]), unknown
    return [(n, dtype) for n in cases for dtype in (torch.float32, torch.float64) if dtype.itemsize == 8 or not cases[n].selects]
