"""Which metrics a loss has depends on what it was asked, never on the data: on masks, on tokens, on how it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from tests.test_methods import FAMILIES

N, D, V, K = 6, 8, 16, 3
Given = dict[str, Any]


def own(scores: rk.TokenScores, *, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return -advantages * scores.logp, {"surprise": -scores.logp, "gap_max": advantages.abs()}


def registered(name: str, **numbers: Any) -> Callable[..., rk.LossOutput]:
    def loss(hidden: Tensor, head: rk.LMHead, target: Tensor, mask: Tensor, filter_eps: float, **tensors: Any) -> rk.LossOutput:
        inputs, ids = {**tensors, **numbers}, tensors.get("ids")
        call = rk.TOKEN_LOSSES.get(name, own)
        return rk.fused_linear_loss(hidden, head, target, call, inputs=inputs, mask=mask, topk_ids=ids, filter_eps=filter_eps)

    return loss


RATIO = ("old_logp", "advantages")
FUSED: dict[str, tuple[Callable[..., rk.LossOutput], tuple[str, ...], Given, set[str]]] = {
    "cross entropy": (rk.linear_cross_entropy_loss, ("weights",), {}, {"entropy"}),
    "rlad": (rk.rlad_loss, (*RATIO, "teacher_logp"), {"reduction": "token-mean"}, {"kl_teacher", "invalid_teacher", "entropy"}),
    "rlad top-K": (
        rk.rlad_loss, (*RATIO, "teacher_logp", "teacher", "ref_logp"), {"reduction": "token-mean", "topk_kl_coef": 0.5},
        {"kl_teacher", "kl_ref", "student_mass"},
    ),
    "grpo": (registered("grpo"), (*RATIO, "rollout_logp"), {}, {"clip_frac_low", "rollout_weight_mean", "ratio_max"}),
    "trrd": (registered("trrd", alpha=0.5), (*RATIO, "teacher_logp"), {}, {"kl_teacher"}),
    "mopd": (registered("mopd"), ("rollout_logp", "teacher_logp"), {}, {"rollout_clip_frac"}),
    "top-K": (registered("topk_kl", direction="forward", normalize="none"), ("ids", "topk_teacher"), {}, {"teacher_mass"}),
    "own": (registered("own"), ("advantages",), {}, {"surprise", "gap_max"}),
}  # fmt: skip


def run(name: str, n: int, kept: int, filter_eps: float, *, gradient: bool = True, compiled: bool = False) -> rk.LossOutput:
    loss, wanted, options, _ = FUSED[name]
    logp, lp, ids = -torch.rand(n), torch.randn(n, K).log_softmax(-1), torch.randint(V, (n, K))
    pool: Given = dict.fromkeys(("old_logp", "teacher_logp", "ref_logp", "rollout_logp"), logp) | {
        "advantages": torch.randn(n), "weights": torch.rand(n), "teacher": rk.TopK(ids, lp), "ids": ids.int(), "topk_teacher": lp,
    }  # fmt: skip
    given = {"teacher_logp" if k == "topk_teacher" else k: pool[k] for k in wanted}
    weight = torch.randn(V, D, requires_grad=gradient)
    tensors = {"target": torch.randint(V, (n,)), "mask": torch.arange(n) < kept, **given}
    call: Any = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    return call(torch.randn(n, D), rk.LMHead(weight), filter_eps=filter_eps, **tensors, **options)


@pytest.mark.parametrize("filter_eps", [0.0, 0.05])
@pytest.mark.parametrize("name", FUSED)
def test_fused_losses(name: str, filter_eps: float) -> None:
    made = {"rows_skipped", *(("dropped_mass_mean", "dropped_mass_max") if filter_eps else ())}
    keys = set(run(name, N, 4, filter_eps).metrics)
    assert keys >= FUSED[name][3] | made
    for n, kept in ((N, 0), (0, 0)):
        out = run(name, n, kept, filter_eps)
        assert set(out.metrics) == keys
        assert out.loss == 0
        assert all(x.shape == () and x == 0 and not x.requires_grad for x in out.metrics.values())
        out.loss.backward()
    for kept in (4, 0):
        assert set(run(name, N, kept, filter_eps, gradient=False).metrics) == keys - made


@pytest.mark.parametrize("name", [name for name in FUSED if name != "own"])  # a callable of one's own is not in the op
def test_compiled_fused_losses(name: str) -> None:
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
    method = rk.METHODS[name]
    family = FAMILIES[method.family]
    leaves, given = getattr(family, "INPUTS", {}).get(name, family.inputs)(method.needs)
    given |= getattr(family, "OPTIONS", {}).get(name, {})
    call = getattr(family, "call", lambda method, **xs: method(**xs))

    def keys(given: Given, nothing: bool = False) -> set[str]:
        out = call(method, **{k: v.detach().requires_grad_() if k in leaves else v for k, v in given.items()})
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
