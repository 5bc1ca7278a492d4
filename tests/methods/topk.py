"""Inputs and float64 oracles of the top-K family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk
from tests.oracles import reduced, straight_through, surrogate

Inputs = dict[str, Any]
B, T, V, K = 4, 7, 12, 4
BAND = (0.1, 0.6)


def inputs(
    needs: tuple[str, ...], leaves: tuple[str, ...] = ("topk_logp",), sampled: bool = False, band: bool = False
) -> tuple[list[str], Inputs]:
    """The arguments that receive gradient, and all arguments, float32: 4 sequences of 7 tokens, one of them fully masked."""
    z, t = 2 * torch.randn(B, T, V), torch.linspace(0.5, 4, T).unsqueeze(1) * torch.randn(B, T, V)
    lq, lp = z.log_softmax(-1), t.log_softmax(-1)
    target = torch.randint(V, (B, T))
    ids = lp.topk(K).indices
    ids[0, 0, 1] = -1
    ids[0, 1, 3] = ids[0, 1, 0]
    outside = torch.ones_like(lp).scatter(-1, ids.clamp_min(0), 0.0) > 0
    teacher = rk.TopK(
        ids.int(), lp.gather(-1, ids.clamp_min(0)), tail_logp=torch.where(outside, lp, -torch.inf).logsumexp(-1),
        target_logp=_at(lp, target), entropy=-(lp.exp() * lp).sum(-1),
    )  # fmt: skip
    if sampled or band:
        teacher = rk.supports.with_sampled(teacher, target)
    if band:
        teacher = rk.supports.probability_band(teacher, *BAND, target=target)
    topk_logp = lq.gather(-1, teacher.ids.long().clamp_min(0))
    mask = torch.rand(B, T) > 0.2
    mask[2] = False
    pool = {
        "topk_logp": topk_logp, "logp": _at(lq, target), "tail_logp": torch.where(outside, lq, -torch.inf).logsumexp(-1),
        "entropy": -(lq.exp() * lq).sum(-1), "target": target, "old_logp": _at(lq, target) + 0.2 * torch.randn(B, T),
        "old_topk_logp": topk_logp + 0.2 * torch.randn(topk_logp.shape), "teacher": teacher,
        "spans": torch.tensor([0, 0, 0, 1, 1, -1, -1]).expand(B, T),
    }  # fmt: skip
    given = {k: pool[k] for k in dict.fromkeys((*leaves, *needs, *(("topk_logp", "logp") if "old_logp" in needs else ())))}
    return list(leaves), {**given, "mask": mask}


INPUTS = {
    "lsm_sampled": partial(inputs, sampled=True),
    "ta_opd": partial(inputs, leaves=("topk_logp", "tail_logp")),
    "trl_server_distillation": partial(inputs, leaves=("topk_logp", "tail_logp")),
    "nemo_rl_zero_outside": partial(inputs, leaves=("topk_logp", "tail_logp", "entropy")),
    "eopd": partial(inputs, leaves=("logp", "topk_logp")),
    "ema_pg": partial(inputs, leaves=("logp", "topk_logp")),
    "verl_topk_pg": partial(inputs, leaves=("logp",)),
    "dac_kl": partial(inputs, band=True),
    "sdpo": partial(inputs, leaves=("topk_logp", "tail_logp")),
}


def _at(x: Tensor, target: Tensor) -> Tensor:
    return x.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def rows(f: Callable[..., Tensor], teacher: Any, mask: Tensor, *slots: Tensor, per_token: tuple[Tensor, ...] = ()) -> Tensor:
    """Token-mean of ``f(log q…, log p, …)`` over the real slots of each token, one token after the other."""
    like = slots[0][..., 0]
    token = torch.zeros_like(like)
    for i in range(B):
        for j in range(T):
            ids = teacher.ids[i, j].tolist()
            use = [k for k, v in enumerate(ids) if v >= 0 and v not in ids[:k]]
            lp = teacher.logp[i, j, use].to(like.dtype)
            token = token.index_put(
                (torch.tensor(i), torch.tensor(j)), f(*(x[i, j, use] for x in slots), lp, *(x[i, j] for x in per_token))
            )
    return reduced(token, mask, "token-mean")


def kl(la: Tensor, lb: Tensor) -> Tensor:
    return (la.exp() * (la - lb)).sum()


def normalised(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda lq, lp: f(lq.log_softmax(0), lp.log_softmax(0))


def lsm(topk_logp: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    return rows(normalised(kl), teacher, mask, topk_logp)


def bucket(direction: str, topk_logp: Tensor, tail_logp: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    def f(lq: Tensor, lp: Tensor, tail_q: Tensor, tail_p: Tensor) -> Tensor:
        q, p = torch.cat([lq, tail_q.view(1)]), torch.cat([lp, tail_p.view(1)])
        return kl(q, p) if direction == "reverse" else kl(p, q)

    return rows(f, teacher, mask, topk_logp, per_token=(tail_logp, teacher.tail_logp.to(tail_logp.dtype)))


def verl(topk_logp: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    def f(lq: Tensor, lp: Tensor) -> Tensor:
        return kl(lp.clamp_min(-10), lq.clamp_min(-10)).clamp(0, 10)

    return rows(f, teacher, mask, topk_logp)


def verl_pg(logp: Tensor, old_logp: Tensor, topk_logp: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    def f(lq: Tensor, lp: Tensor, s: Tensor, o: Tensor) -> Tensor:
        return surrogate(s, o, -kl(lp.clamp_min(-10), lq.clamp_min(-10)).clamp(0, 10).detach(), dual=3.0)

    return rows(f, teacher, mask, topk_logp.to(logp.dtype), per_token=(logp, old_logp))


def nemo(topk_logp: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    return rows(normalised(lambda q, p: 0.5 * kl(p, q) + 0.5 * kl(q, p)), teacher, mask, topk_logp)


def nemo_zero(topk_logp: Tensor, tail_logp: Tensor, entropy: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    def f(lq: Tensor, lp: Tensor, tail: Tensor, h: Tensor) -> Tensor:
        p = lp.log_softmax(0)
        rest = -h - (lq.exp() * lq).sum() + 100 * tail.exp()
        return 0.5 * kl(p, lq) + 0.5 * (kl(lq, p) + rest)

    return rows(f, teacher, mask, topk_logp, per_token=(tail_logp, entropy))


def jsd(topk_logp: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    def f(q: Tensor, p: Tensor) -> Tensor:
        m = (0.5 * p.exp() + 0.5 * q.exp()).log()
        return 0.5 * kl(p, m) + 0.5 * kl(q, m)

    return rows(normalised(f), teacher, mask, topk_logp)


def ema_pg(topk_logp: Tensor, logp: Tensor, target: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    x = logp - teacher.target_logp
    tail = torch.where((teacher.ids == target.unsqueeze(-1)).any(-1), 0, straight_through(logp, x, x))
    return rows(kl, teacher, mask, topk_logp) + reduced(tail, mask, "token-mean")


def eopd(logp: Tensor, topk_logp: Tensor, old_logp: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    ppo = surrogate(logp, old_logp, teacher.target_logp.to(logp.dtype) - old_logp)

    def f(lq: Tensor, lp: Tensor, h: Tensor) -> Tensor:
        return kl(lp.log_softmax(0), lq) * (h > 0.8)

    return reduced(ppo, mask, "token-mean") + rows(f, teacher, mask, topk_logp, per_token=(teacher.entropy,))


def thunlp(topk_logp: Tensor, old_topk_logp: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    def f(lq: Tensor, old: Tensor, lp: Tensor) -> Tensor:
        return surrogate(lq, old, -old.softmax(0) * (old - lp)).sum()

    return rows(f, teacher, mask, topk_logp, old_topk_logp)


def band(topk_logp: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    return rows(lambda lq, lp: kl(lp, lq), teacher, mask, topk_logp)


def span(topk_logp: Tensor, teacher: Any, spans: Tensor, mask: Tensor) -> Tensor:
    """Over the whole vocabulary: squared gaps between products of neighbours, where both supports have the id."""

    def dense(logp: Tensor, i: int, j: int) -> Tensor:
        ids = teacher.ids[i, j].tolist()
        use = [k for k, v in enumerate(ids) if v >= 0 and v not in ids[:k]]
        return torch.zeros(V, dtype=logp.dtype).index_put((torch.tensor([ids[k] for k in use]),), logp[i, j, use].exp())

    token, lp = torch.zeros_like(topk_logp[..., 0]), teacher.logp.to(topk_logp.dtype)
    for i in range(B):
        for j in range(T - 1):
            if spans[i, j] == spans[i, j + 1] >= 0 and mask[i, j] and mask[i, j + 1]:
                p, q = (dense(x, i, j) * dense(x, i, j + 1) for x in (lp, topk_logp))
                token = token.index_put((torch.tensor(i), torch.tensor(j)), (p - q).square().sum())
    return reduced(token, mask, "token-mean")


def sdpo(topk_logp: Tensor, tail_logp: Tensor, logp: Tensor, old_logp: Tensor, teacher: Any, mask: Tensor) -> Tensor:
    def f(lq: Tensor, lp: Tensor, tail_q: Tensor, tail_p: Tensor, s: Tensor, o: Tensor) -> Tensor:
        q, p = torch.cat([lq, tail_q.view(1)]), torch.cat([lp, tail_p.view(1)])
        m = ((q.exp() + p.exp()) / 2).log()
        return (s - o).exp().clamp(max=2).detach() * (kl(p, m) + kl(q, m)) / 2

    return rows(f, teacher, mask, topk_logp, per_token=(tail_logp, teacher.tail_logp.to(logp.dtype), logp, old_logp))


ORACLES = {
    "lsm": lsm,
    "lsm_sampled": lsm,
    "ta_opd": partial(bucket, "reverse"),
    "trl_server_distillation": partial(bucket, "forward"),
    "verl_forward_kl_topk": verl,
    "verl_topk_pg": verl_pg,
    "nemo_rl_mixed": nemo,
    "nemo_rl_zero_outside": nemo_zero,
    "ms_swift_topk": jsd,
    "ema_pg": ema_pg,
    "eopd": eopd,
    "thunlp_opd": thunlp,
    "dac_kl": band,
    "dac_kl_span": span,
    "sdpo": sdpo,
}
