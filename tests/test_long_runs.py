"""What a week-long run meets: thousands of steps, interrupts and full memory amid one, threads, forks, checkpointing."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rlad_kernels as rk
from rlad_kernels.engine.tiles import Tiles

pytestmark = pytest.mark.slow_interpreted  # nothing here depends on the kernels
N, D, V = 24, 16, 300


def inputs(seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator("cpu").manual_seed(seed)
    noise = {
        k: torch.randn(*size, generator=made, device="cpu") for k, size in {"hidden": (N, D), "weight": (V, D), "a": (N,)}.items()
    }
    target = torch.randint(V, (N,), generator=made, device="cpu")
    return {k: x.to(torch.get_default_device()) for k, x in {**noise, "target": target}.items()}


def fused(x: dict[str, Tensor], hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    given = {"old_logp": torch.full((N,), -5.0), "advantages": x["a"]}
    return rk.linear_loss(hidden, rk.LMHead(weight), x["target"], rk.losses.GRPO(clip=None), **given, **options).loss


def by_log_probs(x: dict[str, Tensor], hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return -(rk.linear_logp(hidden, rk.LMHead(weight), x["target"], entropy=True, **options).logp * x["a"]).mean()


def divergence(x: dict[str, Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
    return rk.linear_divergence_loss(
        hidden, rk.LMHead(weight), hidden.detach().flip(0), rk.LMHead(weight.detach()), rk.losses.JSD(0.5)
    ).loss


def kept(x: dict[str, Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
    return by_log_probs(x, hidden, weight, keep=1 << 20)


def sparse(x: dict[str, Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
    return by_log_probs(x, hidden, weight, filter_eps=0.01)


Call = Callable[..., Tensor]
CALLS: tuple[Call, ...] = (fused, by_log_probs, divergence, kept, sparse)


def gradients(call: Call, seed: int = 0) -> list[Tensor]:
    x = inputs(seed)
    leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
    return [*torch.autograd.grad(call(x, *leaves), leaves)]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.cpu
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of resident pages")
def test_two_thousand_steps_hold_no_more_than_a_hundred() -> None:
    x = inputs()
    weight = x["weight"].requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    calls = (fused, by_log_probs, divergence, sparse)

    def steps(n: int) -> None:
        for i in range(n):
            optimizer.zero_grad()
            calls[i % len(calls)](x, x["hidden"], weight).backward()
            optimizer.step()
        gc.collect()

    steps(100)
    before, tensors = resident(), sum(isinstance(o, Tensor) for o in gc.get_objects())
    steps(2000)
    assert sum(isinstance(o, Tensor) for o in gc.get_objects()) <= tensors
    assert resident() - before <= 8 << 20  # one tensor a step kept, of 19 kB, would be 38 MB


@pytest.mark.parametrize("fault", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_step_that_is_cut_off_leaves_everything_as_it_was(
    call: Call, at: int, fault: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a forward or of a backward, which is where the product that fails is."""
    x, wanted = inputs(), gradients(call)
    leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    values, random = [leaf.detach().clone() for leaf in leaves], torch.random.get_rng_state()
    settings = vars(rk.core.config.settings).copy()
    product, done = Tiles._product, [0]

    def failing(tiles: Tiles, *args: Any, **kwargs: Any) -> Tensor:
        done[0] += 1
        if done[0] > at:
            raise fault("here")
        return product(tiles, *args, **kwargs)

    with rk.set_tile(8, 128):
        monkeypatch.setattr(Tiles, "_product", failing)
        with pytest.raises(fault, match="here"):
            call(x, *leaves).backward()
            raise fault("here")  # a call of fewer products ends without one
    monkeypatch.setattr(Tiles, "_product", product)
    assert all(torch.equal(leaf, value) for leaf, value in zip(leaves, values, strict=True))
    if done[0] > at:
        assert all((leaf.grad == 1).all() for leaf in leaves if leaf.grad is not None)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert vars(rk.core.config.settings) == settings
    assert all(torch.equal(a, b) for a, b in zip(gradients(call), wanted, strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_two_trainers_in_two_threads(call: Call) -> None:
    wanted = [gradients(call, seed) for seed in (1, 2)]
    found: dict[int, list[list[Tensor]]] = {1: [], 2: []}

    def train(seed: int) -> None:
        for _ in range(4):
            found[seed].append(gradients(call, seed))

    threads = [threading.Thread(target=train, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, want in zip((1, 2), wanted, strict=True):
        assert len(found[seed]) == 4
        assert all(torch.equal(a, b) for one in found[seed] for a, b in zip(one, want, strict=True))


def _in_a_fork(told: Any) -> None:
    torch.set_num_threads(1)  # torch's own pool of threads does not survive a fork
    told.send([x.tolist() for x in gradients(by_log_probs)])


@pytest.mark.cpu
def test_a_fork_after_use() -> None:
    wanted = gradients(by_log_probs)
    here, there = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_a_fork, args=(there,))
    child.start()
    try:
        assert here.poll(60), "the child hangs"
        assert all(torch.allclose(torch.tensor(a), b, rtol=1e-5, atol=1e-8) for a, b in zip(here.recv(), wanted, strict=True))
    finally:
        child.kill()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_activation_checkpointing(call: Call, reentrant: bool) -> None:
    """The body before the loss is computed again, or the loss itself with it."""
    x = inputs()
    body = nn.Linear(D, D)
    weight = x["weight"].requires_grad_()

    def whole(h: Tensor) -> Tensor:
        return call(x, torch.tanh(body(h)), weight)

    leaf = x["hidden"].requires_grad_()
    leaves = [leaf, weight, *body.parameters()]
    wanted = torch.autograd.grad(whole(leaf), leaves)
    for run in (
        lambda h: call(x, checkpoint(lambda y: torch.tanh(body(y)), h, use_reentrant=reentrant), weight),
        lambda h: checkpoint(whole, h, use_reentrant=reentrant),
    ):
        for p in leaves:
            p.grad = None
        run(leaf).backward()  # the reentrant kind knows no autograd.grad
        assert all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(leaves, wanted, strict=True))
