"""What is said of top-K distillation losses, held to a toy each: claim, expected, found. Seconds on a CPU, no model.

python examples/facts_topk.py

Needs: nothing but rlad_kernels. Each fact is three lines, for example

    holds EOPD toy: top-1 changes more where the teacher is uncertain (η = 0.3, 1000 steps)
          expected T = .3: 7.3 ± 1.6, T = 1: 84.0 ± 16.7 (paper; its η and steps are not known)
          found    T = .3: 5.8 ± 16.7, T = 1: 83.5 ± 51.6
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import rlad_kernels as rk


class Fact(NamedTuple):
    claim: str
    expected: str
    found: str
    holds: bool


def top1_changes(temperature: float, lr: float, steps: int, runs: int, exact: bool = False) -> Tensor:
    """How often the student's most likely token changes, per run, in EOPD's toy.

    80 teacher logits from N(0, 1), five of them planted at 1.7, 1.9, 2.1, 2.3 and 2.5; the student lives on the teacher's
    top-10 ids, starts uniform, and takes z_x += lr·(log p_x − log q_x) for a sampled x. With ``exact`` it descends EOPD's
    forward KL instead, whose gradient is that of the library.
    """
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(runs, 80, generator=g)
    logits[:, :5] = torch.tensor([1.7, 1.9, 2.1, 2.3, 2.5])
    teacher = rk.linear_topk(logits, rk.LMHead(torch.eye(80), temperature=temperature), 10)
    kl = rk.losses.TopKKL("forward", normalize="teacher")
    z, top, changes = torch.zeros(runs, 10), torch.zeros(runs, dtype=torch.int64), torch.zeros(runs)
    for step in range(steps):
        lq = z.log_softmax(1)
        if exact:
            z.requires_grad_()
            loss = kl(z.log_softmax(1), teacher=teacher, reduction=rk.Reduction(denominator=1.0)).loss
            z = (z - lr * torch.autograd.grad(loss, z)[0]).detach()
        else:
            x = torch.multinomial(lq.exp(), 1, generator=g)
            z = z.scatter_add(1, x, lr * (teacher.logp - lq).gather(1, x))
        now = z.argmax(1)
        changes += (now != top) if step else 0
        top = now
    return changes


def eopd_toy(rates: tuple[float, ...] = (0.1, 0.3, 1.0), steps: int = 1000) -> Iterator[Fact]:
    for lr in rates:
        cold, warm = (top1_changes(t, lr, steps, 16) for t in (0.3, 1.0))
        yield Fact(
            f"EOPD toy: top-1 changes more where the teacher is uncertain (η = {lr}, {steps} steps)",
            "T = .3: 7.3 ± 1.6, T = 1: 84.0 ± 16.7 (paper; its η and steps are not known)",
            f"T = .3: {cold.mean():.1f} ± {cold.std():.1f}, T = 1: {warm.mean():.1f} ± {warm.std():.1f}",
            bool(warm.mean() > 2 * cold.mean()),
        )
    calm = top1_changes(1.0, rates[-1], steps, 16, exact=True)
    yield Fact(
        "EOPD's forward KL instead: the exact gradient does not wander",
        "a few changes at most, T = 1",
        f"{calm.mean():.1f} ± {calm.std():.1f}",
        bool(calm.mean() < 5),
    )


def descend(method: str, z: Tensor, teacher: rk.TopK, outside: Tensor, steps: int = 300, lr: float = 5.0) -> Tensor:
    for _ in range(steps):
        z = z.detach().requires_grad_()
        lq = z.log_softmax(1)
        tail = torch.where(outside, lq, -torch.inf).logsumexp(1)
        scores = rk.TokenScores(topk_logp=lq.gather(1, teacher.ids.long()), tail_logp=tail)
        out = rk.METHODS[method](scores, teacher=teacher, reduction=rk.Reduction(denominator=1.0))
        z = z - lr * torch.autograd.grad(out.loss, z)[0]
    return z.detach()


def lsm_drift() -> Iterator[Fact]:
    torch.manual_seed(0)
    t, z = 2 * torch.randn(16, 32), torch.randn(16, 32)
    head = rk.LMHead(torch.eye(32))
    teacher = rk.linear_topk(t, head, 8)
    assert teacher.tail_logp is not None
    outside = torch.ones(16, 32).scatter(1, teacher.ids.long(), 0.0) > 0
    pushed = z + 2 * outside

    def distance(x: Tensor, normalize: str) -> Tensor:
        kl = rk.losses.TopKKL(normalize=normalize)
        return rk.linear_loss(x, head, teacher.ids[:, 0], kl, teacher=teacher).loss

    both, tail = ([distance(x, n) for x in (z, pushed)] for n in ("both", "tail"))
    yield Fact(
        "LSM does not see the tail: all logits outside S raised by 2",
        "renormalised: the same loss, bit for bit; tail bucket: larger",
        f"{both[0]:.6f} → {both[1]:.6f}; {tail[0]:.3f} → {tail[1]:.3f}",
        bool(both[0] == both[1]) and bool(tail[1] > tail[0]),
    )
    masses = {}
    for method in ("lsm", "ta_opd"):
        end = descend(method, pushed, teacher, outside)
        rest = distance(end, "both").item()
        masses[method] = (torch.where(outside, end.softmax(1), 0).sum(1).mean().item(), rest)
    start, want = torch.where(outside, pushed.softmax(1), 0).sum(1).mean().item(), teacher.tail_logp.exp().mean().item()
    (lsm, lsm_rest), (ta, ta_rest) = masses["lsm"], masses["ta_opd"]
    yield Fact(
        "LSM drift: after descent the mass outside S stays where it was, the bucket brings it to the teacher's",
        f"tail mass {start:.3f} before, the teacher's {want:.3f}",
        f"LSM {lsm:.3f} (KL on S {lsm_rest:.1e}), tail bucket {ta:.3f} (KL on S {ta_rest:.1e})",
        abs(lsm - start) < 0.1 and abs(ta - want) < 0.02 and max(lsm_rest, ta_rest) < 1e-2,
    )


def expected_gradients() -> Iterator[Fact]:
    """Every token of a small vocabulary sampled once and weighted by q: expectations without noise, in float64."""
    torch.manual_seed(0)
    v, k = 24, 6
    z, t = torch.randn(v, dtype=torch.float64), torch.randn(v, dtype=torch.float64)
    lp, q = t.log_softmax(0), z.softmax(0)
    ids = q.topk(k).indices
    target = torch.arange(v)
    teacher = rk.TopK(ids.expand(v, k), lp[ids].expand(v, k), target_logp=lp)

    def slope(loss: Callable[[Tensor], Tensor]) -> Tensor:
        x = z.clone().requires_grad_()
        return torch.autograd.grad(loss(x.log_softmax(0)), x)[0]

    kl = slope(lambda lq: (lq.exp() * (lq - lp)).sum())
    mass = slope(lambda lq: lq[ids].exp().sum())

    def k4(lq: Tensor, unbiased: bool) -> Tensor:
        rows, loss = [], rk.losses.SampledTailKL(unbiased=unbiased)
        for y in target:  # one call a token, so that each loss keeps its gradient
            one = rk.TopK(ids[None], lp[None, ids], target_logp=lp[y][None])
            scores = rk.TokenScores(logp=lq[y][None], topk_logp=lq[ids][None])
            rows.append(loss(scores, target=y[None], teacher=one).loss)
        return (q * torch.stack(rows)).sum()

    published, unbiased = (slope(lambda lq, u=u: k4(lq, u)) for u in (False, True))
    error = [(published - kl - mass).abs().max().item(), (unbiased - kl).abs().max().item()]
    yield Fact(
        "EMA-PG: head backpropagated + k4 tail has the gradient of KL + Q_S; with s − t left attached, of the KL",
        "0, 0 (both to rounding)",
        f"{error[0]:.1e}, {error[1]:.1e} beside |∇Q_S| = {mass.abs().max():.2f}",
        max(error) < 1e-14,
    )
    full = rk.TopK(target[None], lp[None])
    pg = slope(lambda lq: rk.losses.TopKPG()(lq[None], old_topk_logp=z.log_softmax(0)[None], teacher=full).loss)
    yield Fact(
        "thunlp/OPD: candidate rewards −q(log q − log p) over the whole vocabulary, first step: the reverse KL's gradient",
        "0",
        f"{(pg - kl).abs().max():.1e}",
        bool((pg - kl).abs().max() < 1e-14),
    )
    forward = rk.losses.TopKKL("forward", normalize="none")
    adv = forward(z.log_softmax(0)[ids].expand(v, k), teacher=teacher).token_loss
    zero = slope(lambda lq: -(q * (lq - lq.detach()).exp() * -adv).sum())
    yield Fact(
        "verl: Â = −sg(truncated KL) does not depend on the sampled token, so nothing is left in expectation",
        "0",
        f"{zero.abs().max():.1e}",
        bool(zero.abs().max() < 1e-14),
    )


def facts() -> Iterator[Fact]:
    yield from eopd_toy()
    yield from lsm_drift()
    yield from expected_gradients()


def main() -> None:
    for fact in facts():
        print("holds" if fact.holds else "FAILS", fact.claim, f"\n      expected {fact.expected}\n      found    {fact.found}")


if __name__ == "__main__":
    main()
