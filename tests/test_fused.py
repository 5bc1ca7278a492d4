"""linear_loss, on RLAD and on own losses: equal to the losses on log-probs, metrics, row skipping, backward once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import rlad_kernels as rk
from tests.sweeps import Own, Problem, leaf, problem, relative, support

REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
COEF = 0.4


def rlad_inputs(shape: tuple[int, ...] = (3, 7), dtype: torch.dtype = torch.float32, k: int = 5) -> tuple[Problem, dict[str, Any]]:
    """A student a little away from its old self and from its teacher."""
    p = problem(shape=shape, d=24, v=101, k=k, dtype=dtype, temperature=0.8)
    with torch.no_grad():
        teacher = rk.linear_topk(p.hidden + 0.3 * torch.randn_like(p.hidden), p.head, k, target=p.target)
        old = rk.linear_logp(p.hidden, p.head, p.target).logp + 0.1 * torch.randn(shape)
    p.mask = torch.rand(shape) > 0.3
    advantages = torch.randn(shape[0]) if len(shape) == 2 else torch.randn(shape)
    return p, {"old_logp": old, "advantages": advantages, "teacher": teacher}


def rlad(normalize: str = "both", **options: Any) -> rk.losses.RLAD:
    return rk.losses.RLAD(topk=rk.losses.TopKKL(normalize=normalize), topk_coef=COEF, **options)


def fused(p: Problem, tensors: dict[str, Any], loss: rk.TokenLoss | None = None, **given: Any) -> rk.losses.LossOutput:
    return rk.linear_loss(p.hidden, p.head, p.target, loss or rlad(), **{"mask": p.mask, **tensors, **given})


def unfused(p: Problem, tensors: dict[str, Any], reduction: str, normalize: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    teacher, sampled = tensors["teacher"], {k: tensors[k] for k in ("old_logp", "advantages")}
    scores = rk.linear_logp(p.hidden, p.head, p.target, topk_ids=teacher.ids, tail=True, mask=p.mask)
    both = {"reduction": reduction, "mask": p.mask}
    ratio = rk.losses.TRRD()(scores.logp, teacher_logp=teacher.target_logp, **sampled, **both)
    kl = rk.losses.TopKKL(normalize=normalize)(scores._replace(logp=None, lse=None), teacher=teacher, **both)
    return ratio.loss + COEF * kl.loss, {**kl.metrics, **ratio.metrics}


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", ["both", "teacher", "none", "tail"])
def test_rlad_equals_its_parts(reduction: str, normalize: str) -> None:
    p, inputs = rlad_inputs()
    loss, metrics = unfused(p, inputs, reduction, normalize)
    want = torch.autograd.grad(loss, p.leaves)
    with rk.set_tile(4, 33):
        out = fused(p, inputs, rlad(normalize), reduction=reduction)
        grads = torch.autograd.grad(out.loss, p.leaves)
    assert abs(out.loss - loss) <= 1e-5 * loss.abs().clamp_min(1)
    for g, e in zip(grads, want, strict=True):
        assert relative(g, e) <= 1e-5
    for key, value in metrics.items():
        assert torch.allclose(out.metrics[key], value, rtol=1e-4, atol=1e-6), key
    assert (out.token_loss[~p.mask] == 0).all()
    assert set(out.metrics) - set(metrics) == {"entropy", "rows_skipped"}


def test_packed_equals_padded() -> None:
    p, inputs = rlad_inputs()
    keep = p.mask
    want = fused(p, inputs, rlad(teacher_clamp=1.0))
    seq_ids = torch.arange(3)[:, None].expand(3, 7)[keep] * 5
    packed = rk.linear_loss(
        p.hidden[keep], p.head, p.target[keep], rlad(teacher_clamp=1.0), old_logp=inputs["old_logp"][keep],
        advantages=inputs["advantages"][:, None].expand(3, 7)[keep], teacher=inputs["teacher"][keep],
        reduction=rk.Reduction(seq_ids=seq_ids),
    )  # fmt: skip
    assert torch.allclose(packed.loss, want.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_gradients(dtype: torch.dtype) -> None:
    p, inputs = rlad_inputs(shape=(64,), dtype=dtype)
    with rk.set_tile(16, 40):
        out = fused(p, inputs, reduction="token-mean")
        grads = torch.autograd.grad(out.loss, p.leaves)
    twin = p.twin(torch.float32)  # float32 itself is within 1e-5 of float64 here, far below the bound
    want = fused(twin, inputs, reduction="token-mean")
    for g, e in zip(grads, torch.autograd.grad(want.loss, twin.leaves), strict=True):
        assert g.dtype == dtype
        assert relative(g, e) <= 3e-3


@dataclass(frozen=True, kw_only=True)
class Bonus(rk.TokenLoss):
    coef: float = 0.3

    needs = ("weight", "teacher")
    reads = ("logp", "entropy", "topk_logp", "tail_logp")

    def tokens(self, scores: rk.TokenScores, *, weight: torch.Tensor, teacher: rk.TopK | None = None) -> Any:
        loss = -weight * scores.logp - self.coef * scores.entropy + scores.topk_logp.exp().sum(-1) + scores.tail_logp.exp()
        return loss, {"weight": weight, "surprise_max": -scores.logp}


def test_own_loss_with_entropy_tail_metrics_and_options() -> None:
    p = problem(shape=(4, 6), v=61)
    p.mask = torch.rand(4, 6) > 0.3
    bonus = torch.rand(4, 6)
    with rk.set_tile(5, 13):
        out = fused(p, {"weight": bonus, "teacher": support(p.ids)}, Bonus())
        grads = torch.autograd.grad(3 * out.loss, p.leaves)
    s = rk.linear_logp(p.hidden, p.head, p.target, topk_ids=p.ids, entropy=True, tail=True, mask=p.mask)
    loss, _ = Bonus().tokens(s, weight=bonus)
    want = 3 * torch.where(p.mask, loss, 0).sum() / p.mask.sum()
    assert torch.allclose(3 * out.loss, want, rtol=1e-5, atol=1e-6)
    for g, e in zip(grads, torch.autograd.grad(want, p.leaves), strict=True):
        assert relative(g, e) <= 1e-5
    assert torch.allclose(out.metrics["entropy"], s.entropy[p.mask].mean(), rtol=1e-5)
    assert torch.allclose(out.metrics["weight"], bonus[p.mask].mean(), rtol=1e-5)
    assert torch.allclose(out.metrics["surprise_max"], -s.logp[p.mask].min(), rtol=1e-5)
    assert out.metrics.keys() == {"weight", "surprise_max", "entropy", "rows_skipped"}


@pytest.mark.cpu
def test_rows_without_gradient_are_skipped_and_counted() -> None:
    p = problem(n=20)
    weight = torch.randn(20)
    weight[:5] = 0
    with rk.set_tile(6, 50):
        out = fused(p, {"w": weight}, Own(lambda s: s.logp))
    assert out.metrics["rows_skipped"] == 0.25
    grads = torch.autograd.grad(out.loss, p.leaves)
    want = torch.autograd.grad((rk.linear_logp(p.hidden, p.head, p.target).logp * weight).sum() / 20, p.leaves)
    assert (grads[0][:5] == 0).all()
    for g, e in zip(grads, want, strict=True):
        assert relative(g, e) <= 1e-6


# a row's only cotangent, and whether its slots have p = 0: then each part of what makes a row live stands alone somewhere
ALONE: dict[str, tuple[bool, Callable[[rk.TokenScores], torch.Tensor]]] = {
    "logp": (False, lambda s: s.logp),
    "lse": (True, lambda s: s.lse),
    "entropy": (True, lambda s: s.entropy),
    "topk": (False, lambda s: s.topk_logp[:, 1]),
    "tail": (False, lambda s: s.tail_logp),
    "target's logit": (False, lambda s: s.logp + s.lse),
    "another slot's logit": (False, lambda s: s.topk_logp[:, 1] + s.lse),
    "tail's logits": (False, lambda s: s.tail_logp + s.lse),
}  # fmt: skip


@pytest.mark.parametrize("path", ["linear_logp", "fused"])
@pytest.mark.parametrize("name", ALONE)
def test_a_row_is_dead_only_without_any_cotangent(name: str, path: str) -> None:
    """A token of advantage 0 with an entropy bonus keeps its gradient."""
    unlikely, output = ALONE[name]
    p = problem(n=12, v=61, k=3)
    p.ids[:] = torch.tensor([0, 1, 2])
    p.target[:] = 0
    with torch.no_grad():
        p.bias[:3] += -200 if unlikely else 14
    weight = torch.linspace(0.5, 2, 12)
    weight[::3] = 0
    if path == "fused":
        loss = Own(output, scores=("logp", "lse", "entropy", "topk_logp", "tail_logp"))
        out = fused(p, {"w": weight, "teacher": support(p.ids)}, loss, reduction=rk.Reduction(denominator=1.0))
        loss = out.loss
        assert p.hidden.is_cuda or out.metrics["rows_skipped"] == pytest.approx(1 / 3)
    else:
        loss = (weight * output(rk.linear_logp(p.hidden, p.head, p.target, topk_ids=p.ids, entropy=True, tail=True))).sum()
    grads = torch.autograd.grad(loss, p.leaves)
    want = p.twin()
    exact = torch.autograd.grad((weight.double() * output(want.expected())).sum(), want.leaves)
    for g, e in zip(grads, exact, strict=True):
        assert relative(g, e) <= 1e-5


def test_without_grad_no_gradient_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    import rlad_kernels.engine.loss as engine

    def fail(*a: object, **k: object) -> None:
        raise AssertionError("a gradient buffer was made")

    p, inputs = rlad_inputs()
    want = fused(p, inputs).loss
    monkeypatch.setattr(engine, "Gradients", fail)
    with torch.no_grad():
        out = fused(p, inputs)
    assert torch.equal(out.loss, want.detach())
    assert "rows_skipped" not in out.metrics
    with pytest.raises(AssertionError, match="gradient buffer"):
        fused(p, inputs)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    p, inputs = rlad_inputs()
    full = fused(p, inputs)
    want = dict(zip(("hidden", "weight", "bias"), torch.autograd.grad(full.loss, p.leaves), strict=True))
    getattr(p, frozen).requires_grad_(False)
    fused(p, inputs).loss.backward()
    assert getattr(p, frozen).grad is None
    for name in want.keys() - {frozen}:
        assert torch.equal(getattr(p, name).grad, want[name])


def test_backward_runs_once_and_not_twice_differentiated() -> None:
    p, inputs = rlad_inputs()
    out = fused(p, inputs, mask=None)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        out.loss.backward()
    out = fused(p, inputs, mask=None)
    (g,) = torch.autograd.grad(out.loss, p.hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


def test_all_masked_and_empty() -> None:
    p, inputs = rlad_inputs()
    out = fused(p, inputs, mask=torch.zeros(3, 7))
    assert out.loss == 0
    out.loss.backward()
    assert all((x.grad == 0).all() for x in p.leaves)
    empty = problem(n=0)
    out = fused(empty, {}, Own(lambda s: -s.logp))
    out.loss.backward()
    assert out.loss == 0
    assert (empty.weight.grad == 0).all()


@pytest.mark.parametrize("compaction", [True, False], ids=["dropped", "computed"])
def test_garbage_at_masked_positions(compaction: bool) -> None:
    p, inputs = rlad_inputs()
    want = fused(p, inputs)
    wanted = torch.autograd.grad(want.loss, p.leaves)
    off = ~p.mask
    hidden = leaf(torch.where(off[..., None], torch.nan, p.hidden.detach()))
    teacher = inputs["teacher"]
    teacher = teacher._replace(
        logp=torch.where(off[..., None], torch.nan, teacher.logp), target_logp=torch.where(off, torch.nan, teacher.target_logp),
        ids=torch.where(off[..., None], 10**6, teacher.ids),
    )  # fmt: skip
    dirty = {**inputs, "old_logp": torch.where(off, torch.nan, inputs["old_logp"]), "teacher": teacher}
    with rk.set_compaction(compaction):
        out = rk.linear_loss(hidden, p.head, torch.where(off, -100, p.target), rlad(), mask=p.mask, **dirty)
        grads = torch.autograd.grad(out.loss, (hidden, *p.leaves[1:]))
    assert torch.allclose(out.loss, want.loss, rtol=1e-6)
    for g, e in zip(grads, wanted, strict=True):
        assert relative(g, e) <= 1e-6
    for key in want.metrics.keys() - {"rows_skipped"}:
        assert torch.allclose(out.metrics[key], want.metrics[key], rtol=1e-5, atol=1e-7), key
