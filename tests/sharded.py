"""What the ranks of tests/test_shards.py do: each case on this rank's part of a head, and on the whole head, side by side."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rlad_kernels as rk
from rlad_kernels.engine import sparse
from rlad_kernels.engine.shards import Shard as Parts
from rlad_kernels.losses.vocab.weighed import adaptive_coefficients
from tests.exact_divergences import ALONE
from tests.test_both_roads import LOSSES, World, same

HERE = torch.get_default_device().type  # of a rank: see tests/ranks.py
V, SIZE = 40, 37  # rows of the head, and those that are tokens: the rest is padding
CUTS = {2: (0, 25, 40), 3: (0, 19, 19, 40), 4: (0, 1, 30, 38, 40)}  # uneven; one of three is empty, one of four all padding
EXTRAS = ("mean_logits", "is_top1", "log_sum_sq_probs")


class Heads:
    """One head, whole and in parts."""

    def __init__(self, rank: int, world: int, weight: Tensor, bias: Tensor | None = None, **options: Any) -> None:
        self.rows = slice(*CUTS[world][rank : rank + 2])
        self.whole = [x.clone().requires_grad_() for x in (weight, bias) if x is not None]
        self.part = [x[self.rows].clone().requires_grad_() for x in (weight, bias) if x is not None]
        self.options = options

    def head(self, group: Any) -> rk.LMHead:
        return rk.LMHead(*(self.whole if group is None else self.part), **self.options, group=group)

    def gradients(self, loss: Tensor, hidden: Tensor, group: Any) -> list[Tensor]:
        """By hidden and by the whole head, put together of each rank's."""
        found = torch.autograd.grad(loss, [hidden, *(self.whole if group is None else self.part)])
        if group is None:
            return [*found]
        parts: list[Any] = [None] * group.size()
        dist.all_gather_object(parts, found[1:], group=group)
        return [found[0], *(torch.cat([y.to(hidden.device) for y in x]) for x in zip(*parts, strict=True))]


def close(got: Any, want: Any, eps: float, what: str = "") -> None:
    """The same shapes and dtypes, and values within ``eps`` of the largest."""
    if isinstance(want, Tensor):
        assert (got.shape, got.dtype) == (want.shape, want.dtype), (what, got.shape, want.shape)
        if not want.is_floating_point():
            assert torch.equal(got, want), what
            return
        far = torch.where(got == want, 0, got - want).abs()
        finite = torch.where(want.isfinite(), want, 0).abs()
        assert not want.numel() or far.max() <= eps * finite.max(), (what, far.max().item(), finite.max().item())
    elif isinstance(want, dict):
        assert set(got) == set(want)
        for k in want:
            close(got[k], want[k], eps, f"{what}.{k}")
    elif isinstance(want, (tuple, list)):
        for i, (x, y) in enumerate(zip(got, want, strict=True)):
            close(x, y, eps, f"{what}[{i}]")
    else:
        assert got == want, what


def scores(heads: Heads, hidden: Tensor, target: Tensor, ids: Tensor, group: Any, **options: Any) -> tuple[Any, list[Tensor]]:
    """``linear_logp`` with all its results, and gradients through all of them."""
    hidden = hidden.clone().requires_grad_()
    s = rk.linear_logp(
        hidden, heads.head(group), target, topk_ids=ids, entropy=True, tail=True, extras=EXTRAS, **options
    )  # fmt: skip
    assert s.entropy is not None and s.topk_logp is not None and s.tail_logp is not None
    empty = s.topk_logp.isinf()
    loss = (
        ((s.logp * torch.linspace(-1, 1, s.logp.numel()).view_as(s.logp)).sum() + 0.3 * s.entropy.sum() + 0.1 * s.lse.sum())
        + torch.where(empty, 0, s.topk_logp).sum() * 0.2
        + 0.2 * s.tail_logp.sum()
    )
    return (*s[:5], s.extras), heads.gradients(loss, hidden, group)


def problem(dtype: torch.dtype, n: int = 12, d: int = 16, k: int = 5) -> tuple[Tensor, ...]:
    ids = torch.stack([torch.randperm(SIZE)[:k] for _ in range(n)])
    ids[0, 1], ids[1, 2], ids[2, 3] = ids[0, 0], -1, ids[2, 0]
    target = torch.randint(SIZE, (n,))
    target[0] = ids[0, 0]
    return torch.randn(n, d).to(dtype), (torch.randn(V, d) * 0.5).to(dtype), (torch.randn(V) * 0.1).to(dtype), target, ids


# what the order of float32's sums can do to these, and a bfloat16's own last place
EPS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def logp_case(rank: int, world: int, dtype: torch.dtype, **options: Any) -> None:
    hidden, weight, bias, target, ids = problem(dtype)
    hidden[3] = (hidden[3] * 8).round() / 8  # whose square is the same in every order of its sum
    weight[20], bias[20], target[3] = hidden[3], bias[39], 20  # the largest logit of row 3 twice, here on the lower rank
    weight[36], bias[36] = weight[20], bias[20]
    temperature = torch.rand(len(hidden)) + 0.5
    more = {"mask": (torch.rand(len(hidden)) > 0.3).index_fill(0, torch.tensor(3), True), **options}
    for given in ({}, {"temperature": 0.7, "softcap": 5.0}, {"temperature": temperature, "logit_scale": 0.5}):
        heads = Heads(rank, world, weight, bias, vocab_size=SIZE, **given)
        got, want = (scores(heads, hidden, target, ids, group, **more) for group in (dist.group.WORLD, None))
        close(got, want, EPS[dtype])
        assert want[0][5]["is_top1"][3]
        again = scores(heads, hidden, target, ids, dist.group.WORLD, **more)
        close(again, got, 0.0)


def filtered_case(rank: int, world: int) -> None:
    """The sparse backward, some blocks of tokens exact: which columns are kept is a matter of whole rows."""
    block = sparse.BLOCK[HERE]
    for dtype, given in (
        (torch.float32, {}),
        (torch.float32, {"softcap": 30.0}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"softcap": 30.0}),
    ):
        columns, (weight, bias) = torch.tensor([[3, 22], [9, 36]]), (0.1 * torch.randn(V, 16), 0.05 * torch.randn(V))
        weight[columns.flatten(), [0, 0, 1, 1]] = 2.0
        toward = 2 * torch.eye(3, 16).repeat_interleave(block, 0)[: 3 * block - 50]
        toward[2 * block :] = 0  # the last block is flat and keeps all
        hidden, weight, bias = (x.to(dtype) for x in (toward + 0.02 * torch.randn(toward.shape), weight, bias))
        likely = torch.cat([columns, columns[:1]]).repeat_interleave(block, 0)[: len(hidden)]
        target, ids, mask = likely[:, 0].clone(), likely.clone(), torch.arange(len(hidden)) < len(hidden) - 8
        target[::5], ids[::7, 1] = likely[::5, 1], -1
        heads, kept = (
            Heads(rank, world, weight, bias, vocab_size=SIZE, temperature=0.9, **given),
            {"mask": mask, "filter_eps": 0.015},
        )
        got, want = (scores(heads, hidden, target, ids, group, **kept) for group in (dist.group.WORLD, None))
        masses = [found[0][-1].pop("dropped_mass") for found in (got, want)]
        close(got, want, EPS[dtype], str(given))
        assert (masses[0] - masses[1]).abs().max() < 2.0**-18, "1 less what is kept"
        assert masses[1][: 2 * block].mean() > 0.1 and (masses[1][-block + 60 :] == 0).all()
        advantages, old = torch.randn(len(hidden)), want[0][0].detach() + 0.1
        for loss, more in ((rk.losses.GRPO(), {"advantages": advantages, "old_logp": old}), (rk.losses.CrossEntropy(), {})):
            found = []
            for group in (dist.group.WORLD, None):
                x = hidden.clone().requires_grad_()
                out = rk.linear_loss(x, heads.head(group), target, loss, **kept, **more)
                metrics = {k: v + 1 if k.startswith("dropped") else v for k, v in out.metrics.items()}
                found.append((out.loss, out.token_loss, metrics, heads.gradients(out.loss, x, group)))
            close(*found, EPS[dtype], str(given))


def frozen_case(rank: int, world: int) -> None:
    """Of a head without gradient, and of log-probs alone."""
    hidden, weight, _, target, _ = problem(torch.float32)
    heads, found = Heads(rank, world, weight, vocab_size=SIZE), []
    for group in (dist.group.WORLD, None):
        x, head = hidden.clone().requires_grad_(), heads.head(group)
        frozen = rk.LMHead(head.weight.detach(), vocab_size=SIZE, group=group)
        logp = rk.linear_logp(x, frozen, target).logp
        found.append((logp, *torch.autograd.grad(logp.square().sum(), x)))
        with torch.no_grad():
            found[-1] = (*found[-1], rk.linear_logp(x, frozen, target).logp)
    close(*found, EPS[torch.float32])


def topk_case(rank: int, world: int) -> None:
    hidden, weight, bias, target, _ = problem(torch.float32)
    weight[7], bias[7] = weight[30], bias[30]  # equal logits on two ranks: the lower id wins
    heads = Heads(rank, world, weight, bias, vocab_size=SIZE, temperature=0.8)
    for k in (1, 4, 30, SIZE):  # more than a rank has, and all
        found = [rk.linear_topk(hidden, heads.head(g), k, target=target, entropy=True) for g in (dist.group.WORLD, None)]
        close(tuple(found[0]), tuple(found[1]), EPS[torch.float32], str(k))
    support = [rk.linear_support(hidden, heads.head(g), torch.randint(SIZE, (12, 3)), target=target) for g in (dist.group.WORLD,)]
    assert support[0].logp.shape == (12, 3)


def gather_case(rank: int, world: int) -> None:
    hidden, weight, bias, _, ids = problem(torch.float32)
    heads, found = Heads(rank, world, weight, bias, vocab_size=SIZE, softcap=4.0), []
    for group in (dist.group.WORLD, None):
        x = hidden.clone().requires_grad_()
        z = rk.linear_gather(x, heads.head(group), ids, mask=torch.arange(12) != 3)
        found.append((z, heads.gradients(torch.where(z.isinf(), 0, z).square().sum(), x, group)))
    close(*found, EPS[torch.float32])
    weight, two = weight.bfloat16(), torch.tensor([0, SIZE - 1]).expand(12, 2)  # on different ranks, and nearly cancelling
    weight[SIZE - 1] = -2 * weight[0]
    x, head = hidden.bfloat16().requires_grad_(), Heads(rank, world, weight, None, vocab_size=SIZE).head(dist.group.WORLD)
    (rk.linear_gather(x, head, two) * torch.tensor([1, 0.5 + 2.0**-12])).sum().backward()
    assert torch.equal(x.grad, -(2.0**-11) * weight[:1].expand(12, -1))


def method_case(rank: int, world: int, name: str) -> None:
    """Both roads."""
    loss, given = LOSSES[name], World(dtype=torch.float64 if HERE == "cpu" else torch.float32)
    given.weight = (torch.randn(V, given.weight.shape[1]) * 0.4).to(given.hidden.dtype).requires_grad_()
    heads = Heads(rank, world, given.weight.detach())

    def road(group: Any, sweep: bool) -> tuple[Any, list[Tensor]]:
        hidden, head = given.hidden.detach().clone().requires_grad_(), heads.head(group)
        tensors, reduction = given.given(loss), rk.Reduction(denominator=7.0)
        if sweep:
            out = rk.linear_loss(hidden, head, given.target, loss, mask=given.mask, reduction=reduction, **tensors)
        else:
            ids = tensors["teacher"].ids if "topk_logp" in loss.read() else None
            asked = {"entropy": True, "tail": ids is not None, "mean_logits": "mean_logits" in loss.read()}
            s = rk.linear_logp(hidden, head, given.target, topk_ids=ids, mask=given.mask, **asked)
            more = {"target": given.target} if "target" in loss.needs else {}
            out = loss(s, mask=given.mask, reduction=reduction, **tensors, **more)
        return out, heads.gradients(out.loss, hidden, group)

    for sweep in (True, False):
        got, want = road(dist.group.WORLD, sweep), road(None, sweep)
        same(got, want, loss, None if HERE == "cpu" else EPS[torch.float32])
        assert set(got[0].metrics) == set(want[0].metrics)


def divergence_case(rank: int, world: int) -> None:
    """Every divergence: one teacher and two, value and gradients, with any cotangent and as a loss."""
    hidden, weight, bias, _, _ = problem(torch.float32)
    teacher = Heads(rank, world, torch.randn(V, 6) * 0.7, vocab_size=SIZE, temperature=1.3)
    heads, states = Heads(rank, world, weight, bias, vocab_size=SIZE, softcap=6.0), torch.randn(12, 6)
    mask = torch.arange(12) != 5
    for name, method in rk.METHODS.items():
        if method.family != "divergence":
            continue
        for n in (1, 2):
            found = []
            for group in (dist.group.WORLD, None):
                given = (heads.head(group), [states, states.flip(0)][:n], [teacher.head(group)] * n, method.loss)
                more: dict[str, Any] = {"mask": mask, "teacher_weights": [0.7, 0.3][:n]}
                x = hidden.clone().requires_grad_()
                value = rk.linear_divergence(x, *given, **more)
                out = rk.linear_divergence_loss(x, *given, **more)
                found.append((value, out.loss, out.token_loss, heads.gradients(value.square().sum(), x, group)))
                found[-1] = (*found[-1], heads.gradients(out.loss, x, group))
            close(*found, 4 * EPS[torch.float32], name)
    frozen = []
    for group in (dist.group.WORLD, None):
        x, head = hidden.clone().requires_grad_(), heads.head(group)
        head = rk.LMHead(head.weight.detach(), vocab_size=SIZE, group=group)
        value = rk.linear_divergence(x, head, states, teacher.head(group), rk.losses.JSD(0.3))
        frozen.append((value, *torch.autograd.grad(value.square().sum(), x)))
    close(*frozen, EPS[torch.float32])


def adaptive_case(rank: int, world: int) -> None:
    """AKL's shares where the head ends within ties, is everything, or one token; and where p and q are near 1 in one column."""
    z = torch.cat([torch.zeros(1, V), torch.randint(4, (6, V)).float(), torch.randn(6, V) * 3, torch.randn(3, V)])
    z[-1], z[-2, :-1], z[-3, 7] = -torch.inf, -torch.inf, 30.0
    z[-1, 22] = 0.0
    lp, lq = z.log_softmax(1), (0.9 * z + 0.1 * torch.randn_like(z)).log_softmax(1)
    rows = Heads(rank, world, torch.zeros(V, 1)).rows
    shard = Parts(torch.zeros(rows.stop - rows.start, 1), V, rows.start, dist.group.WORLD.group_name)  # pyright: ignore[reportOptionalMemberAccess]
    for dtype in (torch.float32, torch.float64):
        for mu in (0.0, 0.3, 0.5, 0.99):  # at 1 rounding says whether the last fit
            p, q = lp.to(dtype), lq.to(dtype)
            got = adaptive_coefficients(q[:, rows], p[:, rows], mu, shard)
            close(got, adaptive_coefficients(q, p, mu, ALONE), EPS[dtype], str(mu))


def dtensor_case(rank: int, world: int) -> None:
    """A DTensor of sharded rows, its gradient one too; a replicated one; and what is refused."""
    mesh = init_device_mesh(HERE, (world,))
    weight, hidden, target = torch.randn(V, 16), torch.randn(6, 16, requires_grad=True), torch.arange(6)
    whole = weight.clone().requires_grad_()
    want = torch.autograd.grad(rk.linear_logp(hidden, rk.LMHead(whole), target).logp.sum(), (hidden, whole))
    for placement, group in ((Shard(0), mesh.get_group()), (Replicate(), None)):
        x = distribute_tensor(weight, mesh, [placement]).requires_grad_()
        got = torch.autograd.grad(rk.linear_logp(hidden, rk.LMHead(x, group=group), target).logp.sum(), (hidden, x))
        close((got[0], got[1].full_tensor()), want, EPS[torch.float32])
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    for bad, options in ((sharded, {}), (distribute_tensor(weight, mesh, [Shard(1)]), {"group": mesh.get_group()})):
        with pytest.raises(ValueError, match=r"weight is a DTensor with placements .* group=mesh.get_group\(\)"):
            rk.LMHead(bad, **options)


@dataclass(frozen=True)
class Overlap(rk.losses.Divergence):
    def values(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return -(student_logp.exp() * teacher_logp.exp()).sum(1)


def refused_case(rank: int, world: int) -> None:
    hidden, weight, _, target, _ = problem(torch.float32)
    head = Heads(rank, world, weight, vocab_size=SIZE).head(dist.group.WORLD)
    whole = rk.LMHead(weight, vocab_size=SIZE)
    calls: dict[str, Callable[[], Any]] = {
        "they must be cut alike": lambda: rk.linear_divergence(hidden, head, hidden, whole, rk.losses.ForwardKL()),
        "Overlap.values reads all logits of a row, of": lambda: rk.linear_divergence(hidden, head, hidden, head, Overlap()),
        "must be in [0, vocab_size=37)": lambda: rk.linear_logp(hidden, head, target + 30),
        "group must be a torch.distributed.ProcessGroup": lambda: rk.LMHead(weight, group="tp"),  # type: ignore[arg-type]
    }
    for message, call in calls.items():
        with rk.set_checks(True), pytest.raises(ValueError, match=re.escape(message)):
            call()


def bytes_case(rank: int, world: int) -> None:
    """What a rank sends: docs/scale.md's formulas."""
    hidden, weight, bias, target, ids = problem(torch.float32)
    (n, d), k = hidden.shape, ids.shape[1]
    head = Heads(rank, world, weight, bias, vocab_size=SIZE).head(dist.group.WORLD)
    sent: Counter[str] = Counter()
    gather, reduce = dist.all_gather, dist.all_reduce

    def count(kind: str, call: Callable[..., Any], at: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            sent[kind] += args[at].nbytes
            return call(*args, **kwargs)

        return counted

    def sends(call: Callable[[], Any]) -> tuple[int, int]:
        sent.clear()
        call()
        return sent["gather"], sent["reduce"]

    x = hidden.clone().requires_grad_()
    loss, given = rk.losses.GRPO(), {"old_logp": -torch.ones(n), "advantages": torch.ones(n)}
    dist.all_gather, dist.all_reduce = count("gather", gather, 1), count("reduce", reduce, 0)
    try:
        assert sends(lambda: rk.linear_logp(hidden, head, target)) == (4 * n * 7, 0)
        assert sends(lambda: rk.linear_logp(hidden, head, target, topk_ids=ids)) == (4 * n * (7 + k), 0)
        assert sends(lambda: rk.linear_logp(x, head, target).logp.sum().backward()) == (4 * n * 7, 4 * n * d)
        assert sends(lambda: rk.linear_loss(x, head, target, loss, **given)) == (4 * n * 7, 4 * n * d)
        smooth = rk.losses.CrossEntropy(label_smoothing=0.1)
        assert sends(lambda: rk.linear_loss(hidden, head, target, smooth)) == (4 * n * 7, 4 * d + 4)
        few, once = {"target": torch.zeros_like(target), "filter_eps": 0.3}, 4 * n * (2 + d) + 20  # one block of few columns
        assert sends(lambda: rk.linear_loss(x, head, loss=loss, **few, **given)) == (4 * n * 7, once)
        assert sends(lambda: rk.linear_logp(x, head, **few).logp.sum().backward()) == (2 * 4 * n * 7, once)
        assert sends(lambda: rk.linear_topk(hidden, head, k)) == (4 * n * (6 + 2 * k), 0)
        assert sends(lambda: rk.linear_topk(hidden, head, k, target=target)) == (4 * n * (7 + 2 * k), 0)
        assert sends(lambda: rk.linear_gather(hidden, head, ids)) == (0, 4 * n * k)
        two = ([hidden, hidden], [head, head], rk.losses.JSD(0.5))
        assert sends(lambda: rk.linear_divergence_loss(x, head, *two, teacher_weights=[0.5, 0.5])) == (
            4 * n * (6 + 6 * 2),
            4 * n * (4 * 2 + d),
        )
        taid, akl = (([hidden], [head], loss) for loss in (rk.losses.TAID(0.4), rk.losses.AKL()))
        assert sends(lambda: rk.linear_divergence_loss(x, head, *taid)) == (4 * n * (6 + 6 + 3), 4 * n * (4 + d))
        assert sends(lambda: rk.linear_divergence_loss(x, head, *akl)) == (4 * n * (6 + 6), 4 * n * (4 + 40 + d))
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce


def named() -> Iterator[tuple[str, Callable[[int, int], None]]]:
    for dtype in (d for d in EPS if HERE == "cpu" or d != torch.float64):
        yield f"logp {str(dtype).removeprefix('torch.')}", partial(logp_case, dtype=dtype)
    yield "logp kept", partial(logp_case, dtype=torch.float32, keep=1 << 12)
    for case in (
        filtered_case,
        frozen_case,
        topk_case,
        gather_case,
        divergence_case,
        adaptive_case,
        dtensor_case,
        refused_case,
        bytes_case,
    ):
        yield case.__name__.removesuffix("_case"), case
    for name in LOSSES:
        yield f"method {name}", partial(method_case, name=name)


CASES = dict(named())


def work(rank: int, world: int) -> None:
    """Each case in turn. The first that fails ends this rank, and with it the others, which wait for it."""
    for name, case in CASES.items():
        torch.manual_seed(0)
        try:
            case(rank, world)
        except Exception as error:
            raise AssertionError(f"rank {rank} of {world}: {name}") from error


def killed(rank: int, world: int) -> None:
    """The last rank dies between two calls: the others get an error, and do not wait."""
    hidden, weight, bias, target, _ = problem(torch.float32)
    head = Heads(rank, world, weight, bias).head(dist.group.WORLD)
    rk.linear_logp(hidden, head, target)
    if rank < world - 1:
        with pytest.raises(RuntimeError, match=r"(?i)closed|reset|timed out|terminated"):
            for _ in range(2):  # what was sent before it died may still arrive
                rk.linear_logp(hidden, head, target)
    os._exit(0)  # without the barrier at the end
