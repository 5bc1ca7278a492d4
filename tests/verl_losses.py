"""What test_verl_losses.py runs: our methods beside verl's policy losses and rollout weights, ``python -m tests.verl_losses``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests import verl_world

verl_world.enter()

from verl.trainer.ppo import core_algos, rollout_corr_helper  # noqa: E402

import rlad_kernels as rk  # noqa: E402
from rlad_kernels.losses import Rollout  # noqa: E402
from tests.verl_checks import Config, batch, config, value_and_gradient  # noqa: E402

core_algos.ActorConfig = Config  # which some of them ask for

THEIRS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {  # ours → theirs, aggregation, their options and ours
    "dppo_tv": ("dppo_tv", "token-mean", {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": 1e9}, {}),
    "dppo_kl": (
        "dppo_kl", "token-mean", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1, "clip_ratio_c": 2.0},
        {"delta": (0.05, 0.1), "ratio_max": 2.0},
    ),
    "gmpo": ("geo_mean", "", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.3}, {"log_clip": (0.4, 0.3)}),
    "reinforce": ("gpg", "seq-mean-token-sum", {}, {}),
    "gspo_token": ("gspo", "seq-mean-token-mean", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2}, {"clip": (0.1, 0.2)}),
    "cispo": ("cispo", "token-mean", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2}, {"clip": (0.1, 0.2)}),
    "kl_cov": ("kl_cov", "token-mean", {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.5}, {"fraction": 0.3, "coef": 0.5}),
    # all candidates are taken: nothing is left to chance
    "clip_cov": (
        "clip_cov", "token-mean", {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0, "clip_ratio_high": 0.2},
        {"fraction": 1.0, "bounds": (0.1, 2.0)},
    ),
}  # fmt: skip


def check_policy_losses() -> None:
    for name in THEIRS:
        beside_theirs(name)


def beside_theirs(name: str) -> None:
    mode, aggregation, their_options, options = THEIRS[name]
    x = batch()
    adv = x["adv"][:, :1].expand_as(x["adv"]) if name == "gmpo" else x["adv"]  # it has a sequence's advantage
    unset = {"clip_cov_ratio": None, "clip_cov_lb": None, "clip_cov_ub": None, "kl_cov_ratio": None, "ppo_kl_coef": None}
    of_losses = Config(**unset | their_options)
    rest: Any = (adv, x["mask"], aggregation, config(global_batch_info={}, policy_loss=of_losses, **their_options))
    theirs, loss = core_algos.get_policy_loss_fn(mode), replace(rk.METHODS[name].loss, **options)
    assert isinstance(loss, rk.TokenLoss)
    given: Any = {k: v for k, v in (("old_logp", x["old"]), ("advantages", adv)) if k in loss.needs}

    def ours(s: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = loss(s, **given, mask=x["mask"])
        return out.loss, out.metrics

    want, want_grad, _ = value_and_gradient(lambda s: theirs(x["old"], s, *rest), x["logp"])
    got, grad, metrics = value_and_gradient(ours, x["logp"])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=f"{name}: {got} and {want}")
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-7)
    assert grad.any() and metrics.get("cov_frac", 1) > 0, name


def check_rollout_weights() -> None:
    x = batch()
    old, mu, mask = x["old"], x["old"] + 0.4 * torch.randn(x["old"].shape), x["mask"]
    for level in ("token", "sequence"):
        for form, low, high, threshold in (("truncate", 0.0, 1.3, 1.3), ("mask", 0.5, 2.0, "0.5_2.0")):
            want, _ = rollout_corr_helper.compute_rollout_correction_weights(old - mu, mask, level, threshold)
            torch.testing.assert_close(weights(Rollout(form, low, high, level=level), old, mu, mask), want, rtol=1e-5, atol=1e-7)
    for level, option, low in (("token", "token_k1", 0.8), ("sequence", "seq_sum_k1", 0.4), ("geometric", "seq_mean_k1", 0.9)):
        kept, _ = rollout_corr_helper.compute_rollout_rejection_mask(old - mu, mask, option, f"{low}_{1 / low}")
        torch.testing.assert_close(weights(Rollout("reject", low, 1 / low, level=level), old, mu, mask), kept.float())
        assert 0 < kept.sum() < mask.sum()


def check_clamped_k3() -> None:
    ref, gap = torch.zeros(9), torch.tensor([-30.0, -20.5, -3.0, -2.0, -0.5, 0.0, 1.0, 9.0, 30.0])
    theirs: Any = core_algos.kl_penalty
    want, slope, _ = value_and_gradient(lambda s: (theirs(s, ref, "low_var_kl").sum(), {}), gap)
    loss = rk.losses.GRPO(reference=rk.losses.Reference(1.0, "k3", clamp=(20.0, 10.0)))
    given: Any = {"old_logp": gap, "advantages": ref, "ref_logp": ref, "reduction": rk.Reduction(denominator=1.0)}
    got, grad, _ = value_and_gradient(lambda s: loss(s, **given)[0::2], gap)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, slope)


def weights(rollout: Rollout, old: Tensor, mu: Tensor, mask: Tensor) -> Tensor:
    """As the loss of tokens with r = 1 and Â = −1."""
    loss = rk.losses.GRPO(rollout=rollout)
    return loss(old, old_logp=old, advantages=-torch.ones_like(old), rollout_logp=mu, mask=mask).token_loss


if __name__ == "__main__":
    checks = [f for name, f in sorted(globals().items()) if name.startswith("check_")]
    for check in checks:
        torch.manual_seed(0)
        check()
    print(len(checks), "passed")
