"""What the ranks of tests/test_context_parallel.py do: each has a slice of every sequence, and one keeps no token of its slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import rlad_kernels as rk
from tests.data_parallel import KINDS, Student, T, batch

BOUND = 2e-6  # of the largest entry of a gradient: the order of float32's sums


def sliced(x: dict[str, Tensor], c: slice) -> dict[str, Tensor]:
    return {k: v[:, c] if v.dim() > 1 else v for k, v in x.items()}


def compare(model: Any, alone: Student, what: Any) -> None:
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad - q.grad).abs().max() <= BOUND * q.grad.abs().max(), what


def slices(group: Any) -> slice:
    """Of T = 7 columns, uneven."""
    cuts = {1: (0, 7), 2: (0, 4, 7), 3: (0, 3, 4, 7)}[group.size()]
    return slice(*cuts[group.rank() : group.rank() + 2])


def next_tokens_case(group: Any) -> None:
    tokens = torch.randint(50, (3, T))
    cuts = (0, 3, 3, T) if group.size() == 3 else (0, 3, T)  # of three one has no column
    here = slice(*cuts[group.rank() : group.rank() + 2])
    for x, fill in ((tokens, -100), (tokens[0], -1), (tokens > 20, 0), (tokens / 7, 0.5)):
        want = torch.cat([x[..., 1:], x.new_full((*x.shape[:-1], 1), fill)], -1)
        assert torch.equal(rk.context.next_tokens(x[..., here], group, fill), want[..., here])
    wrong = (((tokens[0, 0], group), "must be"), ((tokens, "cp"), "group must be"), ((tokens, group, "x"), "fill"))
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            rk.context.next_tokens(*bad)  # type: ignore[arg-type]
        if message != "fill":
            with pytest.raises(ValueError, match=message):
                rk.context.gather(*bad)  # type: ignore[arg-type]


def reductions_case(data: Any, context: Any, world: int) -> None:
    """The average over all ranks of a loss inside the sweep, and on log-probs, is one process's; without a group their sum is."""
    x = batch()
    x["mask"][:, slice(0, 3)] = False  # of three slices the first keeps nothing
    rows = {k: v.chunk(data.size())[data.rank()] for k, v in x.items()}
    here = sliced(rows, slices(context))
    for kind in KINDS:
        for sweep in (True, False):
            alone = Student(tied=False)
            want = alone(x, rk.losses.GRPO(), rk.Reduction(kind), sweep)
            want.loss.backward()
            for group in (dist.group.WORLD, None) if data.size() == 1 else (dist.group.WORLD,):
                model = DistributedDataParallel(Student(tied=False))
                out = model(here, rk.losses.GRPO(), rk.Reduction(kind, group=group, context=context), sweep)
                (out.loss if group else out.loss * world).backward()  # DDP averages
                compare(model, alone, (kind, sweep, group))
                total = out.loss.detach().clone()
                dist.all_reduce(total)
                assert abs(total / (world if group else 1) - want.loss) <= BOUND * want.loss.abs() + 1e-7, (kind, sweep)
                assert set(out.metrics) == set(want.metrics)


def sequence_losses_case(data: Any, context: Any) -> None:
    """Losses that read whole sequences, on log-probs that are gathered; the engine averages over all ranks."""
    x = batch()
    rows = {k: v.chunk(data.size())[data.rank()] for k, v in x.items()}
    here = sliced(rows, slices(context))
    given = {k: rows[k] for k in ("old_logp", "advantages", "mask")}
    for loss in (rk.losses.GSPO(clip=None), rk.losses.VESPO(), rk.losses.GMPO()):
        alone = Student(tied=False)
        alone(x, loss, rk.Reduction(), False).loss.backward()
        model = DistributedDataParallel(Student(tied=False))
        with pytest.raises(ValueError, match=r"needs whole sequences, got slices \(Reduction\(context=…\)\)"):
            model.module(here, loss, rk.Reduction(context=context), False)
        logp = model(here, Scores(), None, False)
        whole = rk.context.gather(logp, context)
        loss(whole, reduction=rk.Reduction(group=dist.group.WORLD), **given).loss.backward()
        compare(model, alone, loss)


class Scores:
    """In a loss's place: the log-probs themselves."""

    def __call__(self, logp: Tensor, **_: Any) -> Tensor:
        return logp


def work(rank: int, world: int) -> None:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2) if world == 4 else (1, world), mesh_dim_names=("data", "context"))
    data, context = mesh.get_group("data"), mesh.get_group("context")
    next_tokens_case(context)
    reductions_case(data, context, world)
    sequence_losses_case(data, context)
