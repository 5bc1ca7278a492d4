"""Supports against sets built by hand, their tails against the sum over what lies outside, and what only one support can know."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels import supports
from tests.oracles import gradient, hold
from tests.test_topk_kl_loss import kl, linear_kl

N, V, K = 16, 13, 4
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def world() -> tuple[Tensor, rk.LMHead, rk.TopK, rk.TopK, Tensor]:
    """Teacher log-probs of the whole vocabulary, its head, its top-K, its values at the student's top-K, sampled tokens."""
    head = rk.LMHead(torch.eye(V))
    t, z = 2 * torch.randn(2, N, V)
    target = torch.randint(V, (N,))
    teacher = rk.linear_topk(t, head, K, target=target, entropy=True)
    student = rk.linear_support(t, head, rk.linear_topk(t + z, head, K + 1).ids, target=target)
    return t.double().log_softmax(1), head, teacher, student, target


def sets(ids: Tensor) -> list[set[int]]:
    return [set(row) - {-1} for row in ids.tolist()]


def check(support: rk.TopK, lp: Tensor, want: list[set[int]], tail: float = 1e-6) -> None:
    """The ids, each once, the teacher's log-probs at them, and the log-mass of the others."""
    assert sets(support.ids) == want
    assert ((support.ids >= 0).sum(1) == torch.tensor([len(x) for x in want])).all()
    real = support.ids >= 0
    at = lp.gather(1, support.ids.long().clamp_min(0))
    assert (support.logp - at)[real].abs().max() < 2e-6
    assert (support.logp[~real] == -math.inf).all()
    outside = torch.tensor([[v not in row for v in range(V)] for row in want])
    mass = torch.where(outside, lp.exp(), 0).sum(1)
    assert ((support.tail_logp.double().exp() - mass).abs() / mass).max() < tail


def test_the_teacher_at_the_students_ids(world):
    lp, _, _, student, target = world
    check(student, lp, sets(student.ids))
    assert torch.allclose(student.target_logp.double(), lp.gather(1, target[:, None])[:, 0], atol=1e-6)
    assert not student.logp.requires_grad


def test_union_intersection_and_symmetric_difference(world):
    lp, head, teacher, student, _ = world
    a, b = sets(teacher.ids), sets(student.ids)
    both = supports.union(teacher, student)
    check(both, lp, [x | y for x, y in zip(a, b, strict=True)], 1e-4)  # a difference of float32 masses
    check(rk.linear_support(lp.float(), head, both.ids), lp, sets(both.ids))
    check(supports.intersection(teacher, student.ids), lp, [x & y for x, y in zip(a, b, strict=True)])
    check(supports.symmetric_difference(teacher, student), lp, [x ^ y for x, y in zip(a, b, strict=True)], 1e-4)
    assert torch.equal(both.target_logp, teacher.target_logp)
    assert torch.equal(both.entropy, teacher.entropy)
    same = supports.union(teacher, teacher)
    assert torch.equal(same.ids[:, :K], teacher.ids)
    assert torch.equal(same.tail_logp, teacher.tail_logp)


def test_a_support_of_everything_leaves_no_tail(world):
    lp, head, teacher, _, _ = world
    rest = rk.linear_support(lp.float(), head, torch.arange(V).expand(N, V))
    assert (supports.union(teacher, rest).tail_logp == -math.inf).all()


def test_with_sampled_adds_the_token_once_and_takes_it_from_the_tail(world):
    lp, _, teacher, _, target = world
    target[0], target[1] = teacher.ids[0, 2], -100
    teacher = teacher._replace(target_logp=lp.gather(1, target.clamp_min(0)[:, None])[:, 0].float())
    out = supports.with_sampled(teacher, target)
    check(out, lp, [x | ({y} - {-100}) for x, y in zip(sets(teacher.ids), target.tolist(), strict=True)], 1e-5)
    assert out.ids[:2, K].tolist() == [-1, -1]
    with pytest.raises(ValueError, match="with_sampled: target_logp"):
        supports.with_sampled(teacher._replace(target_logp=None), target)
    with pytest.raises(ValueError, match="with_sampled: target has shape"):
        supports.with_sampled(teacher, target[:3])


def test_a_small_tail_keeps_its_digits(world):
    """p = (1 − 1e-3 − 1e-6, 1e-3, 1e-6): without the sampled second token 1e-6 is left, to what float32 log-probs allow."""
    p = torch.tensor([[1 - 1e-3 - 1e-6, 1e-3, 1e-6]], dtype=torch.float64)
    lp = p.log().float()
    teacher = rk.TopK(torch.tensor([[0]]), lp[:, :1], tail_logp=(p[:, 1] + p[:, 2]).log().float(), target_logp=lp[:, 1])
    out = supports.with_sampled(teacher, torch.tensor([1]))
    assert abs(out.tail_logp.double().exp().item() / 1e-6 - 1) < 1e-3
    assert abs(supports.intersection(out, torch.tensor([[0, 2]])).tail_logp.double().exp().item() / 1.001e-3 - 1) < 1e-6


def test_student_log_probs_in_place_of_the_teachers_are_refused(world):
    _, head, teacher, _, _ = world
    student = rk.linear_topk(torch.randn(N, V), head, V)
    with pytest.raises(ValueError, match=r"^union: log-probs of id \d+ differ"), rk.set_checks(True):
        supports.union(teacher, student)
    with pytest.raises(ValueError, match=r"other\.ids has shape"):
        supports.union(teacher, rk.TopK(teacher.ids[:3], teacher.logp[:3]))


def test_what_the_teacher_does_not_know_makes_the_tail_unknown(world):
    _, _, teacher, student, _ = world
    unknown = student._replace(logp=torch.where(torch.arange(K + 1) == K, torch.nan, student.logp))
    new = ~(unknown.ids[:, K:] == teacher.ids).any(1)
    both = supports.union(teacher, unknown)
    assert both.tail_logp[new].isnan().all()
    out = kl(torch.randn(N, 2 * K + 1).log_softmax(1), both, normalize="none")
    assert out.token_loss.isfinite().all()
    assert out.metrics["invalid_teacher"].item() == pytest.approx(new.float().mean().item())


def test_probability_band_keeps_the_region_and_the_target(world):
    lp, _, teacher, _, target = world
    low, high = 0.05, torch.full((N,), 0.4)
    p = teacher.logp.exp()
    for y in (None, target):
        out = supports.probability_band(teacher, low, high, target=y)
        keep = (p >= low) & (p <= high[:, None])
        keep |= False if y is None else teacher.ids == y[:, None]
        check(out, lp, sets(torch.where(keep, teacher.ids, -1)))
    with pytest.raises(ValueError, match="probability_band: high has shape"):
        supports.probability_band(teacher, low, high[:2])


def test_shapes_of_batches_and_masked_rows():
    head = rk.LMHead(torch.randn(V, 5))
    h, keep = torch.randn(2, 3, 5), torch.tensor([[1, 1, 0], [1, 0, 1]])
    target = torch.randint(V, (2, 3))
    teacher = rk.linear_topk(h, head, K, target=target, mask=keep)
    student = rk.linear_support(h, head, rk.linear_topk(torch.randn(2, 3, 5), head, K, mask=keep).ids, mask=keep)
    more = supports.union(teacher, student), supports.with_sampled(teacher, target)
    for support in (*more, supports.intersection(teacher, student.ids)):
        assert support.ids.shape[:2] == support.tail_logp.shape == (2, 3)
        lq = torch.randn(support.ids.shape).log_softmax(-1)
        out = kl(lq, support, keep, normalize="tail", tail_logp=-torch.ones(2, 3))
        assert out.token_loss.isfinite().all()


def test_lsm_on_the_union_with_the_sampled_token_through_the_head(world):
    """No gradient outside the K + 1 ids, and the value of the definition."""
    lp, head, teacher, _, target = world
    support = supports.with_sampled(teacher, target)
    z = torch.randn(N, V, requires_grad=True)
    out = linear_kl(z, head, support)
    inside = torch.zeros(N, V).scatter(1, torch.cat([teacher.ids.long(), target[:, None]], 1), 1.0) > 0

    def formula(z: Tensor) -> Tensor:
        lq, lp_hat = (x - torch.where(inside, x, -torch.inf).logsumexp(1, keepdim=True) for x in (z, lp.to(z.dtype)))
        return torch.where(inside, lq.exp() * (lq - lp_hat), 0).sum(1)

    hold(out.token_loss, formula, z.detach(), calls=2)
    grad = torch.autograd.grad(out.loss, z)[0] * N
    hold(grad, gradient(formula), z, calls=2)
    assert not grad[~inside].any()
