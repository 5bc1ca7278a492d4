"""Masked rows computed and zeroed (``set_compaction(False)``, CUDA graphs) give what dropping them gives, whatever they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.divergence import Divergence
from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.losses.cross_entropy import CrossEntropy
from rlad_kernels.losses.vocab.kl import JSD, ForwardKL, ReverseKL
from rlad_kernels.losses.vocab.power import AlphaBeta, Hellinger, TotalVariation
from rlad_kernels.losses.vocab.weighed import AKL, ToDi
from tests.conftest import INTERPRET
from tests.sweeps import Problem, leaf, problem, relative

N, V, K = 12, 47, 3
EPS = torch.finfo(torch.float32).eps
Call = Callable[[Problem, dict[str, Any]], dict[str, Tensor]]


def scores(p: Problem, _: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    s = rk.linear_logp(
        p.hidden, p.head, p.target, topk_ids=p.ids, entropy=True, tail=True, extras=("log_sum_sq_probs",), mask=p.mask, **options
    )
    return {**{k: v for k, v in s._asdict().items() if isinstance(v, Tensor)}, **s.extras}


def logp(p: Problem, _: dict[str, Any]) -> dict[str, Tensor]:
    frozen = rk.LMHead(p.weight.detach(), p.bias.detach(), **p.options)
    return {"logp": rk.linear_logp(p.hidden, frozen, p.target, mask=p.mask).logp}


def topk(p: Problem, _: dict[str, Any]) -> dict[str, Tensor]:
    found = rk.linear_topk(p.hidden, p.head, K, target=p.target, entropy=True, mask=p.mask)
    return {k: v for k, v in found._asdict().items() if v is not None}


@dataclass(frozen=True, kw_only=True)
class Support(rk.TokenLoss):
    """A loss that reads every score and explodes where log p is −∞."""

    needs = ("old_logp", "advantages", "teacher")
    reads = ("logp", "entropy", "topk_logp", "tail_logp")

    def tokens(self, scores: rk.TokenScores, *, old_logp: Tensor, advantages: Tensor, teacher: rk.TopK) -> tuple[Tensor, Metrics]:
        s, ratio = scores, (scores.logp - old_logp).exp()
        on_support = (s.topk_logp.exp() * (1 + 0.1 * teacher.logp)).sum(-1)
        return -ratio * advantages + (old_logp - s.logp).exp() - 0.1 * s.entropy + on_support - 0.1 * s.tail_logp, {}


def fused(p: Problem, more: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    given = {"old_logp": more["old"], "advantages": more["advantages"], "teacher": rk.TopK(p.ids, more["teacher_logp"])}
    out = rk.linear_loss(p.hidden, p.head, p.target, Support(), mask=p.mask, **given, **options)
    return {"loss": out.loss, "token_loss": out.token_loss, **{k: v for k, v in out.metrics.items() if k != "rows_skipped"}}


def divergence(p: Problem, more: dict[str, Any], frozen: bool = False) -> dict[str, Tensor]:
    head = rk.LMHead(p.weight.detach(), p.bias.detach(), **p.options) if frozen else p.head
    return {"value": rk.linear_divergence(p.hidden, head, *more["teacher"], more["divergence"], mask=p.mask)}


def divergence_loss(p: Problem, more: dict[str, Any]) -> dict[str, Tensor]:
    out = rk.linear_divergence_loss(p.hidden, p.head, *more["teacher"], more["divergence"], mask=p.mask, weights=more["weights"])
    return {"loss": out.loss, "token_loss": out.token_loss, **out.metrics}


CALLS: dict[str, Call] = {
    "linear_logp": scores,
    "frozen": logp,
    "filter_eps": lambda p, more: scores(p, more, filter_eps=1e-30),
    "linear_topk": topk,
    "linear_gather": lambda p, _: {"z": rk.linear_gather(p.hidden, p.head, p.ids, mask=p.mask)},
    "fused": fused,
    "fused filter_eps": lambda p, more: fused(p, more, filter_eps=1e-30),
    "cross_entropy": lambda p, _: {"loss": rk.linear_loss(p.hidden, p.head, p.target, CrossEntropy(), mask=p.mask).loss},
    "divergence": divergence,
    "divergence_loss": divergence_loss,
    "divergence frozen": lambda p, more: divergence(p, more, frozen=True),
}


# divergence, and whose columns 0 and 5 are outside the vocabulary by a bias of −∞
SIDES = [
    *((kind, "student teacher") for kind in (ForwardKL(), ReverseKL(), JSD(), AlphaBeta(), ToDi(), AKL())),
    *((kind, side) for kind in (JSD(), Hellinger(), TotalVariation()) for side in ("student", "teacher")),
    (ReverseKL(), "student"),
    (ForwardKL(), "teacher"),
]


def case(garbage: float | None, divergence: Divergence, side: str) -> tuple[Problem, dict[str, Any]]:
    """``garbage`` stands in every masked row of every input."""
    torch.manual_seed(3)
    p = problem(n=N, v=V, k=K, temperature=torch.rand(N) + 0.5)
    teacher = rk.LMHead(torch.randn(V, 16), torch.randn(V), temperature=torch.rand(N) + 0.5)
    p.target, p.ids = p.target.clamp_min(6), p.ids.clamp_min(6)
    with torch.no_grad():
        for name, head in (("student", p), ("teacher", teacher)):
            head.bias[[0, 5]] = -torch.inf if name in side else 0.0
    p.mask = torch.rand(N) > 0.4
    rows = {"states": torch.randn(N, 16), "old": torch.randn(N) - 3, "advantages": torch.randn(N), "weights": torch.rand(N)}
    rows["teacher_logp"] = torch.randn(N, K)
    if garbage is not None:
        off = ~p.mask
        p.hidden = leaf(torch.where(off[:, None], garbage, p.hidden.detach()))
        rows = {k: torch.where(off.view(-1, *[1] * (x.dim() - 1)), garbage, x) for k, x in rows.items()}
        p.options["temperature"] = torch.where(off, garbage, p.options["temperature"])
        object.__setattr__(teacher, "temperature", torch.where(off, garbage, teacher.temperature))
        p.ids, p.target = torch.where(off[:, None], 10**6, p.ids), torch.where(off, 10**6, p.target)
    return p, {**rows, "teacher": (rows["states"], teacher), "divergence": divergence}


def run(call: Call, p: Problem, more: dict[str, Any]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    found = call(p, more)
    part = {k: v for k, v in found.items() if v.requires_grad}
    if not part:
        return found, []
    # upstream gradients at masked rows are the caller's to get right: their outputs are constants
    pull = [torch.linspace(-1, 1, v.numel()).view(v.shape).add(0.01) if v.dim() else torch.ones(()) for v in part.values()]
    return found, list(torch.autograd.grad(list(part.values()), p.leaves, pull, allow_unused=True))


def compare(name: str, garbage: float | None, divergence: Divergence, side: str) -> None:
    want, exact = run(CALLS[name], *case(None, divergence, side))
    assert all(g is None or g.isfinite().all() for g in exact)
    with rk.set_compaction(False):
        found, grads = run(CALLS[name], *case(garbage, divergence, side))
    for key, value in want.items():
        # a product of other rows may round otherwise: a few ulps of a logit, and of 1 where a mass is 1 − Σ
        torch.testing.assert_close(found[key], value, rtol=32 * EPS, atol=8 * EPS, msg=lambda m, key=key: f"{key}: {m}")
    for g, e in zip(grads, exact, strict=True):
        assert g is None if e is None else relative(g, e) <= 2e-6


GARBAGE = [torch.nan] if INTERPRET else [None, torch.nan, torch.inf, -torch.inf]
any_garbage = pytest.mark.parametrize("garbage", GARBAGE, ids=str)


@any_garbage
@pytest.mark.parametrize("name", CALLS)
def test_compaction_off_gives_what_on_gives(name: str, garbage: float | None) -> None:
    compare(name, garbage, JSD(), "student teacher")


@any_garbage
@pytest.mark.parametrize(("kind", "side"), SIDES, ids=str)
def test_every_divergence(kind: Divergence, side: str, garbage: float | None) -> None:
    compare("divergence_loss", garbage, kind, side)
    compare("divergence", garbage, kind, side)


@pytest.mark.parametrize("name", ["kdrl_wrong", "hdpo"])
def test_tensors_of_bools_stay_bools(name: str) -> None:
    """Rows that are zeroed in place of dropped: a bool with 0 beside it would become an integer."""
    hidden, weight, s = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randn(2, 3)
    pool = {"old_logp": s, "teacher_logp": s - 1, "advantages": s, "correct": torch.tensor([True, False])}
    given = {k: pool.get(k, torch.tensor([0, 1])) for k in rk.METHODS[name].needs}
    losses = []
    for compaction in (True, False):
        with rk.set_compaction(compaction):
            leaf = hidden.clone().requires_grad_()
            target = torch.zeros(2, 3, dtype=torch.int64)
            losses.append(rk.linear_loss(leaf, rk.LMHead(weight), target, rk.METHODS[name].loss, **given).loss.detach())
    torch.testing.assert_close(*losses)
