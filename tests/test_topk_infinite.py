"""Truncated KLs between log-probs of which some are −∞: the value may be inf, nothing is NaN."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses.support.terms import DIRECTIONS, NORMALIZE
from tests.conftest import INTERPRET
from tests.test_topk_kl_loss import kl

CLAMPS = ({},) if INTERPRET else ({}, {"log_ratio_clamp": 2.0}, {"logp_floor": -10.0}, {"loss_max": 5.0})
HOLES = [(False,) * 3, (True, False, False), (True,) * 3] if INTERPRET else [*product((False, True), repeat=3)]
CASES = [
    (direction, normalize, clamps)
    for direction, normalize, clamps in product(DIRECTIONS, NORMALIZE, CLAMPS)
    if not (direction == "jsd" and (normalize == "teacher" or "log_ratio_clamp" in clamps))  # these raise
    and not (normalize == "both" and "logp_floor" in clamps)
]


def rows() -> tuple[Tensor, Tensor]:
    """Log-probs (N, 3) of student and teacher: every two choices of slots at −∞."""
    base, holes = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor(HOLES)
    q, p = (torch.where(holes, -torch.inf, x) for x in (base, base.flip(0)))
    return q.repeat_interleave(len(HOLES), 0), p.repeat(len(HOLES), 1)


@pytest.mark.parametrize("direction, normalize, clamps", CASES, ids=[f"{d}-{n}-{'-'.join(c)}" for d, n, c in CASES])
def test_no_gradient_is_nan(direction: str, normalize: str, clamps: dict[str, float]) -> None:
    lq, lp = rows()
    teacher_in = lp > -torch.inf
    tails = (None, -2.0, -torch.inf) if normalize == "tail" else (None,)
    for own, theirs, gradient in product(tails, (-2.0, -torch.inf), ("kill", "pass") if clamps else ("kill",)):
        leaf = lq.clone().requires_grad_()
        leaves = [leaf] if own is None else [leaf, torch.full((len(lq),), own).requires_grad_()]
        teacher = rk.TopK(ids=torch.arange(3).expand_as(lq), logp=lp, tail_logp=torch.full((len(lq),), theirs))
        own_tail = None if own is None else leaves[1]
        options = {"direction": direction, "normalize": normalize, "clamp_gradient": gradient, **clamps}
        out = kl(leaf, teacher, tail_logp=own_tail, **options)
        assert not out.token_loss.isnan().any()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.loss, leaves))
        if not clamps:
            forgotten = (teacher_in & (lq == -torch.inf)).any(1)
            if own == -torch.inf and theirs == -2.0:
                forgotten |= teacher_in.any(1)
            assert torch.equal(out.token_loss.isposinf(), forgotten & (direction in ("forward", "mixed")))
