"""VESPO and IW-OPD beside TRL's own code of them, the sampler's weights among it."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import IWOPD, VESPO, Rollout

pytest.importorskip("trl")
pytestmark = pytest.mark.cpu
B, T, V = 4, 6, 11


def batch() -> dict[str, Tensor]:
    logits = torch.randn(B, T, V)
    target = torch.randint(V, (B, T))
    logp = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    noise = 0.3 * torch.randn(2, B, T)
    mask = torch.arange(T) < torch.tensor([6, 3, 1, 5])[:, None]
    return {
        "logits": logits,
        "target": target,
        "old": logp + noise[0],
        "mu": logp + noise[1],
        "teacher": logp - noise[1],
        "mask": mask,
    }


def sampled(logits: Tensor, target: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]


@pytest.mark.parametrize("form", [None, "truncate", "mask"])
def test_vespo(form: str | None) -> None:
    from trl import GRPOTrainer

    x, a = batch(), torch.tensor([1.0, -0.5, 0.0, -2.0])
    logits, mask = x["logits"].requires_grad_(), x["mask"]
    logp, rest = sampled(logits, x["target"]), {"old_logp": x["old"], "advantages": a, "mask": mask}
    ratio = torch.where(mask, (x["old"] - x["mu"]).exp(), 1)
    ratio = ratio.clamp(max=1.2) if form == "truncate" else torch.where((ratio >= 0.8) & (ratio <= 1.2), ratio, 0)
    gap = logp.detach() - x["old"]
    phi = GRPOTrainer.get_gamma_weights(a[:, None], gap, mask, None if form is None else ratio)
    want = torch.where(mask, -phi * a[:, None] * logp, 0).sum() / mask.sum()
    bounds = Rollout("truncate", high=1.2) if form == "truncate" else Rollout("mask", 0.8, 1.2)
    given: dict[str, Any] = {} if form is None else {"rollout_logp": x["mu"]}
    got = VESPO(rollout=None if form is None else bounds)(logp, **rest, **given).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    slopes = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (got, want)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_iw_opd(gamma: float) -> None:
    """On the student's own samples, where −A·s and −r·A have one gradient."""
    iw_opd = pytest.importorskip("trl.experimental.iw_opd")
    x = batch()
    logits, mask = x["logits"].requires_grad_(), x["mask"]
    trainer = SimpleNamespace(temperature=1.0, iw_opd_gamma=gamma, iw_opd_epsilon=1e-8, model=SimpleNamespace(training=True))
    trainer._metrics = {"train": defaultdict(list)}
    labels = torch.where(mask, x["target"], -100)
    want = iw_opd.IWOPDTrainer._compute_iw_opd_loss(trainer, logits, x["target"], labels, x["teacher"])
    logp = sampled(logits, x["target"])
    out = IWOPD(gamma=gamma)(logp, old_logp=logp.detach(), teacher_logp=x["teacher"], mask=mask)
    mean = -out.token_loss.sum() / mask.sum()  # of A
    assert trainer._metrics["train"]["iw_opd/mean_advantage"] == pytest.approx([mean.item()], rel=1e-5)
    slopes = [torch.autograd.grad(loss, logits)[0] for loss in (out.loss, want)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)
    assert rk.METHODS["iw_opd"].loss == IWOPD()
