"""What test_verl.py runs: ``VERL_USE_EXTERNAL_MODULES=rlad_kernels.integrations.verl python -m tests.verl_checks``."""

from __future__ import annotations

import inspect
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import verl_world

verl_world.enter()

from verl.models.transformers import dense_common  # noqa: E402
from verl.trainer.distillation import losses  # noqa: E402
from verl.trainer.ppo import core_algos, rollout_corr_helper  # noqa: E402
from verl.utils.experimental import torch_functional  # noqa: E402

import rlad_kernels as rk  # noqa: E402
from rlad_kernels.integrations import verl as ours  # noqa: E402
from rlad_kernels.losses import Rollout  # noqa: E402

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
B, T = 4, 7


class Config(SimpleNamespace):
    """The fields of verl's ActorConfig that a policy loss reads."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


class Theirs(ours.FusedLinearForPPO):
    """What verl's module does with the torch backend."""

    def forward(self, hidden_states: Any, vocab_weights: Any, input_ids: Any, temperature: float = 1.0) -> Any:
        return torch_functional.FusedLinearForPPOFunction.apply(hidden_states, vocab_weights, input_ids, temperature, 512)


def config(**more: Any) -> Config:
    fields = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, "loss_agg_mode": "token-mean"}
    return Config(**{**fields, "global_batch_info": {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 8}, **more})


def batch() -> dict[str, torch.Tensor]:
    old = -torch.rand(B, T) * 3
    mask = torch.arange(T) < torch.tensor([7, 4, 1, 6])[:, None]
    return {"old": old, "logp": old + torch.randn(B, T) * 0.7, "adv": torch.randn(B, T), "mask": mask}


def value_and_gradient(call: Any, logp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    logp = logp.clone().requires_grad_()
    loss, metrics = call(logp)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics


def check_verl_has_imported_us() -> None:
    assert core_algos.get_policy_loss_fn("rlad_grpo") is ours.rlad_grpo
    assert losses.get_distillation_loss_fn("rlad_trrd") is ours.rlad_trrd
    assert losses.get_distillation_loss_settings("rlad_trrd").use_estimator
    assert torch_functional.FusedLinearForPPO is ours.FusedLinearForPPO
    ours.install()  # twice is once


def check_grpo_is_vanilla() -> None:
    for mode in MODES:
        for weights in (None, torch.rand(B, T)):
            x = batch()
            found = []
            for name in ("vanilla", "rlad_grpo"):
                loss = core_algos.get_policy_loss_fn(name)
                rest = (x["adv"], x["mask"], mode, config(), weights)
                found.append(value_and_gradient(lambda logp, f=loss, o=x["old"], r=rest: f(o, logp, *r), x["logp"]))
            (want, want_grad, want_metrics), (got, grad, metrics) = found
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-7)
            assert all(abs(metrics[k] - want_metrics[k]) < 1e-5 for k in metrics), (metrics, want_metrics)


def check_masked_garbage_has_no_effect() -> None:
    x = batch()
    results = []
    for fill in (0.0, float("nan")):
        broken = {k: torch.where(x["mask"], v, fill) for k, v in x.items() if k != "mask"}
        call = lambda logp, b=broken: ours.rlad_grpo(b["old"], logp, b["adv"], x["mask"], "token-mean", config())  # noqa: E731
        results.append(value_and_gradient(call, broken["logp"]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def check_trrd_through_verls_distillation_loss() -> None:
    """Its gradient is that of the paper's formula, written in float64."""
    x = batch()
    teacher = x["old"] + torch.randn(B, T)
    losses.no_padding_2_padding = lambda tensor, data: tensor  # nested tensors need tensordict
    data = {"response_mask": x["mask"], "old_log_probs": x["old"], "advantages": x["adv"], "teacher_logprobs": teacher[..., None]}
    data |= {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
    options = {"loss_mode": "rlad_trrd", "use_task_rewards": False, "use_policy_gradient": False, "loss_max_clamp": None}
    for alpha in (0.5, 0.25):
        os.environ["RLAD_TRRD_ALPHA"] = str(alpha)
        actor = config(loss_scale_factor=None, global_batch_info={})
        wrapped = SimpleNamespace(distillation_loss=SimpleNamespace(**options))
        got, grad, metrics = value_and_gradient(
            lambda logp, a=actor, w=wrapped: losses.distillation_loss(a, w, {"log_probs": logp}, data), x["logp"]
        )

        def paper(logp: torch.Tensor, alpha: float = alpha) -> tuple[torch.Tensor, dict[str, Any]]:
            s, o, t, a = (v.double() for v in (logp, x["old"], teacher, x["adv"]))
            r = (alpha * (s - o) + (1 - alpha) * (s - t)).exp()
            token = -torch.minimum(r * a, r.clamp(0.8, 1.28) * a)
            return token[x["mask"]].mean().float(), {}

        want, want_grad, _ = value_and_gradient(paper, x["logp"])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-7)
        assert metrics["distillation/invalid_teacher"] == 0 and "distillation/kl_teacher" in metrics
    for name, value in (("use_task_rewards", True), ("use_policy_gradient", True), ("loss_max_clamp", 10.0)):
        wrong = SimpleNamespace(distillation_loss=SimpleNamespace(**options | {name: value}))
        with pytest.raises(ValueError, match=f"distillation.distillation_loss.{name} is {value}"):
            ours.rlad_trrd(actor, wrong, {"log_probs": x["logp"]}, data)


def check_head_in_verls_model_forward() -> None:
    """verl's patched forward of a Qwen3 gives the same log-probs, entropy and gradients with our head as with its own."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=300, num_key_value_heads=1, tie_word_embeddings=False, **size))
    ids, weight = torch.randint(300, (2, 9)), torch.randn(2, 9)
    results = []
    for head in (Theirs, ours.FusedLinearForPPO):
        torch_functional.FusedLinearForPPO = head
        model.zero_grad()
        out = dense_common.forward_with_torch_backend(model, input_ids=ids, temperature=0.7, return_dict=True)
        ((out.log_probs + 0.1 * out.entropy) * weight).sum().backward()
        results.append((out.log_probs.detach(), out.entropy.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}))
    for want, got in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for name, want in results[0][2].items():
        assert (results[1][2][name] - want).norm() <= 1e-5 * want.norm(), name


def check_tensors_that_do_not_fit_are_refused() -> None:
    x = batch()
    given = {"old_log_prob": x["old"], "log_prob": x["logp"], "advantages": x["adv"], "response_mask": x["mask"]}
    given |= {"config": config(), "rollout_is_weights": torch.ones(B, T)}
    for name, wrong, message in (
        ("old_log_prob", x["old"][:, :1], r"old_log_prob has shape \(4, 1\), wanted \(4, 7\)"),
        ("advantages", x["adv"][:, :1], r"advantages has shape \(4, 1\)"),
        ("advantages", x["adv"][0], r"advantages has shape \(7,\)"),
        ("response_mask", x["mask"][:1], r"response_mask has shape \(1, 7\)"),
        ("response_mask", x["mask"] * 2.0, "response_mask must hold bools, or numbers equal to 0 or 1, got 2.0"),
        ("rollout_is_weights", torch.ones(B, 1), r"rollout_is_weights has shape \(4, 1\)"),
        ("rollout_is_weights", -torch.ones(B, T), "rollout_is_weights must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=f"^rlad_grpo: {message}"):
            ours.rlad_grpo(**{**given, name: wrong})
    teacher = {"response_mask": x["mask"], "old_log_probs": x["old"], "advantages": x["adv"]}
    wrapped = SimpleNamespace(
        distillation_loss=SimpleNamespace(use_task_rewards=False, use_policy_gradient=False, loss_max_clamp=None)
    )
    losses.no_padding_2_padding = lambda tensor, data: tensor  # nested tensors need tensordict
    for width, message in ((2, r"teacher_logprobs has shape \(4, 7, 2\), wanted \(4, 7\)"), (1, "")):
        data = {**teacher, "teacher_logprobs": torch.randn(B, T, width)}
        if message:
            with pytest.raises(ValueError, match=f"^rlad_trrd: {message}"):
                ours.rlad_trrd(config(), wrapped, {"log_probs": x["logp"]}, data)
        else:
            assert ours.rlad_trrd(config(), wrapped, {"log_probs": x["logp"]}, data)[0].shape == (B, T)
    head, hidden, weight = ours.FusedLinearForPPO(), torch.randn(2, 5, 8), torch.randn(11, 8)
    for ids, message in (
        (torch.zeros(5).long(), r"input_ids has shape \(5,\), wanted \(2, 5\)"),
        (torch.zeros(2, 5), "input_ids must be integers, got torch.float32"),
        (torch.full((2, 5), 11), r".* must be in \[0, vocab_size=11\), got 11"),
    ):
        with pytest.raises(ValueError, match=f"^FusedLinearForPPO: {message}"):
            head(hidden, weight, ids)


def check_ratios_of_200_nats() -> None:
    """Clipped on both sides by the dual clip: finite everywhere, with verl's clip share, and no NaN behind a weight of 0."""
    gaps = torch.tensor([-200.0, -50.0, 0.0, 50.0, 200.0]).repeat(3, 1)
    s, sign = torch.full_like(gaps, -256.0), torch.tensor([[-1.0], [0.0], [2.0]]).expand(3, 5)
    rest = (sign, torch.ones(3, 5), "token-mean", config())
    loss, grad, metrics = value_and_gradient(lambda s: ours.rlad_grpo(s.detach() - gaps, s, *rest), s)
    token = torch.tensor([[0.8, 0.8, 1, 3, 3], [0, 0, 0, 0, 0], [0, 0, -2, -2.56, -2.56]])
    torch.testing.assert_close(loss, token.sum() / 31 * 2)
    want = torch.zeros(3, 5)
    want[0, 2], want[2, :3] = 1, torch.tensor([0, -2 * torch.tensor(-50.0).exp(), -2])
    torch.testing.assert_close(grad, want / 31 * 2, rtol=1e-5, atol=0)
    assert abs(metrics["actor/pg_clipfrac"] - 4 / 15) < 1e-6
    free = config(clip_ratio_c=1e30)
    weights = (gaps < 0).float()
    loss, grad, _ = value_and_gradient(lambda s: ours.rlad_grpo(s.detach() - gaps, s, *rest[:3], free, weights), s)
    assert loss.isfinite() and grad.isfinite().all()


def check_nothing_kept() -> None:
    x = batch()
    noise = torch.full((B, T), float("nan"))
    loss, grad, metrics = value_and_gradient(
        lambda s: ours.rlad_grpo(noise, s, noise, torch.zeros(B, T), "token-mean", config(), noise), x["logp"]
    )
    assert loss == 0 and not grad.any() and not any(metrics.values())


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


def check_signatures_are_verls() -> None:
    vanilla = inspect.signature(core_algos.get_policy_loss_fn("vanilla")).parameters
    assert list(inspect.signature(ours.rlad_grpo).parameters) == list(vanilla)


if __name__ == "__main__":
    checks = [f for name, f in sorted(globals().items()) if name.startswith("check_")]
    for check in checks:
        torch.manual_seed(0)
        check()
    print(len(checks), "passed")
