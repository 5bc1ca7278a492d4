"""The inputs that every provider gets: the same tensors from the same seed, in every process."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

SUPPORT = 32


@dataclass
class Inputs:
    """Hidden states, head, targets, an advantage per sequence, and a teacher's top-K. Logits have a deviation of about 3."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,)
    advantage: Tensor  # (N,) constant over each sequence
    sequence: int  # tokens in a sequence
    ids: Tensor  # (N, SUPPORT)
    teacher_logp: Tensor  # (N, SUPPORT)

    @classmethod
    def make(cls, n: int, d: int, v: int, dtype: torch.dtype, device: str, peaked: bool = False, data: str | None = None) -> Inputs:
        """Random inputs; hidden, weight and target come from ``data``, a file of tensors under these names, if there is one."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator).mul_(scale)

        weight = normal(v, d, scale=(1 if peaked else 3) / d**0.5)
        hidden = _peaked(weight, n, generator) if peaked else normal(n, d)
        target = torch.randint(v, (n,), generator=generator, device=device)
        if data:
            real = torch.load(data, map_location=device)
            hidden, weight, target = real["hidden"][:n].to(dtype), real["weight"].to(dtype), real["target"][:n]
        sequence = max(1, min(256, n // 16))
        advantage = torch.empty(n // sequence, device=device).normal_(generator=generator).repeat_interleave(sequence)
        ids = (target[:, None] + 97 * torch.arange(SUPPORT, device=device)) % v
        teacher = torch.empty(n, SUPPORT, device=device).normal_(std=2, generator=generator).log_softmax(1)
        return cls(hidden.requires_grad_(), weight.requires_grad_(), target, advantage, sequence, ids, teacher)

    def to(self, dtype: torch.dtype) -> Inputs:
        twins = (x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight))
        reals = (x.to(torch.promote_types(dtype, torch.float32)) for x in (self.advantage, self.teacher_logp))
        hidden, weight, advantage, teacher = *twins, *reals
        twin = replace(self, hidden=hidden, weight=weight, advantage=advantage, teacher_logp=teacher)
        twin.old_logp = self.old_logp.to(teacher.dtype)  # given, as the advantages are: not of this dtype's logits
        return twin

    @cached_property
    def old_logp(self) -> Tensor:
        """Log-probs of the targets under the policy that sampled them: this one."""
        logits = (h @ self.weight.detach().T for h in self.hidden.detach().split(1024))
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        chosen = zip(logits, self.target[:, None].split(1024), strict=True)
        return torch.cat([x.to(wide).log_softmax(1).gather(1, t)[:, 0] for x, t in chosen])


def _peaked(weight: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Hidden states as a trained model has them: 16 likely tokens a row, drawn from a Zipf law, with logits 16, 14.6, 13.8, …"""
    v, device = weight.shape[0], weight.device
    uniform = torch.rand(n, 16, generator=generator, device=device)
    rank = (uniform * math.log(v)).exp().long().clamp(max=v - 1)
    logits = 16 - 2 * torch.arange(1, 17, device=device).log()
    rows = weight[rank].float()
    return torch.einsum("k,nkd->nd", logits, rows).to(weight.dtype)
