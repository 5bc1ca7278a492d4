"""linear_loss with any row of METHODS, and with GRPO and TRRD of any options, against the formulas of the papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.backends import reference
from rlad_kernels.core.reduction import REDUCTIONS
from rlad_kernels.losses.ratio.kl import KL_ESTIMATORS
from tests.fuzz.draws import Case, pick
from tests.fuzz.exact import Twin, hold, twin
from tests.methods import FAMILIES
from tests.oracles import kl_estimate, reduced, surrogate

Draw = Callable[..., Any]
# whose inputs are drawn here; the others need supports or spans that are made for them
ROWS = sorted(n for n, m in rk.METHODS.items() if m.family in ("ratio", "top-k") and n not in ("dac_kl", "dac_kl_span"))
WHOLE = {"opd_clipped", "iw_opd"}  # whose oracles are written for sequences of 7
FIXED = (4, 7)


def _pool(case: Case, teacher: rk.TopK | None) -> dict[str, Any]:
    """A tensor for every name that a method may want, near the policy's own log-probs; in the rows that do not count, NaN."""
    s, shape = reference.token_scores(twin(case).z.detach(), case.clean(case.target), None, case.keep).logp.float(), case.shape

    def near(far: float) -> Tensor:
        return (s + far * case.source.normal(*shape)).clamp_max(-1e-3)

    pool: dict[str, Any] = {
        "old_logp": near(0.3), "ref_logp": near(0.3), "rollout_logp": near(0.8), "base_logp": near(0.5), "teacher_logp": near(0.6),
        "advantages": case.source.normal(*shape), "weights": case.source.normal(*shape).abs(),
    }  # fmt: skip
    if len(shape) == 2:
        pool["correct"] = case.source.chance(0.5, shape[0])
        pool["group_ids"] = torch.arange(shape[0]) // 2
    if teacher is not None:
        pool["teacher"] = teacher
        lq = reference.token_scores(twin(case).z.detach(), case.clean(case.target), teacher.ids, case.keep).topk_logp.float()
        pool["old_topk_logp"] = lq.clamp_min(-50) + 0.2 * case.source.normal(*lq.shape)
    return pool


def _teacher(draw: Draw, case: Case, sampled: bool) -> rk.TopK:
    """A teacher's top-K of other logits, with an empty slot and a slot twice."""
    lp = (2 * case.source.normal(*case.shape, case.vocab)).log_softmax(-1)
    target = case.clean(case.target).long()
    k = min(4, case.vocab)
    ids = lp.topk(k).indices
    if k > 2 and pick(draw, False, True) and ids.numel():
        ids[..., 0, 1] = -1
        ids[..., -1, 2] = ids[..., -1, 0]
    inside = torch.zeros(*lp.shape[:-1], lp.shape[-1] + 1, dtype=torch.bool)
    inside = inside.scatter(-1, torch.where(ids < 0, lp.shape[-1], ids), True)[..., :-1]
    teacher = rk.TopK(
        ids.int(), lp.gather(-1, ids.clamp_min(0)), tail_logp=torch.where(inside, -torch.inf, lp).logsumexp(-1),
        target_logp=lp.gather(-1, target.unsqueeze(-1)).squeeze(-1), entropy=-(lp.exp() * lp).sum(-1),
    )  # fmt: skip
    return rk.supports.with_sampled(teacher, target) if sampled else teacher


def _given(case: Case, pool: dict[str, Any], names: tuple[str, ...], rubbish: bool) -> dict[str, Any]:
    """The named tensors, with NaN wherever the mask says that nobody looks."""

    def spoiled(x: Any) -> Any:
        whole = isinstance(x, Tensor) and x.is_floating_point() and x.shape[: len(case.shape)] == case.shape
        return case.spoiled(x) if whole and rubbish else x

    return {k: rk.TopK._make(spoiled(v) for v in x) if isinstance(x := pool[k], rk.TopK) else spoiled(x) for k in names}


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def method(draw: Draw, case: Case) -> str:
    """A row of METHODS on tokens ``(B, T)``, with the reduction that is its own."""
    case.forbid_nothing()
    wide = case.shape == FIXED and case.vocab > 6
    rows = [n for n in ROWS if wide or (rk.METHODS[n].family == "ratio" and (n not in WHOLE or case.shape == FIXED))]
    name = pick(draw, *rows)
    row, oracle = rk.METHODS[name], FAMILIES[rk.METHODS[name].family].ORACLES[name]
    loss, options = row.loss, dict(getattr(FAMILIES[row.family], "OPTIONS", {}).get(name, {}))
    assert isinstance(loss, rk.TokenLoss)
    denominator = options.get("denominator")
    set_here = {f.name: options[f.name] for f in fields(loss) if f.name in options}
    loss = replace(loss, **set_here)
    teacher = _teacher(draw, case, sampled=name == "lsm_sampled") if row.family == "top-k" else None
    pool = _pool(case, teacher)
    names = tuple(n for n in row.needs if n in pool)
    reads = set(oracle_arguments(oracle)) & {"logp", "topk_logp", "tail_logp", "entropy"} or {"logp"}  # or only **given

    def formula(t: Twin) -> tuple[list[Tensor], Tensor]:
        s = reference.token_scores(t.z, case.clean(case.target), None if teacher is None else teacher.ids, case.keep)
        exact = {
            k: _double(v) if not isinstance(v, rk.TopK) else rk.TopK._make(map(_double, v)) for k, v in pool.items() if k in names
        }
        exact |= {k: getattr(s, k) for k in reads} | options
        exact |= {"target": case.clean(case.target)} if "target" in oracle_arguments(oracle) else {}
        value = oracle(**exact, mask=case.keep) if case.keep.any() else t.z.sum() * 0
        return [value], value

    with case.world():
        out = rk.linear_loss(
            case.hidden, case.head, case.target, loss, mask=case.mask,
            reduction=rk.Reduction(denominator=denominator) if denominator else None,
            **_given(case, pool, names, pick(draw, False, True)),
        )  # fmt: skip
        assert (out.token_loss[~case.keep] == 0).all()
        hold(case, (name,), [out.loss], out.loss, formula)
    return name


def oracle_arguments(oracle: Any) -> tuple[str, ...]:
    inner = getattr(oracle, "func", oracle)
    return inner.__code__.co_varnames[: inner.__code__.co_argcount + inner.__code__.co_kwonlyargcount]


def options(draw: Draw, case: Case) -> str:
    """GRPO and TRRD with drawn options and reductions, packed and in sequences."""
    case.forbid_nothing()
    packed = len(case.shape) == 1
    seq_ids = case.source.integers(0, 3, *case.shape).sort().values if packed else None
    kind = pick(draw, *REDUCTIONS) if len(case.shape) in (1, 2) else "token-mean"
    denominator = pick(draw, None, None, 5.0)
    clip, dual = pick(draw, (0.2, 0.28), (0.0, 0.5), (0.9, 3.0)), pick(draw, None, 2.0)
    coef, estimator = pick(draw, 0.0, 0.3), pick(draw, *(e for e in KL_ESTIMATORS if e != "k1"))
    reference_kl = rk.losses.Reference(coef, estimator) if coef else rk.losses.GRPO().reference
    alpha, clamp = pick(draw, 0.5, 0.0, 1.0), pick(draw, None, 0.2)
    taught = pick(draw, False, True)
    loss: rk.TokenLoss = rk.losses.GRPO(clip=clip, dual_clip=dual, reference=reference_kl)
    if taught:
        loss = rk.losses.TRRD(alpha=alpha, clip=clip, dual_clip=dual, reference=reference_kl, teacher_clamp=clamp)
    pool = _pool(case, None)
    names = (*loss.needs, *(["ref_logp"] if coef else []))

    def formula(t: Twin) -> tuple[list[Tensor], Tensor]:
        s = reference.token_scores(t.z, case.clean(case.target), None, case.keep).logp
        o, a = pool["old_logp"].double(), pool["advantages"].double()
        its = pool["teacher_logp"].double() if taught else None
        if taught and clamp is not None:  # where the clamp binds the gradient is α
            gap = (s - its).detach()
            log_r = alpha * (s - o) + (1 - alpha) * gap.clamp(-clamp, clamp)
            slope = torch.where(gap.abs() > clamp, alpha, 1.0)
            token = surrogate(log_r.detach() + slope * (s - s.detach()), torch.zeros_like(s), a, clip=clip, dual=dual)
        else:
            token = surrogate(s, o, a, its, alpha=alpha, clip=clip, dual=dual)
        token = token + (coef * kl_estimate(s, pool["ref_logp"].double(), estimator) if coef else 0)
        token = torch.where(case.keep, token, 0)
        rows, keep = (token, case.keep) if token.dim() in (1, 2) else (token.reshape(-1), case.keep.reshape(-1))
        total = reduced(rows, keep, kind, seq_ids if packed and kind != "token-mean" else None, denominator)
        return [total, token], total

    reduction = rk.Reduction(kind, seq_ids if packed and kind != "token-mean" else None, denominator)
    with case.world():
        out = rk.linear_loss(
            case.hidden, case.head, case.target, loss, mask=case.mask, reduction=reduction,
            **_given(case, pool, names, pick(draw, False, True)),
        )  # fmt: skip
        hold(case, ("loss", "token loss"), [out.loss, out.token_loss], out.loss, formula)
    return loss.name
