"""float16 gradients of a mean over 2^20 tokens: subnormal numbers, until a loss scale multiplies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.token_loss import Metrics
from tests.conftest import DEVICE, INTERPRET
from tests.sweeps import Problem, leaf, problem, relative

TOKENS, SCALE = 1 << 20, 65_536.0
MEAN = rk.Reduction("token-mean", denominator=TOKENS)
EPS16, TINY16 = 2.0**-11, 2.0**-14
# Triton has no float64; float32 is far from underflow here, and its error 1e-3 of what is allowed
EXACT = torch.float64 if DEVICE == "cpu" and not INTERPRET else torch.float32
Loss = Callable[[Problem, Tensor, float], Tensor]


def cross_entropy(p: Problem, other: Tensor, eps: float) -> Tensor:
    return rk.linear_loss(p.hidden, p.head, p.target, rk.losses.CrossEntropy(z_loss=1e-4), reduction=MEAN, filter_eps=eps).loss


def rlad(p: Problem, other: Tensor, eps: float) -> Tensor:
    logp = torch.linspace(-3, -1, 6).repeat(len(p.target), 1)
    teacher = rk.TopK(p.ids.int(), logp[:, 1:], None, logp[:, 0], logp[:, 2])
    old = torch.full_like(logp[:, 0], -2.0)
    loss = rk.losses.RLAD(clip=(0.9, 1e9), topk=rk.losses.TopKKL(normalize="tail"), topk_coef=0.5)
    given = {"old_logp": old, "advantages": old.new_ones(()).expand_as(old), "teacher": teacher}
    return rk.linear_loss(p.hidden, p.head, p.target, loss, reduction=MEAN, filter_eps=eps, **given).loss


@dataclass(frozen=True, kw_only=True)
class Own(rk.TokenLoss):
    needs = ("w",)
    reads = ("logp", "entropy")

    def tokens(self, scores: rk.TokenScores, *, w: Tensor) -> tuple[Tensor, Metrics]:
        return -w * scores.logp - 0.01 * scores.entropy, {}


def token_loss(p: Problem, other: Tensor, eps: float) -> Tensor:
    w = torch.ones_like(p.target)
    return rk.linear_loss(p.hidden, p.head, p.target, Own(), w=w, reduction=MEAN, filter_eps=eps).loss


class KL(rk.losses.Divergence):
    def values(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(1)


def divergence(chosen: rk.losses.Divergence) -> Loss:
    def loss(p: Problem, other: Tensor, eps: float) -> Tensor:
        head = rk.LMHead(p.weight.detach().roll(1, 0))
        return rk.linear_divergence_loss(p.hidden, p.head, other.to(p.hidden.dtype), head, chosen, reduction=MEAN).loss

    return loss


def gathered(p: Problem, other: Tensor, eps: float) -> Tensor:
    logp = torch.linspace(-3, -1, 5).repeat(len(p.target), 1)
    teacher = rk.TopK(p.ids.int(), logp)
    return rk.linear_loss(p.hidden, p.head, p.target, rk.losses.TopKKL(), teacher=teacher, reduction=MEAN).loss


def scores(p: Problem, other: Tensor, eps: float) -> Tensor:
    return -rk.linear_logp(p.hidden, p.head, p.target, filter_eps=eps).logp.sum() / TOKENS


def values(p: Problem, other: Tensor, eps: float) -> Tensor:
    head = rk.LMHead(p.weight.detach().roll(1, 0))
    return rk.linear_divergence(p.hidden, p.head, other.to(p.hidden.dtype), head, rk.losses.ForwardKL()).sum() / TOKENS


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy, "rlad": rlad, "token_loss": token_loss, "forward_kl": divergence(rk.losses.ForwardKL()),
    "own divergence": divergence(KL()), "topk_kl": gathered, "linear_logp": scores, "linear_divergence": values,
}  # fmt: skip
FILTERED = {"cross_entropy", "rlad", "token_loss", "linear_logp"}


def gradients(loss: Loss, dtype: torch.dtype, frozen: bool, eps: float, scale: float, compiled: bool = False) -> list[Tensor]:
    """Gradients of the loss times ``scale``, of one float16 problem computed in ``dtype``."""
    torch.manual_seed(0)
    p = problem(n=12, d=16, v=90, dtype=torch.float16)
    other = torch.randn(12, 16).half()
    p = Problem(*(leaf(x.to(dtype)) for x in p.leaves), p.target, p.ids)
    leaves = p.leaves[: 1 if frozen else 3]
    for x in p.leaves[len(leaves) :]:
        x.requires_grad_(False)
    call = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    scaler = torch.amp.GradScaler(p.hidden.device.type, init_scale=scale)
    scaler.scale(call(p, other, eps)).backward()
    return [x.grad for x in leaves]


CASES = [(name, frozen, eps) for name in LOSSES for frozen in (False, True) for eps in (0.0, 1e-9) if not eps or name in FILTERED]


COMPILED = [(name, False, 0.0, True) for name in ("cross_entropy", "rlad", "forward_kl")]  # whose ops finish gradients as well


@pytest.mark.parametrize(("name", "frozen", "eps", "compiled"), [*((*case, False) for case in CASES), *COMPILED])
def test_a_loss_scale_keeps_every_gradient(name: str, frozen: bool, eps: float, compiled: bool) -> None:
    exact = gradients(LOSSES[name], EXACT, frozen, 0.0, 1.0)
    got = gradients(LOSSES[name], torch.float16, frozen, eps, SCALE, compiled)
    for g, e in zip(got, exact, strict=True):
        assert g.dtype == torch.float16
        assert e.abs().max() < TINY16
        assert relative(g.double() / SCALE, e) <= 2 * EPS16  # rounded dlogits and a rounded sum


@pytest.mark.parametrize(("name", "frozen", "eps"), CASES)
def test_without_a_scale_float16_rounds_once(name: str, frozen: bool, eps: float) -> None:
    exact = gradients(LOSSES[name], EXACT, frozen, 0.0, 1.0)
    for g, e in zip(gradients(LOSSES[name], torch.float16, frozen, eps, 1.0), exact, strict=True):
        assert ((g - e).abs() <= 2.0**-25 + 4 * EPS16 * e.abs().max()).all()
