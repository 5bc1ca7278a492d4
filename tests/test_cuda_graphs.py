"""Without compaction a step asks the host nothing, so that a CUDA graph can hold it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from tests.conftest import DEVICE

N, D, V = 32, 16, 200
Inputs = dict[str, Tensor]


def scores(x: Inputs, head: rk.LMHead) -> Tensor:
    return rk.linear_logp(x["hidden"], head, x["target"], entropy=True, mask=x["mask"]).logp.sum()


def loss(x: Inputs, head: rk.LMHead) -> Tensor:
    given = {"old_logp": x["old"], "advantages": x["old"], "mask": x["mask"]}
    return rk.linear_loss(x["hidden"], head, x["target"], rk.losses.GRPO(), **given).loss


def distilled(x: Inputs, head: rk.LMHead) -> Tensor:
    teacher = rk.LMHead(head.weight.detach())
    return rk.linear_divergence_loss(x["hidden"], head, x["other"], teacher, rk.losses.TAID(0.4), mask=x["mask"]).loss


@pytest.mark.skipif(DEVICE != "cuda", reason="captures a CUDA graph")
@pytest.mark.parametrize("call", [scores, loss, distilled])
def test_a_captured_step_is_the_eager_one(call: Callable[[Inputs, rk.LMHead], Tensor]) -> None:
    leaves = [torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_()]
    x = {"hidden": leaves[0], "other": torch.randn(N, D), "target": torch.randint(V, (N,)), "old": torch.randn(N)}
    x["mask"] = torch.rand(N) > 0.3
    head = rk.LMHead(leaves[1])

    def step() -> list[Tensor]:
        value = call(x, head)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    with rk.set_compaction(False):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # kernels are compiled, and cuBLAS has its workspace
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        for _ in range(2):
            with torch.no_grad():
                leaves[0].add_(0.1)
                x["mask"].logical_not_()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))
