"""Every method on log-probs and inside the sweep: one value, metrics and gradients alike, eager and compiled, at its products."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.engine.tiles import Tiles

B, T, D, V, K = 3, 6, 16, 40, 7  # B·T and B·(T + 4) lie between two powers of 2: sums over sequences unroll to log₂ N steps
LOSSES = {k: m.loss for k, m in rk.METHODS.items() if isinstance(m.loss, rk.TokenLoss)}
LOSSES["rlad"] = rk.losses.RLAD(topk=rk.losses.TopKKL(normalize="tail"), topk_coef=0.5, teacher_clamp=2.0)
LOSSES["opd_discounted"] = rk.losses.OPD(gamma=0.9)
SWEEP_ONLY = {"rows_skipped"}
EPS = {torch.float64: 2e-13, torch.float32: 2e-6}  # far above rounding in float64: what differs there differs for another reason
any_dtype = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.cpu)], ids=str)


class World:
    """Hidden states, a head, and a tensor for every name that a method may want."""

    def __init__(self, tokens: int = T, dtype: torch.dtype = torch.float32) -> None:
        self.hidden = torch.randn(B, tokens, D).to(dtype).requires_grad_()
        self.weight = (torch.randn(V, D) * 0.4).to(dtype).requires_grad_()
        self.target = torch.randint(V, (B, tokens))
        self.mask = torch.rand(B, tokens) > 0.3
        teacher_head = rk.LMHead((torch.randn(V, D) * 0.4).to(dtype))
        teacher = rk.linear_topk(torch.randn(B, tokens, D).to(dtype), teacher_head, K, target=self.target, entropy=True)
        here = rk.linear_logp(self.hidden.detach(), self.head, self.target, topk_ids=teacher.ids)
        noise = torch.randn(4, B, tokens) * 0.3
        self.tensors: dict[str, Any] = {
            "old_logp": here.logp + noise[0], "ref_logp": here.logp + noise[1], "rollout_logp": here.logp + noise[2],
            "base_logp": here.logp + noise[3], "teacher_logp": teacher.target_logp, "advantages": torch.tensor([1.0, -0.5, 0.3]),
            "correct": torch.tensor([True, False, False]), "group_ids": torch.tensor([0, 1, 1]), "teacher": teacher,
            "old_topk_logp": here.topk_logp + 0.1, "weights": torch.rand(B, tokens),
            "spans": torch.arange(tokens).expand(B, tokens) // 4,
        }  # fmt: skip

    @property
    def head(self) -> rk.LMHead:
        return rk.LMHead(self.weight)

    def given(self, loss: rk.TokenLoss) -> dict[str, Any]:
        return {k: self.tensors[k] for k in (*loss.needed(), *loss.takes) if k in self.tensors}

    def call(self, road: Callable[..., rk.losses.LossOutput], loss: rk.TokenLoss) -> tuple[rk.losses.LossOutput, list[Tensor]]:
        out = road(loss, self.hidden, self.weight, self.target, self.mask, self.given(loss))
        return out, list(torch.autograd.grad(out.loss, (self.hidden, self.weight)))


def on_log_probs(loss: rk.TokenLoss, hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor, given: dict[str, Any]) -> Any:
    ids = given["teacher"].ids if "topk_logp" in loss.read() else None
    head = rk.LMHead(weight)
    mean = "mean_logits" in loss.read()
    scores = rk.linear_logp(hidden, head, target, topk_ids=ids, entropy=True, tail=ids is not None, mean_logits=mean, mask=mask)
    more = {"target": target} if "target" in loss.needs else {}
    return loss(scores, mask=mask, reduction=rk.Reduction(denominator=7.0), **given, **more)


def in_the_sweep(loss: rk.TokenLoss, hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor, given: dict[str, Any]) -> Any:
    return rk.linear_loss(
        hidden, rk.LMHead(weight), target, loss, mask=mask, reduction=rk.Reduction(denominator=7.0), **given
    )  # fmt: skip


def same(got: Any, want: Any, loss: rk.TokenLoss, eps: float | None = None) -> None:
    (out, grads), (exact, exact_grads) = got, want
    eps = eps or EPS[exact.loss.dtype]
    assert torch.allclose(out.loss, exact.loss, rtol=eps, atol=eps)
    assert torch.allclose(out.token_loss, exact.token_loss, rtol=5 * eps, atol=eps)
    absent = {"entropy"} if loss.products == 0 else set()  # K rows of the head do not tell it
    assert set(out.metrics) - SWEEP_ONLY - absent == set(exact.metrics) - SWEEP_ONLY - absent
    for k in set(out.metrics) & set(exact.metrics):
        assert torch.allclose(out.metrics[k], exact.metrics[k], rtol=5 * eps, atol=eps), k
    for g, e in zip(grads, exact_grads, strict=True):
        assert (g - e).abs().max() <= eps * e.abs().max()


@any_dtype
@pytest.mark.parametrize("name", LOSSES)
def test_both_roads_agree(name: str, dtype: torch.dtype) -> None:
    world, loss = World(dtype=dtype), LOSSES[name]
    same(world.call(in_the_sweep, loss), world.call(on_log_probs, loss), loss)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("name", LOSSES)
def test_both_roads_compile_for_any_number_of_tokens(name: str) -> None:
    loss, graphs = LOSSES[name], []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    for road in (on_log_probs, in_the_sweep):
        torch._dynamo.reset()
        graphs.clear()
        call = torch.compile(road, fullgraph=True, dynamic=True, backend=backend)
        for tokens in (T, T + 4):
            world = World(tokens)
            got, want = world.call(call, loss), world.call(road, loss)
            same(got, want, loss)
            assert set(got[0].metrics) == set(want[0].metrics)
        assert len(graphs) == 1


@pytest.mark.slow_interpreted  # the same on every backend
@pytest.mark.parametrize("name", LOSSES)
def test_products_are_what_the_loss_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile's logits are one product, its share of d_hidden or d_weight another: all columns of all rows together make one."""
    world, loss = World(), LOSSES[name]
    world.mask, done = torch.ones(B, T, dtype=torch.bool), [0.0]
    logits, add = Tiles.logits, Tiles.add_product

    def counted_logits(tiles: Tiles, r0: int, r1: int, w: Tensor, *args: Any) -> Tensor:
        done[0] += (r1 - r0) * len(w) / (B * T * V)
        return logits(tiles, r0, r1, w, *args)

    def counted_add(tiles: Tiles, into: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> None:
        done[0] += a.shape[0] * a.shape[1] * b.shape[1] / (B * T * V * D)
        add(tiles, into, a, b, *args, **kwargs)

    monkeypatch.setattr(Tiles, "logits", counted_logits)
    monkeypatch.setattr(Tiles, "add_product", counted_add)
    _, (d_hidden, _) = world.call(in_the_sweep, loss)
    live = d_hidden.ne(0).any(-1).double().mean().item()  # rows that a clip leaves without gradient stay out of the backward
    forward = min(loss.products, 1)
    assert done[0] == pytest.approx(forward + (loss.products - forward) * live)


def test_most_methods_are_three_products() -> None:
    products = {name: loss.products for name, loss in LOSSES.items()}
    reading = {"gspo", "gspo_token", "luspo", "vespo", "gmpo", "clip_cov", "kl_cov", "dac_kl_span"}
    assert {k for k, n in products.items() if n == 4} == reading
    assert {k for k, n in products.items() if n == 0} == {"lsm", "lsm_sampled", "nemo_rl_mixed", "ms_swift_topk"}


@pytest.mark.parametrize("name", LOSSES)
def test_methods_pickle(name: str) -> None:
    method = rk.METHODS.get(name)
    assert pickle.loads(pickle.dumps(LOSSES[name])) == LOSSES[name]
    assert method is None or pickle.loads(pickle.dumps(method)) == method
