"""What the ranks of tests/test_data_parallel.py do: each has some of a batch's sequences, and one has none of its tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rlad_kernels as rk

ROWS, T, V, D = 6, 7, 31, 8
KINDS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


class Student(nn.Module):
    """Hidden states, and a loss inside the forward: there FSDP's head is whole."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.lm_head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, x: dict[str, Tensor], loss: rk.TokenLoss, reduction: rk.Reduction, sweep: bool) -> Any:
        hidden, head = torch.tanh(self.body(self.embed(x["tokens"]))), rk.LMHead(self.lm_head.weight)
        given = {k: x[k] for k in ("old_logp", "advantages", "mask")}
        if sweep:
            return rk.linear_loss(hidden, head, x["target"], loss, reduction=reduction, **given)
        scores = rk.linear_logp(hidden, head, x["target"], mask=x["mask"])
        return loss(scores.logp, reduction=reduction, **given)


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    lengths = torch.tensor([0, 0, 7, 2, 5, 1])  # the first rank keeps nothing
    return {
        "tokens": torch.randint(V, (ROWS, T)), "target": torch.randint(V, (ROWS, T)), "old_logp": -3 - 0.3 * torch.rand(ROWS, T),
        "advantages": torch.randn(ROWS), "mask": torch.arange(T) < lengths[:, None],
    }  # fmt: skip


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def work(rank: int, world: int) -> None:
    mesh, x = init_device_mesh("cpu", (world,)), batch()
    here = {k: v.chunk(world)[rank] for k, v in x.items()}
    for kind in KINDS:
        for tied in (False, True):
            for sweep in (True, False):
                alone = Student(tied=tied)
                out = alone(x, rk.losses.GRPO(), rk.Reduction(kind), sweep)
                out.loss.backward()
                for engine in ("ddp", "fsdp", "fsdp of the head alone"):
                    if tied and engine == "fsdp of the head alone":
                        continue  # FSDP's own rule: parameters that are shared belong together
                    model: Any = Student(tied=tied)
                    if engine == "ddp":
                        model = DistributedDataParallel(model)
                    elif engine == "fsdp":
                        model = fully_shard(model, mesh=mesh)
                    else:
                        fully_shard(model.lm_head, mesh=mesh)
                        model = fully_shard(model, mesh=mesh)
                        model.lm_head.unshard()  # its own forward is never called
                    found = model(here, rk.losses.GRPO(), rk.Reduction(kind, group=dist.group.WORLD), sweep)
                    found.loss.backward()
                    assert set(found.metrics) == set(out.metrics)
                    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
                        assert p.grad is not None and q.grad is not None, (engine, name)
                        far = (whole(p.grad) - q.grad).abs().max()
                        assert far <= 2e-6 * q.grad.abs().max(), (kind, tied, sweep, engine, name, far)
