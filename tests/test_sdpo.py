"""SDPO: the whole divergence where the tail is one token, a weight without gradient, and nothing where the teacher agrees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import SDPO, TopKKL
from tests.methods.divergence import jsd, kl

N, V = 6, 9


def world(k: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits of the student, of its teacher, and what a call is given: the student's top-K."""
    z, t = 2 * torch.randn(N, V), 2 * torch.randn(N, V)
    eye = rk.LMHead(torch.eye(V))
    ids = rk.linear_topk(z, eye, k).ids
    y = torch.randint(V, (N,))
    old = z.log_softmax(1).gather(1, y[:, None])[:, 0]
    return z.requires_grad_(), t, {"target": y, "teacher": rk.linear_support(t, eye, ids), "old_logp": old}


@pytest.mark.parametrize(
    ("topk", "dense"),
    [
        (TopKKL("jsd", normalize="tail"), jsd),
        (TopKKL("jsd", normalize="tail", beta=0.1), lambda lq, lp: jsd(lq, lp, 0.1)),
        (TopKKL("forward", normalize="tail"), lambda lq, lp: kl(lp, lq)),
        (TopKKL("reverse", normalize="tail"), kl),
    ],
    ids=["half", "tenth", "forward", "reverse"],
)
def test_a_tail_of_one_token_leaves_nothing_out(topk: TopKKL, dense: Any) -> None:
    z, t, given = world(V - 1)
    out = rk.linear_loss(z, rk.LMHead(torch.eye(V)), loss=SDPO(topk=topk), **given)
    want = dense(z.double().log_softmax(1), t.double().log_softmax(1)).mean()
    assert torch.allclose(out.loss.double(), want, rtol=1e-5)
    got, exact = (torch.autograd.grad(x, z)[0] for x in (out.loss, want))
    assert torch.allclose(got, exact, atol=1e-6)


def test_the_weight_is_clipped_and_has_no_gradient() -> None:
    z, _, given = world(4)
    eye, old = rk.LMHead(torch.eye(V)), given.pop("old_logp")
    bare = rk.linear_loss(z, eye, loss=SDPO(ratio_clip=None), **given)
    slope = torch.autograd.grad(bare.loss, z)[0]
    for gap, weight in ((0.0, 1.0), (0.5, 2.718281828**0.5), (5.0, 2.0), (-3.0, 2.718281828**-3), (-90.0, 2.718281828**-20)):
        out = rk.linear_loss(z, eye, loss=SDPO(), old_logp=old - gap, **given)
        assert torch.allclose(out.token_loss, weight * bare.token_loss, rtol=1e-4)
        assert torch.allclose(torch.autograd.grad(out.loss, z)[0], weight * slope, rtol=1e-3, atol=1e-7)


def test_a_teacher_without_anything_to_add_moves_nothing() -> None:
    z, _, given = world(4)
    eye = rk.LMHead(torch.eye(V))
    given["teacher"] = rk.linear_support(z.detach(), eye, given["teacher"].ids)
    out = rk.linear_loss(z, eye, loss=SDPO(), **given)
    assert out.loss.abs() <= 1e-6
    assert torch.autograd.grad(out.loss, z)[0].abs().max() <= 1e-6


def test_message() -> None:
    z, _, given = world(4)
    del given["old_logp"]
    with pytest.raises(ValueError, match=r"^SDPO: old_logp is None, wanted a tensor in logp's shape"):
        rk.linear_loss(z, rk.LMHead(torch.eye(V)), loss=SDPO(), **given)


def test_what_is_impossible_stays_finite() -> None:
    """A slot without mass on one side, a teacher without a slot, and a token that the policy has since ruled out."""
    ids = torch.arange(3).expand(4, 3).int()
    lq = torch.tensor([[-torch.inf, -1.0, -1.0], [-1.0, -1.0, -2.0], [-1.0, -1.0, -2.0], [-1.0, -1.0, -2.0]]).requires_grad_()
    lp = torch.tensor([[-1.0, -1.0, -2.0], [-torch.inf, -1.0, -1.0], [torch.nan] * 3, [-1.0, -2.0, -2.0]])
    tail = torch.full((4,), -3.0)
    scores = rk.TokenScores(logp=torch.tensor([-1.0, -1.0, -1.0, -torch.inf]), topk_logp=lq, tail_logp=tail)
    teacher = rk.TopK(ids, lp, tail_logp=torch.tensor([-3.0, -3.0, -3.0, -torch.inf]))
    out = SDPO()(scores, old_logp=torch.full((4,), -1.0), teacher=teacher)
    assert out.token_loss.isfinite().all() and (out.token_loss[:2] > 0).all() and out.token_loss[2] == 0
    assert out.token_loss[3] < 1e-8
    assert torch.autograd.grad(out.loss, lq)[0].isfinite().all()


@pytest.mark.cpu
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_it_is_trls(alpha: float, tail: bool) -> None:
    peer = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    z, t, given = world(4)
    normalize = "tail" if tail else "both"
    ends = {0.0: "forward", 1.0: "reverse"}
    topk = TopKKL(ends[alpha], normalize=normalize) if alpha in ends else TopKKL("jsd", normalize=normalize, beta=alpha)
    given["old_logp"] = given["old_logp"] - torch.tensor([0.0, 0.3, 0.9, -0.4, 2.0, 0.1])
    out = rk.linear_loss(z, rk.LMHead(torch.eye(V)), loss=SDPO(topk=topk), **given)
    options = {"distillation_topk": 4, "distillation_alpha": alpha, "distillation_add_tail": tail}
    want = peer.compute_topk_self_distillation_loss(z, t, **options)
    s = z.log_softmax(1).gather(1, given["target"][:, None])[:, 0]
    want = peer.apply_importance_sampling_clipping(want, s, given["old_logp"], 2.0).mean()
    assert torch.allclose(out.loss, want, rtol=1e-5)
    got, exact = (torch.autograd.grad(x, z)[0] for x in (out.loss, want))
    assert torch.allclose(got, exact, atol=1e-6)
