"""TOP-D, IW-OPD and PowerOPD: their rewards by hand, their bounds and limits, teachers without mass, masks and packing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import IWOPD, OPD, TOPD, PowerOPD
from rlad_kernels.losses.ratio.groups import standardized

INF = math.inf


def advantages(loss: rk.TokenLoss, old: Tensor, teacher: Tensor, **more: Any) -> Tensor:
    """A of each token: −loss where r = 1."""
    return -loss(old, old_logp=old, teacher_logp=teacher, **more).token_loss


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_topds_reward_is_opds_towards_a_mixture(alpha: float) -> None:
    old, teacher = torch.tensor([0.5, 0.1, 0.3]).log(), torch.tensor([0.1, 0.9, 0.3]).log()
    got = advantages(TOPD(alpha=alpha, future=False, normalize=False), old, teacher)
    mixture = (alpha * teacher.exp() + (1 - alpha) * old.exp()).log()
    torch.testing.assert_close(got, mixture - old, rtol=1e-5, atol=1e-6)


def test_topds_reward_has_a_floor_and_does_not_overflow() -> None:
    old, teacher = torch.full((4,), -300.0), torch.tensor([-900.0, -300.0, 0.0, math.nan])
    loss = TOPD(alpha=0.5, future=False, normalize=False, clip=None)
    out = loss(old, old_logp=old, teacher_logp=teacher)
    torch.testing.assert_close(-out.token_loss, torch.tensor([math.log(0.5), 0, 300 + math.log(0.5), 0]))
    assert out.metrics["invalid_teacher"] == 0.25
    plain = TOPD(alpha=1.0, future=False, normalize=False)(old, old_logp=old, teacher_logp=teacher)
    assert plain.token_loss.tolist() == [600, 0, -300, 0]


def test_topds_return_is_the_reward_and_the_mean_of_the_later_ones() -> None:
    old = torch.zeros(1, 4)
    teacher = torch.tensor([[1.0, math.nan, 2.0, 6.0]])
    mask = torch.tensor([[True, False, True, True]])
    got = advantages(TOPD(alpha=1.0, normalize=False), old, teacher, mask=mask)
    torch.testing.assert_close(got, torch.tensor([[1 + 4.0, 0, 2 + 6.0, 6.0]]))


def test_topds_advantages_are_standardized_by_group() -> None:
    """In any order of the groups, over kept tokens; a group without a spread, and one of a token, have none."""
    old, teacher = -torch.rand(5, 6) - 1, -torch.rand(5, 6) - 1
    teacher[1], teacher[4, 1:] = old[1] + 0.3, math.nan
    mask = torch.ones(5, 6).bool()
    mask[0, 2:], mask[4, 1:] = False, False
    ids = torch.tensor([7, 3, 7, 7, 1])
    a = advantages(TOPD(future=False), old, teacher, mask=mask, group_ids=ids)
    group = a[[0, 2, 3]][mask[[0, 2, 3]]]
    assert group.numel() == 14 and abs(group.mean()) < 1e-6 and group.std() == pytest.approx(1, rel=1e-5)
    assert not a[1].any() and not a[4].any()
    place = torch.tensor([2, 4, 0, 3, 1])
    same = advantages(TOPD(future=False), old[place], teacher[place], mask=mask[place], group_ids=ids[place])
    torch.testing.assert_close(same, a[place], rtol=1e-5, atol=1e-6)


def test_standardized_by_hand() -> None:
    x, keep = torch.tensor([1.0, 10.0, 3.0, 7.0, 99.0]), torch.tensor([True, True, True, True, False])
    got = standardized(x, keep, torch.tensor([1, 2, 1, 2, 1]))
    r = math.sqrt(0.5)
    torch.testing.assert_close(got, torch.tensor([-r, r, r, -r, 0.0]))


def test_iw_opds_weights_fall_from_1_and_gamma_to_1() -> None:
    old, teacher = torch.zeros(2, 4), torch.tensor([[1.0, -1.0, 0.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    got = advantages(IWOPD(gamma=0.8), old, teacher)
    torch.testing.assert_close(got, torch.tensor([[1.8, -1.6, 0.0, -2 * 1.4], [0, 0, 0, 0]]))
    assert torch.equal(advantages(IWOPD(gamma=0.0), old, teacher), advantages(OPD(), old, teacher))


@pytest.mark.parametrize("bad", [math.nan, -INF, INF])
def test_iw_opd_leaves_out_what_is_masked_or_not_finite(bad: float) -> None:
    old, teacher = torch.zeros(1, 4), torch.tensor([[1.0, bad, bad, -3.0]])
    out = IWOPD(gamma=1.0)(old, old_logp=old, teacher_logp=teacher, mask=torch.tensor([[True, True, False, True]]))
    torch.testing.assert_close(-out.token_loss, torch.tensor([[2.0, 0, 0, -3 * 1.75]]))
    assert out.metrics["invalid_teacher"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
def test_power_opd_is_a_difference_of_powers_within_1(alpha: float) -> None:
    old, teacher = torch.tensor([0.9, 0.2, 1e-30, 0.5, 1.0]), torch.tensor([0.1, 0.8, 1.0, 0.5, 1e-38])
    got = advantages(PowerOPD(alpha=alpha), old.log(), teacher.log())
    torch.testing.assert_close(got, teacher**alpha - old**alpha, rtol=1e-5, atol=1e-7)
    assert got.abs().max() <= 1 and torch.equal(got.sign(), (teacher - old).sign())


def test_power_opd_goes_to_opd() -> None:
    old, teacher = -torch.rand(8) * 5, -torch.rand(8) * 5
    got = advantages(PowerOPD(alpha=1e-5), old, teacher) / 1e-5
    torch.testing.assert_close(got, teacher - old, rtol=1e-4, atol=1e-5)


def test_power_opd_at_the_ends_of_the_probabilities() -> None:
    old, teacher = torch.tensor([-2000.0, 0.0]), torch.tensor([0.0, -2000.0])
    assert advantages(PowerOPD(alpha=3.0), old, teacher).tolist() == [1, -1]
    bad = torch.tensor([math.nan, INF, -INF, -1.0])
    out = PowerOPD()(torch.full((4,), -1.0), old_logp=torch.full((4,), -1.0), teacher_logp=bad)
    assert not out.token_loss.any() and out.metrics["invalid_teacher"] == 0.75


@pytest.mark.parametrize("loss", [TOPD(), TOPD(normalize=False), IWOPD(), PowerOPD()])
def test_packed_is_padded_and_nothing_flows_through_the_advantage(loss: rk.TokenLoss) -> None:
    mask = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]
    old, noise = -torch.rand(3, 5) - 1, torch.randn(2, 3, 5)
    logp = (old + 0.3 * noise[0]).requires_grad_()
    given: dict[str, Any] = {"old_logp": old, "teacher_logp": old + noise[1], "group_ids": torch.tensor([0, 1, 0])}
    given = {k: given[k] for k in loss.needed()}
    out = loss(logp, **given, mask=mask)
    flat = {k: (x if x.dim() == 2 else x[:, None].expand(3, 5))[mask] for k, x in given.items()}
    ids = torch.arange(3)[:, None].expand(3, 5)[mask]
    same = loss(logp[mask], **flat, reduction=rk.Reduction(seq_ids=ids))
    torch.testing.assert_close(same.token_loss, out.token_loss[mask], rtol=1e-5, atol=1e-6)
    slope = torch.autograd.grad(out.loss, logp)[0]
    a = -loss(old, **given, mask=mask).token_loss
    r = (logp - old).detach().exp()
    clip, dual = getattr(loss, "clip", None), getattr(loss, "dual_clip", None)
    live = mask if clip is None else mask & ~((a > 0) & (r > 1.2)) & ~((a < 0) & (r < 0.8))
    live = live if dual is None else live & ~((a < 0) & (r > dual))
    torch.testing.assert_close(slope, torch.where(live, -r * a, 0) / mask.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TOPD(alpha=0.0), r"TOPD: alpha must be in \(0, 1\], got 0\.0"),
        (lambda: IWOPD(gamma=-1.0), r"IWOPD: gamma must be in \[0, inf\), got -1\.0"),
        (lambda: PowerOPD(alpha=0.0), r"PowerOPD: alpha must be in \(0, inf\), got 0\.0"),
        (
            lambda: IWOPD()(torch.zeros(2), old_logp=torch.zeros(2), teacher_logp=torch.zeros(2)),
            r"the weights of packed \(N,\) tokens",
        ),
        (lambda: TOPD()(torch.zeros(1, 2), old_logp=torch.zeros(1, 2), teacher_logp=torch.zeros(1, 2)), "group_ids is None"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
