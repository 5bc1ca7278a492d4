"""Which metrics a loss has depends on what it was asked, never on the data: on masks, on tokens, on how it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import GRPO, LossOutput
from rlad_kernels.losses.cross_entropy import CrossEntropy
from rlad_kernels.losses.ratio.mopd import MOPD
from rlad_kernels.losses.ratio.trrd import TRRD
from rlad_kernels.losses.rlad import RLAD
from rlad_kernels.losses.support.topk_kl import TopKKL
from tests.methods import case

N, D, V, K = 6, 8, 16, 3
Given = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Own(rk.TokenLoss):
    needs = ("advantages",)

    def tokens(self, scores: rk.TokenScores, *, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -advantages * scores.logp, {"surprise": -scores.logp, "gap_max": advantages.abs()}


# the loss, what it is given besides what it needs, and some of its metrics
FUSED: dict[str, tuple[rk.TokenLoss, tuple[str, ...], set[str]]] = {
    "cross entropy": (CrossEntropy(), ("weights",), {"entropy"}),
    "rlad": (RLAD(), ("teacher_logp",), {"kl_teacher", "invalid_teacher", "entropy"}),
    "rlad top-K": (
        RLAD(topk=TopKKL(), topk_coef=0.5), ("teacher_logp", "ref_logp"), {"kl_teacher", "kl_ref", "teacher_mass"},
    ),
    "rlad tail": (RLAD(topk=TopKKL(normalize="tail"), topk_coef=0.5), ("teacher_logp",), {"kl_teacher", "student_mass"}),
    "grpo": (GRPO(), ("rollout_logp",), {"clip_frac_low", "rollout_weight_mean", "ratio_max"}),
    "trrd": (TRRD(alpha=0.5), (), {"kl_teacher"}),
    "mopd": (MOPD(), (), {"rollout_clip_frac"}),
    "top-K": (TopKKL("forward", normalize="none"), (), {"teacher_mass"}),
    "own": (Own(), (), {"surprise", "gap_max"}),
}  # fmt: skip


def run(name: str, n: int, kept: int, filter_eps: float, *, gradient: bool = True, compiled: bool = False) -> LossOutput:
    loss, more, _ = FUSED[name]
    logp, lp, ids = -torch.rand(n), torch.randn(n, K).log_softmax(-1), torch.randint(V, (n, K))
    pool: Given = dict.fromkeys(("old_logp", "teacher_logp", "ref_logp", "rollout_logp"), logp) | {
        "advantages": torch.randn(n), "weights": torch.rand(n), "teacher": rk.TopK(ids, lp, tail_logp=logp),
    }  # fmt: skip
    given = {k: pool[k] for k in (*loss.needed(), *more)}
    weight = torch.randn(V, D, requires_grad=gradient)
    target, mask = torch.randint(V, (n,)), torch.arange(n) < kept

    def call(hidden: Tensor, head: rk.LMHead) -> LossOutput:
        return rk.linear_loss(hidden, head, target, loss, mask=mask, reduction="token-mean", filter_eps=filter_eps, **given)

    run_it: Any = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    return run_it(torch.randn(n, D), rk.LMHead(weight))


@pytest.mark.parametrize("filter_eps", [0.0, 0.05])
@pytest.mark.parametrize("name", FUSED)
def test_fused_losses(name: str, filter_eps: float) -> None:
    made = {"rows_skipped", *(("dropped_mass_mean", "dropped_mass_max") if filter_eps else ())}
    keys = set(run(name, N, 4, filter_eps).metrics)
    assert keys >= FUSED[name][2] | made
    for n, kept in ((N, 0), (0, 0)):
        out = run(name, n, kept, filter_eps)
        assert set(out.metrics) == keys
        assert out.loss == 0
        assert all(x.shape == () and x == 0 and not x.requires_grad for x in out.metrics.values())
        out.loss.backward()
    for kept in (4, 0):
        assert set(run(name, N, kept, filter_eps, gradient=False).metrics) == keys - made


@pytest.mark.parametrize("name", FUSED)
def test_compiled_fused_losses(name: str) -> None:
    torch._dynamo.reset()
    keys = set(run(name, N, 4, 0.05).metrics)
    for kept in (4, 0):
        out = run(name, N, kept, 0.05, compiled=True)
        assert set(out.metrics) == keys
        assert kept or all(x == 0 for x in out.metrics.values())


def test_the_issues_input() -> None:
    """A fully masked batch had no metrics at all."""
    assert run("rlad", N, 0, 0.0).metrics["kl_teacher"] == 0


def test_metrics_without_compaction() -> None:
    keys = set(run("rlad top-K", N, 4, 0.0).metrics)
    with rk.set_compaction(False):
        out = run("rlad top-K", N, 0, 0.0)
    assert set(out.metrics) == keys
    assert all(x == 0 for x in out.metrics.values())


@pytest.mark.parametrize("name", rk.METHODS)
def test_methods(name: str) -> None:
    call, leaves, given = case(name)

    def keys(given: Given, nothing: bool = False) -> set[str]:
        out = call(**{k: v.detach().requires_grad_() if k in leaves else v for k, v in given.items()})
        assert not nothing or (out.loss == 0 and all(x == 0 for x in out.metrics.values()))
        out.loss.backward()
        return set(out.metrics)

    some, none = keys(given), keys({**given, "mask": torch.zeros_like(given["mask"])}, nothing=True)
    heads = {k: given[k] for k in ("weight", "bias", "teacher_weight") if k in given}
    empty = {k: v if k in heads else _first(v) for k, v in given.items()}
    assert some == none == keys(empty, nothing=True)


def _first(x: Any) -> Any:
    """No sequence of a batch."""
    if isinstance(x, Tensor):
        return x[:0] if x.dim() else x
    return type(x)(*map(_first, x)) if isinstance(x, rk.TopK) else x
