"""One training step under an engine of docs/scale.md, held to one process: ``torchrun -m tests.engine_recipes ddp``."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import rlad_kernels as rk
from tests.data_parallel import Student, batch


class Engine:
    """A wrapped model, how a loss goes backward and a step is made, and the model's parameters afterwards, whole."""

    def __init__(self, model: Any, backward: Callable[[Tensor], Any], step: Callable[[], Any]) -> None:
        self.model, self.backward, self.step = model, backward, step

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def ddp(model: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    dist.init_process_group("gloo")
    return Engine(nn.parallel.DistributedDataParallel(model), torch.autograd.backward, optimizer.step)


def accelerate(model: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    return Engine(model, accelerator.backward, optimizer.step)


class Gathered(nn.Module):
    """A model whose forward has the head whole, which ZeRO-3 keeps in parts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, *args: Any) -> Any:
        import deepspeed

        with deepspeed.zero.GatheredParameters([self.inner.lm_head.weight]):
            return self.inner(*args)


def zero(stage: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    import deepspeed

    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_scatter": False},  # gloo has none
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    wrapped, *_ = deepspeed.initialize(model=Gathered(model) if stage == 3 else model, optimizer=optimizer, config=config)

    class Whole(Engine):
        def parameters(self) -> list[Tensor]:
            found = [*self.model.parameters()]
            with deepspeed.zero.GatheredParameters(found, enabled=stage == 3):
                return [p.detach().clone() for p in found]

    return Whole(wrapped, wrapped.backward, wrapped.step)


ENGINES: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Engine]] = {
    "ddp": ddp,
    "accelerate": accelerate,
    "zero2": lambda model, optimizer: zero(2, model, optimizer),
    "zero3": lambda model, optimizer: zero(3, model, optimizer),
}


def main(name: str) -> None:
    alone, model = Student(tied=False), Student(tied=False)
    engine = ENGINES[name](model, torch.optim.SGD(model.parameters(), lr=1.0))
    x = batch()
    here = {k: v.chunk(dist.get_world_size())[dist.get_rank()] for k, v in x.items()}
    out = engine.model(here, rk.losses.GRPO(), rk.Reduction("token-mean", group=dist.group.WORLD), True)
    engine.backward(out.loss)
    engine.step()
    alone(x, rk.losses.GRPO(), rk.Reduction("token-mean"), True).loss.backward()
    for p, q in zip(engine.parameters(), alone.parameters(), strict=True):
        assert q.grad is not None
        far = ((q.detach() - p) - q.grad).abs().max()
        assert far <= 2e-6 * q.grad.abs().max() + 2.0**-23 * q.abs().max(), far  # the step's own rounding
    sys.stdout.write(f"{name} equals one process\n")


if __name__ == "__main__":
    main(sys.argv[1])
    gc.collect()  # DDP's reducer first: as gloo's last holder it joins gloo's threads under the GIL, which their work may wait for
    dist.destroy_process_group()
