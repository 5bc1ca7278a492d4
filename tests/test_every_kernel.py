"""Every Triton kernel is launched through a public function: counted, and a kernel that is not fails."""

from __future__ import annotations

import pytest
import torch

import rlad_kernels as rk
from tests.sweeps import problem

pytestmark = pytest.mark.interpreted


def test_public_functions_launch_every_kernel() -> None:
    from rlad_kernels.backends.triton import KERNELS
    from rlad_kernels.backends.triton._launch import LAUNCHES

    LAUNCHES.clear()
    p, kl = problem(shape=(2, 3)), rk.losses.TopKKL()
    teacher = rk.linear_topk(p.hidden, p.head, 3, target=p.target)
    rlad = rk.losses.RLAD(topk=kl, topk_coef=0.4)
    given = {"old_logp": torch.zeros(2, 3), "advantages": torch.ones(2), "teacher": teacher}
    rk.linear_loss(p.hidden, p.head, p.target, rlad, **given).loss.backward()  # fold, dlogits, clipped ratio, top-K KL
    rk.linear_loss(p.hidden, p.head, p.target, kl, teacher=teacher).loss.backward()  # gather and its two gradients
    rk.linear_logp(p.hidden, p.head, p.target, filter_eps=1e-3)  # column statistics
    rk.linear_divergence(p.hidden, p.head, p.hidden, p.head, rk.losses.ForwardKL())
    assert set(LAUNCHES) == set(KERNELS)


def test_float64_raises_a_type_error() -> None:
    head = rk.LMHead(torch.randn(5, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="float64"):
        rk.linear_logp(torch.randn(2, 3, dtype=torch.float64), head, torch.tensor([0, 1]))
