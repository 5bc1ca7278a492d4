"""One case of each op: called as drawn, held to float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.backends import reference
from tests.fuzz.draws import Case, along, pick
from tests.fuzz.exact import Twin, agree, finite_sum, hold, twin
from tests.methods.divergence import DIVERGENCES, VALUES
from tests.oracles import reduced
from tests.roundings import spread

Draw = Callable[..., Any]
EXTRAS = ("mean_logits", "is_top1", "log_sum_sq_probs")


def _scores(case: Case, t: Twin, ids: Tensor | None) -> reference.Scores:
    return reference.token_scores(t.z, case.clean(case.target), None if ids is None else case.clean(ids, -1), case.keep)


def logp(draw: Draw, case: Case) -> None:
    ids = case.ids if pick(draw, False, True) else None
    entropy, tail = pick(draw, False, True), ids is not None and pick(draw, False, True)
    extras = pick(draw, (), EXTRAS)
    mean = case.options["softcap"] is None and pick(draw, False, True)
    names = ("logp", "lse", *(["entropy"] if entropy else []), *(["topk_logp"] if ids is not None else []),
             *(["tail_logp"] if tail else []), *(["mean_logits"] if mean else []))  # fmt: skip
    half = torch.finfo(case.hidden.dtype).bits == 16
    several = tuple(n for n in names if not (half and n == "mean_logits"))  # whose gradient is rounded to 16 bits by itself
    wanted = pick(draw, several, names[:1], names[1:2], names[-1:])  # what has a gradient sent back
    cotangents = {n: case.source.normal(*case.shape, *([ids.shape[-1]] if n == "topk_logp" else [])) for n in names}
    if pick(draw, False, False, True) and case.shape:
        dead = case.source.chance(0.4, *case.shape)
        cotangents = {n: torch.where(along(dead, c), 0, c) for n, c in cotangents.items()}
    # the mean of the logits is a product of its own, which a row has a part in whatever is sent back
    more, bad = [n for n in extras if n != "is_top1"], torch.zeros_like(case.keep) if mean else case.poison(draw)

    def formula(t: Twin) -> tuple[list[Tensor], Tensor]:
        s = _scores(case, t, ids)
        total = finite_sum([getattr(s, n) for n in wanted], [cotangents[n] for n in wanted])
        return [*(getattr(s, n) for n in names), *(getattr(s, n) for n in more)], total

    with case.world():
        s = rk.linear_logp(
            case.hidden, case.head, case.target, topk_ids=ids, entropy=entropy, tail=tail, mean_logits=mean, extras=extras,
            mask=case.mask, keep=pick(draw, None, None, 300, "1MiB"),
        )  # fmt: skip
        assert s.extras is not None
        assert s.logp[bad].isnan().all() or case.hidden[bad].isinf().any()
        s = s._replace(**{n: torch.where(along(bad, x), 0, x) for n in names if (x := getattr(s, n)) is not None})
        s = s._replace(extras={n: torch.where(bad, 0, x) for n, x in s.extras.items()})
        total = finite_sum([getattr(s, n) for n in wanted], [cotangents[n] for n in wanted])
        hold(case, (*names, *more), [*(getattr(s, n) for n in names), *(s.extras[n] for n in more)], total, formula)
    if extras and case.kind == "grid" and case.options["logit_scale"] == 1:
        assert torch.equal(s.extras["is_top1"], _scores(case, twin(case), ids).is_top1)


def filtered(draw: Draw, case: Case) -> None:
    """filter_eps: outputs exact, gradients off by no more than is said of what they drop."""
    eps = pick(draw, 2.0**-14, 0.01, 0.3)
    a = case.source.normal(*case.shape)
    with case.world():
        whole, few = (rk.linear_logp(case.hidden, case.head, case.target, mask=case.mask, filter_eps=e) for e in (0.0, eps))
        assert torch.equal(whole.logp.detach(), few.logp.detach()) or bool(case.leaves)
        live = few.logp.isfinite()
        a = torch.where(live, a, 0).to(few.logp.dtype)
        if not case.leaves or not case.shape.numel():
            return
        exact = torch.autograd.grad(torch.where(live, whole.logp, 0).mul(a).sum(), case.leaves, allow_unused=True)
        found = torch.autograd.grad(torch.where(live, few.logp, 0).mul(a).sum(), case.leaves, allow_unused=True)
    t = twin(case)
    _, (moved,) = spread(lambda: [_scores(case, twin(case), None).logp], torch.finfo(few.logp.dtype).eps)
    agree(
        few.logp,
        _scores(case, t, None).logp.detach(),
        2 * moved + 2.0**-20 * (1 + t.z.nan_to_num(neginf=0).abs().max().item()),
        "logp",
    )
    assert few.extras is not None
    dropped = few.extras["dropped_mass"]
    assert ((dropped >= -1e-5) & (dropped <= 1 + 1e-4)).all()
    temperature = case.options["temperature"]
    factor = abs(case.options["logit_scale"]) / (
        case.clean(temperature, 1.0).min().item() if isinstance(temperature, Tensor) else temperature
    )
    weight = case.weight.detach()[: case.vocab].double()
    apart, coarse = torch.cdist(weight, weight).max().item(), max(torch.finfo(case.hidden.dtype).eps, 2.0**-18)
    reach = (weight.norm(dim=1).max().item() + apart) * 8
    for x, g, e in zip(case.leaves, found, exact, strict=True):
        off = (g.double() - e.double()).abs()
        if x is case.hidden:
            bound = factor * a.abs().double() * (dropped.double() * 2 * apart + coarse * reach)
            assert (off.norm(dim=-1) <= bound + coarse * e.double().norm(dim=-1) + 1e-7).all(), "d_hidden beyond dropped_mass"
        else:  # a column that is dropped has p ≤ eps everywhere
            h = case.clean(case.hidden.detach()).double().norm(dim=-1) if x is case.weight else torch.ones_like(a).double()
            assert (off <= factor * (a.abs().double() * h).sum() * (eps + 8 * coarse) + 1e-7).all(), "a kept column moved"


def topk(draw: Draw, case: Case) -> None:
    k = min(pick(draw, 1, 2, 7, 40, case.vocab), case.vocab)
    target, entropy = (case.target if pick(draw, False, True) else None), pick(draw, False, True)
    keep = case.keep if target is not None else torch.ones_like(case.keep) if case.mask is None else case.mask != 0
    case.keep = keep
    with case.world():
        got = rk.linear_topk(case.hidden, case.head, k, target=target, entropy=entropy, mask=case.mask)
    assert got.ids.dtype == torch.int32
    z = twin(case).z.detach()
    z = torch.where(keep.unsqueeze(-1), z, 0)
    ids = got.ids.long()
    inside = torch.zeros_like(z, dtype=torch.bool).scatter(-1, ids, True)
    live = keep & (z > -torch.inf).any(-1)
    assert (inside.sum(-1) == k)[live].all(), "an id twice"
    named = {"tail_logp": got.tail_logp, "lse": got.lse, "logp": got.logp}
    named |= {"entropy": got.entropy} if entropy else {}
    named |= {"target_logp": got.target_logp} if target is not None else {}

    def formula(t: Twin) -> tuple[list[Tensor], Tensor]:
        s = _scores(case, t, torch.where(keep.unsqueeze(-1), ids, -1))
        logp = torch.where(keep.unsqueeze(-1), s.topk_logp, 0)
        out = {"tail_logp": s.tail_logp, "lse": s.lse, "logp": logp, "entropy": s.entropy, "target_logp": s.logp}
        return [out[n] for n in named], t.z.sum()

    case.target = case.target if target is not None else torch.zeros_like(case.target)
    hold(case, tuple(named), list(named.values()), None, formula)
    assert (got.logp[..., 1:] <= got.logp[..., :-1]).all(), "not descending"
    order, best, _ = reference.topk(z, k)
    slack = 2.0**-18 * (1 + z.nan_to_num(neginf=0).abs().amax(-1, keepdim=True)) if z.numel() else 0
    assert (torch.where(live.unsqueeze(-1), best - got.logp.double(), 0).nan_to_num() <= slack).all(), "a larger logit is left out"
    if case.kind == "grid" and case.options["softcap"] is None and not isinstance(case.options["temperature"], Tensor):
        assert torch.equal(ids[live], order[live]), "ties go to the lower id"


def gather(draw: Draw, case: Case) -> None:
    case.keep = torch.ones_like(case.keep) if case.mask is None else case.mask != 0
    g = case.source.normal(*case.ids.shape)

    def formula(t: Twin) -> tuple[list[Tensor], Tensor]:
        ids = case.clean(case.ids, -1)
        out = torch.where(case.keep.unsqueeze(-1), reference.gather(t.z, ids), 0)
        return [out], finite_sum([out], [g])

    with case.world():
        out = rk.linear_gather(case.hidden, case.head, case.ids, mask=case.mask)
        hold(case, ("logits",), [out], finite_sum([out], [g]), formula)


def divergence(draw: Draw, case: Case, teachers: list[Case]) -> None:
    ambiguous = case.kind in ("grid", "flat") or any(0 in x.stride() for x in (case.weight, *(t.weight for t in teachers)))
    # where p and q, or two p, meet, these have a kink
    names = [n for n in DIVERGENCES if not (ambiguous and n in ("akl", "total_variation"))]
    name = pick(draw, *names)
    case.keep = torch.ones_like(case.keep) if case.mask is None else case.mask != 0
    for c in (case, *teachers):
        c.keep = case.keep
        c.forbid_nothing()  # infinite divergences have tests of their own
    kind = pick(draw, "floats", "tensors") if len(teachers) > 1 else pick(draw, "none", "tensors")
    source, shape = case.source, case.shape
    weights = {
        "none": None, "floats": [0.3, 0.0, 1.2][: len(teachers)], "tensors": [source.normal(*shape).abs() for _ in teachers],
    }[kind]  # fmt: skip
    scale, g = pick(draw, 1.0, 4.0), source.normal(*shape)
    fused = pick(draw, False, True)
    g = g.abs() if fused else g
    reduction = pick(draw, "token-mean", "seq-mean-token-mean", "seq-mean-token-sum") if len(shape) == 2 else "token-mean"
    denominator = pick(draw, None, 3.0)

    def formula(t: Twin) -> tuple[list[Tensor], Tensor]:
        lq = t.z.log_softmax(-1)
        value = torch.zeros_like(lq[..., 0])
        for i, c in enumerate(teachers):
            w = 1.0 if weights is None else weights[i]
            part = VALUES[name](lq, twin(c).z.detach().log_softmax(-1))
            value = value + (w.double() if isinstance(w, Tensor) else w) * part
        value = torch.where(case.keep, scale * value, 0)
        if not fused:
            return [value], (value * g).sum()
        value = value * g
        rows, keep = (value, case.keep) if len(shape) == 2 else (value.reshape(-1), case.keep.reshape(-1))
        loss = reduced(rows, keep, reduction, denominator=denominator)
        return [loss, value], loss

    args = (case.hidden, case.head, [t.hidden for t in teachers], [t.head for t in teachers], DIVERGENCES[name])
    with case.world():
        if fused:
            out = rk.linear_divergence_loss(
                *args, teacher_weights=weights, weights=g, scale=scale, mask=case.mask,
                reduction=rk.Reduction(reduction, denominator=denominator),
            )  # fmt: skip
            hold(case, (f"{name} loss", f"{name} token loss"), [out.loss, out.token_loss], out.loss, formula, teachers)
        else:
            value = rk.linear_divergence(*args, teacher_weights=weights, scale=scale, mask=case.mask)
            hold(case, (name,), [value], (value * g).sum(), formula, teachers)
