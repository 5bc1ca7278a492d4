"""Prints peak bytes of loss paths above their inputs, as JSON: ``python -m tests.peaks "[[path, n, d, v, dtype, k, keep], …]"``."""

from __future__ import annotations

import ctypes
import json
import sys

import torch

import rlad_kernels as rk
from bench.providers.ours import PolicyGradient
from bench.worker import Peak


def step(path: str, n: int, d: int, v: int, dtype: str, k: int, keep: int) -> int:
    """One forward and backward; returns the most that was held above the inputs."""
    hidden = torch.randn(n, d).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(v, d) * d**-0.5).to(hidden.dtype).requires_grad_()
    target, advantage = torch.randint(v, (n,)), torch.randn(n)
    ids, logp = (target[:, None] + 97 * torch.arange(k)) % v, torch.randn(n, k).log_softmax(1)
    head = rk.LMHead(weight)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    peak = Peak("cpu")
    if path == "naive":
        out = -((hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0] * advantage).mean()
    elif path == "linear_logp":
        out = -(rk.linear_logp(hidden, head, target, keep=keep).logp * advantage).mean()
    elif path == "linear_loss":
        out = rk.linear_loss(hidden, head, target, PolicyGradient(), advantages=advantage).loss
    elif path == "topk_kl":
        out = rk.linear_loss(hidden, head, target, rk.losses.TopKKL(normalize="both"), teacher=rk.TopK(ids, logp)).loss
    else:
        rk.linear_topk(hidden, head, k, target=target)
        return peak.bytes()
    out.backward()
    return peak.bytes()


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    for path, _, d, _, dtype, k, _ in cases:  # threads and code pages are not part of a peak
        step(path, 64, d, 512, dtype, min(k, 8), 0)
    print(json.dumps([step(*case) for case in cases]))
