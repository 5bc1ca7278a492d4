"""Clip-Cov and KL-Cov: which tokens are taken, how many, that no draw is in it, and that what is masked does not count."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import GRPO, ClipCov, KLCov

N = 40


def batch(n: int = N) -> dict[str, Tensor]:
    logp = -torch.rand(n) * 4
    return {"logp": logp, "old_logp": logp + 0.01 * torch.randn(n), "advantages": torch.randn(n)}


def taken(loss: ClipCov | KLCov, given: dict[str, Tensor], **more: Tensor) -> list[int]:
    """The tokens that are not as without the covariance."""
    rest: dict[str, Any] = {k: x for k, x in given.items() if k != "logp"}
    plain = GRPO(clip=loss.clip if isinstance(loss, ClipCov) else None)
    found = [f(given["logp"], **rest, **more, reduction="token-mean") for f in (loss, plain)]
    places = (found[0].token_loss != found[1].token_loss).nonzero().flatten().tolist()
    share = len(places) / int(more["mask"].sum() if "mask" in more else len(given["logp"]))
    assert found[0].metrics["cov_frac"] == pytest.approx(share)
    return places


def cov(given: dict[str, Tensor], keep: Tensor) -> Tensor:
    s, a = given["logp"].double(), given["advantages"].double()
    return (s - s[keep].mean()) * (a - a[keep].mean())


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 1), (0.01, 1), (0.1, 4), (0.12, 4), (1.0, N)])
def test_kl_cov_holds_the_largest(fraction: float, count: int) -> None:
    given = batch()
    largest = cov(given, torch.ones(N).bool()).argsort(descending=True)[:count]
    assert taken(KLCov(fraction=fraction), given) == sorted(largest.tolist())


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 1.0])
def test_clip_cov_takes_evenly_from_its_bounds(fraction: float) -> None:
    given = batch()
    able = [i for i, c in enumerate(cov(given, torch.ones(N).bool()).tolist()) if 0.2 < c < 3.0]
    loss = ClipCov(fraction=fraction, bounds=(0.2, 3.0))
    found = taken(loss, given)
    assert len(found) == min(max(int(fraction * N), 1), len(able)) and set(found) <= set(able)
    gaps = [able.index(j) - able.index(i) for i, j in itertools.pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert taken(loss, given) == found  # and no draw


def test_clip_cov_without_a_candidate_is_grpo() -> None:
    assert taken(ClipCov(bounds=(50.0, 60.0), fraction=1.0), batch()) == []


def test_a_clipped_token_is_no_candidate() -> None:
    given = batch(8)
    given["advantages"] = torch.where(torch.arange(8) == 2, 4.0, -0.1)
    given["logp"][2] = given["old_logp"][2] = -0.01
    loss = ClipCov(fraction=0.5, bounds=(2.0, 50.0), clip=(0.2, 0.2))
    assert taken(loss, given) == [2]
    assert taken(loss, {**given, "old_logp": given["old_logp"] - 1}) == []


@pytest.mark.parametrize("loss", [ClipCov(fraction=0.19, bounds=(0.0, 9.0)), KLCov(fraction=0.19)])
def test_masked_tokens_and_those_without_mass_do_not_count(loss: rk.TokenLoss) -> None:
    given, keep = batch(), torch.rand(N) > 0.3
    alone: dict[str, Any] = {k: x[keep] for k, x in given.items()}
    noisy: dict[str, Any] = {k: torch.where(keep, x, math.nan) for k, x in given.items()}
    out = loss(noisy.pop("logp"), **noisy, mask=keep)
    torch.testing.assert_close(out.token_loss[keep], loss(alone.pop("logp"), **alone).token_loss, rtol=1e-6, atol=1e-7)
    s = torch.where(torch.arange(N) == 5, -math.inf, given["logp"]).requires_grad_()
    out = loss(s, old_logp=given["old_logp"], advantages=given["advantages"])
    rest = torch.arange(N) != 5
    without: dict[str, Any] = {k: x[rest] for k, x in given.items()}
    torch.testing.assert_close(out.token_loss[rest], loss(without.pop("logp"), **without).token_loss, rtol=1e-6, atol=1e-7)
    assert torch.autograd.grad(out.loss, s)[0].isfinite().all()


def test_a_taken_token_has_no_gradient_even_where_its_ratio_is_infinite() -> None:
    s, old = torch.tensor([-1.0, -300.0, -2.0]).requires_grad_(), torch.tensor([-1.0, -600.0, -2.0])
    out = ClipCov(fraction=0.34, bounds=(200.0, 1e9), clip=(0.2, 0.2))(s, old_logp=old, advantages=torch.tensor([1.0, -1.0, 1.0]))
    assert out.metrics["cov_frac"] == pytest.approx(1 / 3)
    assert out.loss.isfinite() and torch.autograd.grad(out.loss, s)[0][1] == 0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ClipCov: fraction must be in \[0, 1\], got 2"):
        ClipCov(fraction=2)
    with pytest.raises(ValueError, match=r"ClipCov: bounds must be \(low, high\) with low <= high"):
        ClipCov(bounds=(5.0, 1.0))
    with pytest.raises(ValueError, match=r"KLCov: coef must be a finite number"):
        KLCov(coef=math.inf)
