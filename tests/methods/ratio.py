"""Inputs and float64 oracles of the ratio family."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.losses import Rollout
from tests.oracles import kl_estimate, reduced, straight_through, surrogate

Inputs = dict[str, Any]
LENGTH = 7
GROUPS = [5, 5, 2, 2]  # of the four sequences; the third is masked


def inputs(needs: tuple[str, ...]) -> tuple[list[str], Inputs]:
    """The arguments that receive gradient, and all arguments, float32: 4 sequences of 7 tokens, one of them fully masked."""
    b, t = 4, LENGTH
    logp = -torch.rand(b, t) * 3 - 0.01
    pool = {
        "old_logp": logp + 0.3 * torch.randn(b, t),
        "teacher_logp": logp + 0.6 * torch.randn(b, t),
        "ref_logp": logp + 0.3 * torch.randn(b, t),
        "advantages": torch.randn(b, t),
        "base_logp": logp + 0.5 * torch.randn(b, t),
        "rollout_logp": logp + 0.8 * torch.randn(b, t),
        "correct": torch.tensor([True, False, True, False]),
        "group_ids": torch.tensor(GROUPS),
    }
    mask = torch.rand(b, t) > 0.2
    mask[2] = False
    return ["logp"], {"logp": logp, "mask": mask, **{k: pool[k] for k in needs}}


def grpo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return reduced(surrogate(logp, old_logp, advantages), mask, "seq-mean-token-mean")


def bnpo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return surrogate(logp, old_logp, advantages)[mask].mean()


def dr_grpo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, denominator: float) -> Tensor:
    return surrogate(logp, old_logp, advantages)[mask].sum() / denominator


def dapo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return surrogate(logp, old_logp, advantages, clip=(0.2, 0.28))[mask].mean()


def tis(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, rollout_logp: Tensor) -> Tensor:
    weight = (old_logp - rollout_logp).exp().clamp(max=2)
    return (weight * surrogate(logp, old_logp, advantages))[mask].mean()


def icepop(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, rollout_logp: Tensor) -> Tensor:
    x = (old_logp - rollout_logp).exp()
    return reduced(x * ((x >= 0.5) & (x <= 5)) * surrogate(logp, old_logp, advantages), mask, "seq-mean-token-mean")


def sequence_weight(old_logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    """Π π_old/μ over each sequence's kept tokens, at each of its tokens."""
    rows = [(o - m)[k].sum().exp() for o, m, k in zip(old_logp, rollout_logp, mask, strict=True)]
    return torch.stack(rows)[:, None].expand_as(old_logp)


def seq_tis(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, rollout_logp: Tensor) -> Tensor:
    weight = sequence_weight(old_logp, rollout_logp, mask).clamp(max=2)
    return (weight * surrogate(logp, old_logp, advantages))[mask].mean()


def seq_mis(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, rollout_logp: Tensor) -> Tensor:
    x = sequence_weight(old_logp, rollout_logp, mask)
    return torch.where((x >= 0.5) & (x <= 2), x * surrogate(logp, old_logp, advantages), 0)[mask].mean()


def geo_rs(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, rollout_logp: Tensor, rollout: Any) -> Tensor:
    x = (sequence_weight(old_logp, rollout_logp, mask).log() / mask.sum(1, keepdim=True).clamp(min=1)).exp()
    return torch.where((x >= rollout.low) & (x <= rollout.high), surrogate(logp, old_logp, advantages), 0)[mask].mean()


def reinforce(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return reduced(-advantages * logp, mask, "seq-mean-token-sum")


def sequence_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """log r_i of each sequence, at each of its tokens."""
    means = [(s - o)[m].mean() if m.any() else s.sum() * 0 for s, o, m in zip(logp, old_logp, mask, strict=True)]
    return torch.stack(means)[:, None].expand_as(logp)


def gspo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    log_r = sequence_ratio(logp, old_logp, mask)
    return reduced(surrogate(log_r, log_r * 0, advantages, clip=(3e-4, 4e-4)), mask, "seq-mean-token-mean")


def gspo_token(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    value = sequence_ratio(logp, old_logp, mask)
    log_r = straight_through(logp, value, torch.ones_like(value))
    return reduced(surrogate(log_r, log_r * 0, advantages, clip=(3e-4, 4e-4)), mask, "seq-mean-token-mean")


def luspo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Each sequence's GSPO loss times its length, mean over the sequences."""
    log_r = sequence_ratio(logp, old_logp, mask)
    token = surrogate(log_r, log_r * 0, advantages, clip=(2e-3, 2.5e-3))
    losses = [token[i][kept].mean() * kept.sum() for i, kept in enumerate(mask) if kept.any()]
    return torch.stack(losses).mean()


def vespo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    gap = (logp.detach() - old_logp).clamp(-20, 20)
    w = sequence_weight(gap, torch.zeros_like(gap), mask).clamp(1e-8, math.exp(20))
    phi = torch.where(advantages >= 0, w**2 * (3 * (1 - w)).exp(), w**3 * (2 * (1 - w)).exp())
    return (-phi * advantages * logp)[mask].mean()


def gmpo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    x = logp - old_logp
    sides = torch.where(advantages > 0, x.clamp(max=0.4), torch.where(advantages < 0, x.clamp(min=-0.4), 0))
    r = sequence_ratio(sides, torch.zeros_like(sides), mask).exp()
    return reduced(-advantages * r, mask, "seq-mean-token-mean")


def pspo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    smoothed = 0.9 * (logp - old_logp).exp() + 0.1
    return reduced(-smoothed * advantages, mask, "seq-mean-token-mean")


def covariance(logp: Tensor, advantages: Tensor, mask: Tensor) -> tuple[list[int], Tensor]:
    """The kept tokens' places, and cov of each token."""
    s, a = logp.detach(), advantages
    return [i for i, kept in enumerate(mask.flatten().tolist()) if kept], ((s - s[mask].mean()) * (a - a[mask].mean())).flatten()


def clip_cov(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, fraction: float, bounds: tuple[float, float]
) -> Tensor:
    kept, cov = covariance(logp, advantages, mask)
    r, a = (logp - old_logp).flatten().exp(), advantages.flatten()
    free = [i for i in kept if not (a[i] > 0 and r[i] > 1.2) and not (a[i] < 0 and r[i] < 0.8)]
    able = [i for i in free if bounds[0] < cov[i] < bounds[1]]
    wanted = min(max(int(fraction * len(kept)), 1), len(able))
    taken = [i for j, i in enumerate(able) if (j + 1) * wanted // len(able) > j * wanted // len(able)]
    assert len(taken) == wanted
    live = torch.tensor([i not in taken for i in range(cov.numel())]).view_as(mask)
    return torch.where(live, surrogate(logp, old_logp, advantages), 0)[mask].mean()


def kl_cov(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, fraction: float, coef: float) -> Tensor:
    kept, cov = covariance(logp, advantages, mask)
    held = sorted(kept, key=lambda i: -cov[i].item())[: max(int(fraction * len(kept)), 1)]
    where = torch.tensor([i in held for i in range(cov.numel())]).view_as(mask)
    token = -(logp - old_logp).exp() * advantages + torch.where(where, coef * (logp - old_logp).abs(), 0)
    return token[mask].mean()


def cispo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    weight = (logp - old_logp).exp().clamp(0, 5).detach()
    return (-weight * advantages * logp)[mask].mean()


def dppo_tv(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    moved = logp.detach().exp() - old_logp.exp()
    inside = torch.where(advantages > 0, moved <= 0.15, moved >= -0.15)
    return torch.where(inside, -(logp.detach() - old_logp).exp() * advantages * logp, 0)[mask].mean()


def dppo_kl(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    s = logp.detach()
    p, old = s.exp(), old_logp.exp()
    kl = old * (old_logp - s) + (1 - old) * ((1 - old) / (1 - p)).log()
    inside = (kl <= 0.05) | torch.where(advantages > 0, p <= old, p >= old)
    return torch.where(inside, -(s - old_logp).exp() * advantages * logp, 0)[mask].mean()


def sapo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    tau = torch.where(advantages > 0, torch.ones_like(logp), 1.05)  # two numbers alone would be float32
    gate = 4 / tau / (1 + torch.exp(-tau * ((logp - old_logp).exp() - 1)))
    return reduced(-gate * advantages, mask, "seq-mean-token-mean")


def trrd(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return reduced(surrogate(logp, old_logp, advantages, teacher_logp, alpha=0.5), mask, "seq-mean-token-mean")


def opd(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, mask: Tensor) -> Tensor:
    return (-(logp - old_logp).exp() * (teacher_logp - old_logp))[mask].mean()


def opd_clipped(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, mask: Tensor, gamma: float) -> Tensor:
    reward = torch.where(mask, teacher_logp - old_logp, 0)
    total = [sum((gamma**j * reward[:, i + j] for j in range(1, LENGTH - i)), reward[:, i]) for i in range(LENGTH)]
    return surrogate(logp, old_logp, torch.stack(total, 1).clamp(-5, 5), dual=3.0)[mask].mean()


def exopd(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, base_logp: Tensor, mask: Tensor) -> Tensor:
    reward = -((old_logp - base_logp) - 1.25 * (teacher_logp - base_logp))
    return surrogate(logp, old_logp, reward, dual=3.0)[mask].mean()


def iw_opd(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, mask: Tensor) -> Tensor:
    a = torch.where(mask, teacher_logp - old_logp, 0)
    before = a.abs() @ torch.ones(LENGTH, LENGTH, dtype=a.dtype).triu(1)
    weight = 1 + 0.5 * (1 - before / a.abs().sum(1, keepdim=True).clamp(min=1e-8))
    return surrogate(logp, old_logp, weight * a, dual=3.0)[mask].mean()


def power_opd(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, mask: Tensor) -> Tensor:
    a = teacher_logp.exp() ** 0.1 - old_logp.exp() ** 0.1
    return (-(logp - old_logp).exp() * a)[mask].mean()


def proximal_reward(old_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return (0.2 * (teacher_logp - old_logp).exp() + 0.8).log()


def topd(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
    reward, returns = proximal_reward(old_logp, teacher_logp), torch.zeros_like(logp)
    for row, kept in enumerate(mask):
        places = kept.nonzero().flatten().tolist()
        for i, t in enumerate(places):
            later = places[i + 1 :]
            returns[row, t] = reward[row, t] + (reward[row, later].mean() if later else 0)
    a = torch.zeros_like(logp)
    for group in group_ids.unique():
        here = (group_ids == group)[:, None] & mask
        if int(here.sum()) > 1:
            centred = returns[here] - returns[here].mean()
            a[here] = centred / (centred.square().sum() / (int(here.sum()) - 1)).sqrt().clamp(min=1e-6)
    return surrogate(logp, old_logp, a)[mask].mean()


def nemo_rl_tropd(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, mask: Tensor) -> Tensor:
    return (-(logp - old_logp).exp() * proximal_reward(old_logp, teacher_logp))[mask].mean()


def mopd(logp: Tensor, rollout_logp: Tensor, teacher_logp: Tensor, mask: Tensor) -> Tensor:
    s = logp.detach()
    x = (s - rollout_logp).exp()
    token = -x * ((x >= 0.5) & (x <= 5)) * (teacher_logp - s) * logp
    return reduced(token, mask, "seq-mean-token-mean")


def sdpo_sampled(logp: Tensor, rollout_logp: Tensor, teacher_logp: Tensor, mask: Tensor) -> Tensor:
    """lasgroup/SDPO's: log_ratio.detach()·s, times the ratio to the policy that sampled, at most 2."""
    weight = (logp - rollout_logp).exp().clamp(max=2).detach()
    return (weight * (logp - teacher_logp).detach() * logp)[mask].mean()


def kdrl(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor, taught: Any = 1.0) -> Tensor:
    token = -(logp - old_logp).exp() * advantages + 2e-3 * (taught * kl_estimate(logp, teacher_logp, "k2"))
    return token[mask].mean()


def kdrl_in_reward(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return (-(logp - old_logp).exp() * (advantages + 2e-3 * (teacher_logp - logp.detach())))[mask].mean()


def kdrl_wrong(*, correct: Tensor, **given: Tensor) -> Tensor:
    return kdrl(**given, taught=~correct[:, None])


def all_wrong(correct: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
    """Per sequence: no right sequence with a kept token in its group."""
    right = {int(g) for g, c, m in zip(group_ids, correct, mask, strict=True) if c and m.any()}
    return torch.tensor([int(g) not in right for g in group_ids])[:, None]


def kdrl_wrong_groups(*, correct: Tensor, group_ids: Tensor, **given: Tensor) -> Tensor:
    return kdrl(**given, taught=all_wrong(correct, group_ids, given["mask"]))


def srpo(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, correct: Tensor, mask: Tensor) -> Tensor:
    c = correct[:, None].to(logp.dtype)
    return surrogate(logp, old_logp, c * advantages + (1 - c) * (teacher_logp - logp.detach()))[mask].mean()


def hdpo(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, correct: Tensor, group_ids: Tensor, mask: Tensor
) -> Tensor:
    wrong = all_wrong(correct, group_ids, mask)
    return surrogate(logp, old_logp, advantages + wrong * (teacher_logp - logp.detach()))[mask].mean()


def rlsd(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    weight = ((teacher_logp - logp.detach()).exp() ** advantages.sign()).clamp(0.8, 1.2)
    return surrogate(logp, old_logp, weight * advantages)[mask].mean()


def sdar(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    gate = 1 / (1 + torch.exp(-5 * (teacher_logp - logp.detach())))
    return (surrogate(logp, old_logp, advantages) + 0.01 * gate * (teacher_logp - logp))[mask].mean()


GEO_RS = Rollout("reject", 0.7, 1.4, level="geometric")  # wide enough for random policies
OPTIONS: dict[str, Inputs] = {
    "dr_grpo": {"denominator": 4 * 16.0}, "opd_clipped": {"gamma": 0.9}, "geo_rs": {"rollout": GEO_RS},
    "clip_cov": {"fraction": 0.2, "bounds": (0.05, 5.0)}, "kl_cov": {"fraction": 0.2, "coef": 0.5},
}  # fmt: skip
ORACLES = {
    "grpo": grpo, "dr_grpo": dr_grpo, "dapo": dapo, "bnpo": bnpo, "tis": tis, "icepop": icepop, "gspo": gspo, "gspo_token":
    gspo_token, "cispo": cispo, "sapo": sapo, "trrd": trrd, "opd": opd, "opd_clipped": opd_clipped, "exopd": exopd, "mopd":
    mopd, "kdrl": kdrl, "kdrl_in_reward": kdrl_in_reward, "kdrl_wrong": kdrl_wrong, "kdrl_wrong_groups": kdrl_wrong_groups,
    "srpo": srpo, "hdpo": hdpo, "rlsd": rlsd, "sdar": sdar, "seq_tis": seq_tis, "seq_mis": seq_mis, "geo_rs": geo_rs,
    "reinforce": reinforce, "luspo": luspo, "vespo": vespo, "dppo_tv": dppo_tv, "dppo_kl": dppo_kl, "gmpo": gmpo, "pspo": pspo,
    "clip_cov": clip_cov, "kl_cov": kl_cov, "topd": topd, "nemo_rl_tropd": nemo_rl_tropd, "iw_opd": iw_opd, "power_opd": power_opd,
    "sdpo_sampled": sdpo_sampled,
}  # fmt: skip
