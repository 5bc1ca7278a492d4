"""LigerFusedLinearGRPOLoss: which shapes mean what, what is refused and when, and ratios up to e^200."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.backends.contract import INTERPRET
from rlad_kernels.integrations.liger import LigerFusedLinearGRPOLoss
from rlad_kernels.integrations.liger.grpo import LOSSES, _all_tokens, _divisor, grpo
from tests.extremes import GAPS, SIGNS, S, exact, hold, tokens
from tests.sweeps import relative

B, T, H, V = 3, 5, 8, 31
NAME = "LigerFusedLinearGRPOLoss"
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel not installed: pip install -r requirements-dev.txt"
)
CALLS = [
    (kind, level) for level in ("token", "sequence") for kind in LOSSES if level == "token" or kind not in LOSSES[4:6] + LOSSES[7:]
]


def inputs(b: int = B, t: int = T) -> dict[str, Any]:
    return {
        "_input": torch.randn(b, t, H), "lin_weight": torch.randn(V, H) * 0.4, "selected_token_ids": torch.randint(0, V, (b, t)),
        "attention_mask": (torch.arange(t) < torch.tensor([5, 2, 4, 1, 3][:b]).unsqueeze(1)).long(),
        "advantages": torch.tensor([1.0, -0.5, 0.3, -2.0, 0.0][:b]), "ref_per_token_logps": -torch.rand(b, t) * 4 - 1,
        "old_per_token_logps": -torch.rand(b, t) * 4 - 1,
    }  # fmt: skip


def quick(kind: str) -> None:
    if INTERPRET and kind not in ("dapo", "vespo"):
        pytest.skip("two losses stand for the eight where a sweep takes a second")


def loss_and_gradient(loss: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    leaf = given["_input"].clone().requires_grad_()
    value, metrics = loss(**{**given, "_input": leaf})
    return value.detach(), torch.autograd.grad(value, leaf)[0], metrics


@pytest.mark.parametrize("b", [3, 5])  # five sequences of five: a (B,) could be read as a (T,)
@pytest.mark.parametrize(("kind", "level"), CALLS)
def test_advantages_of_a_sequence_or_of_a_token(kind: str, level: str, b: int) -> None:
    quick(kind)
    given = inputs(b)
    loss = LigerFusedLinearGRPOLoss(loss_type=kind, importance_sampling_level=level, max_completion_length=9)
    wide = given["advantages"].unsqueeze(1)
    want = loss_and_gradient(loss, given)
    for same in (wide, wide.expand(b, T)):
        value, slope, metrics = loss_and_gradient(loss, {**given, "advantages": same})
        assert torch.equal(value, want[0]) and torch.equal(slope, want[1])
        assert all(torch.equal(x, y) for x, y in zip(metrics, want[2], strict=True))


@needs_liger
@pytest.mark.cpu
@pytest.mark.parametrize("kind", LOSSES[:5])
def test_advantages_of_each_token_are_ligers(kind: str) -> None:
    """Liger takes ``(B, T)`` with chunks of one sequence, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs

    given = {**inputs(), "advantages": torch.randn(B, T)}
    options = {"loss_type": kind, "max_completion_length": 9, "compiled": False}
    value, slope, metrics = loss_and_gradient(LigerFusedLinearGRPOLoss(**options), given)
    want, want_slope, want_metrics = loss_and_gradient(Theirs(**options), given)
    assert relative(value, want) <= 1e-5 and relative(slope, want_slope) <= 1e-5
    assert all(abs(x - y) <= 1e-6 for x, y in zip(metrics, want_metrics, strict=True))


WRONG: list[tuple[str, Any, str]] = [
    ("advantages", torch.ones(T), r"advantages has shape \(5,\), wanted \(3, 5\) or \(3,\)"),
    ("advantages", torch.ones(1, T), r"advantages has shape \(1, 5\)"),
    ("advantages", torch.ones(B, 1, T), r"advantages has shape \(3, 1, 5\)"),
    ("advantages", torch.tensor(1.0), r"advantages has shape \(\)"),
    ("old_per_token_logps", torch.ones(B, 1), r"old_per_token_logps has shape \(3, 1\), wanted \(3, 5\)"),
    ("old_per_token_logps", torch.ones(T), r"old_per_token_logps has shape \(5,\)"),
    ("ref_per_token_logps", torch.ones(B), r"ref_per_token_logps has shape \(3,\)"),
    ("ref_per_token_logps", torch.ones(1, T), r"ref_per_token_logps has shape \(1, 5\)"),
    ("vllm_is_ratio", torch.ones(T), r"vllm_is_ratio has shape \(5,\), wanted \(3,\), \(3, 1\) or \(3, 5\)"),
    ("vllm_is_ratio", torch.ones(1, T), r"vllm_is_ratio has shape \(1, 5\)"),
    ("attention_mask", torch.ones(T), r"attention_mask has shape \(5,\), wanted \(3, 5\)"),
    ("attention_mask", torch.ones(B, 1).bool(), r"attention_mask has shape \(3, 1\)"),
    ("selected_token_ids", torch.ones(T).long(), r"selected_token_ids has shape \(5,\), wanted \(3, 5\)"),
    ("selected_token_ids", torch.ones(B, T), r"selected_token_ids must be integers, got torch.float32"),
    ("_input", torch.ones(B * T, H), r"_input must be \(B, T, H\), got shape \(15, 8\)"),
    ("lin_weight", torch.ones(V, H + 1), r"pass the head of the model that gave the hidden states"),
    ("lin_weight", torch.ones(V, H).bfloat16(), r"hidden has dtype torch.float32, weight torch.bfloat16"),
    ("num_items_in_batch", torch.ones(2), r"num_items_in_batch must be one number, got shape \(2,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "bad", "message"), WRONG, ids=[f"{x[0]}-{i}" for i, x in enumerate(WRONG)])
def test_a_tensor_of_another_shape_is_refused(argument: str, bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{NAME}: .*{message}"):
        LigerFusedLinearGRPOLoss()(**{**inputs(), argument: bad})


def test_the_references_hidden_states_have_the_policys_shape() -> None:
    given = {**inputs(), "ref_per_token_logps": None, "ref_input": torch.randn(B, 1, H), "ref_weight": torch.randn(V, H)}
    with pytest.raises(ValueError, match=rf"^{NAME}: ref_input has shape \(3, 1, 8\), wanted \(\*\(3, 5\), H\)"):
        LigerFusedLinearGRPOLoss()(**given)


@pytest.mark.parametrize(
    ("argument", "bad", "message"),
    [
        ("attention_mask", 2, "attention_mask must hold bools, or numbers equal to 0 or 1, got 2"),
        ("selected_token_ids", V, r"selected_token_ids must be in \[0, vocab_size=31\) where it is not masked, got 31"),
        ("selected_token_ids", -100, r"selected_token_ids must be in .*, got -100"),
        ("vllm_is_ratio", -0.5, "vllm_is_ratio must be at least 0, got -0.5"),
    ],
)
def test_a_value_without_a_meaning_is_refused(argument: str, bad: float, message: str) -> None:
    given = {**inputs(), "vllm_is_ratio": torch.ones(B, T)}
    given[argument] = given[argument].clone()
    given[argument][0, 1] = bad
    with pytest.raises(ValueError, match=f"^{NAME}: {message}"), rk.set_checks(given[argument].is_cuda):  # there only on request
        LigerFusedLinearGRPOLoss()(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": -1.0}, "delta must be positive and finite, got -1.0"),
        ({"delta": 0.0}, "delta must be positive"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos must be positive"),
        ({"sapo_temperature_neg": -1.0}, "sapo_temperature_neg must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"beta": math.nan}, "beta must be at least 0"),
        ({"epsilon_low": -0.1}, "epsilon_low must be at least 0"),
        ({"vespo_k_neg": math.inf}, "vespo_k_neg must be at least 0 and finite"),
        ({"loss_type": "ppo"}, "loss_type must be one of"),
        ({"loss_type": "dr_grpo"}, "loss_type='dr_grpo' needs max_completion_length > 0, got None"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "loss_type='sapo' is per token"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be token or sequence"),
    ],
)
def test_an_option_without_a_meaning_is_refused_when_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{NAME}: {message}"):
        LigerFusedLinearGRPOLoss(**options)


@pytest.mark.cpu
def test_what_each_kind_divides_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's: sequences; the batch's own tokens whatever the accumulated ones are; the longest; all tokens, a process's share."""
    keep = torch.arange(5) < torch.tensor([[5], [2]])
    for kind, want in (("grpo", 2.0), ("bnpo", None), ("dr_grpo", 18.0), ("dapo", 31.0), ("cispo", 31.0)):
        options = LigerFusedLinearGRPOLoss(loss_type=kind, max_completion_length=9).options
        assert _divisor(options, keep, 31) == want, kind
        assert _divisor(options, keep, None) == (7.0 if want == 31 else want)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert _all_tokens(keep, 31).item() == 15.5


@pytest.mark.parametrize(("kind", "level"), CALLS)
def test_nothing_kept_and_nothing_there(kind: str, level: str) -> None:
    quick(kind)
    loss = LigerFusedLinearGRPOLoss(loss_type=kind, importance_sampling_level=level, max_completion_length=9)
    given = inputs()
    empty = {k: x[:, :0] if k not in ("lin_weight", "advantages") else x for k, x in given.items()}
    none = {k: x[:0] if k != "lin_weight" else x for k, x in given.items()}
    noisy = {"old_per_token_logps": torch.full((B, T), math.nan), "selected_token_ids": torch.full((B, T), -7)}
    for case in ({**given, **noisy, "attention_mask": torch.zeros(B, T)}, empty, none):
        value, slope, metrics = loss_and_gradient(loss, case)
        assert value == 0 and not slope.any() and [x.item() for x in metrics] == [0, 0]


def formula(kind: str, s: Tensor, o: Tensor, a: Tensor, delta: float | None) -> Tensor:
    """One token's loss as Liger and TRL write it."""
    r = (s - o).exp()
    if kind == "cispo":
        return -(r.clamp(max=0.2).detach() * a * s).sum()
    if kind == "sapo":
        tau = torch.where(a > 0, 1.0, 1.05)
        return -(4 / tau * torch.sigmoid(tau * (r - 1)) * a).sum()
    if kind == "vespo":
        log_w = (s - o).detach().clamp(math.log(1e-8), 20)
        k, lam = (torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0))
        return -((lam + k * log_w - lam * log_w.exp()).exp() * a * s).sum()
    bounded = r if delta is None else r.clamp(max=delta)
    return -torch.minimum(bounded * a, r.clamp(0.8, 1.2) * a).sum()


@pytest.mark.parametrize("delta", [None, 4.0, 1.1, 0.5])
@pytest.mark.parametrize(("kind", "level"), CALLS)
def test_every_loss_is_its_formula_up_to_200_nats(kind: str, level: str, delta: float | None) -> None:
    s, (gap, sign) = tokens((*GAPS, 0.15, 0.25, 1.5, -0.25, -0.9), SIGNS)
    o = S - gap
    module = LigerFusedLinearGRPOLoss(0.0, loss_type=kind, importance_sampling_level=level, max_completion_length=1, delta=delta)
    out = grpo(
        module.options, s, torch.ones_like(s).bool(), sign.squeeze(1), old=o, reference=None, is_ratio=None, items=None
    )  # fmt: skip
    value, want = exact(lambda x, i: formula(kind, x, o[i].double().cpu(), sign[i].double().cpu(), delta), s)
    scale = {"vespo": 256.0, "cispo": 64.0, "sapo": 64.0}.get(kind, 256.0)  # s − o of a gap like 0.15 is off by ulps of 256
    hold(out.token_loss, value, scale)
    hold(torch.autograd.grad(out.loss, s)[0] * len(s), want, scale)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_corrected_kl_is_its_formula_up_to_200_nats(level: str) -> None:
    s, (gap, far) = tokens(GAPS, GAPS)
    module = LigerFusedLinearGRPOLoss(2.0, loss_type="bnpo", importance_sampling_level=level, use_bias_correction_kl=True)
    out = grpo(
        module.options, s, torch.ones_like(s).bool(), torch.zeros(len(s)), old=S - gap, reference=S - far, is_ratio=None,
        items=None,
    )  # fmt: skip
    x, r = far.double().cpu(), gap.double().cpu().exp()
    value = 2 * torch.where(x < -45, (gap.double().cpu() - x).exp(), r * (torch.expm1(-x) + x))
    hold(out.token_loss, value)
    slope = torch.autograd.grad(out.loss, s)[0] * len(s)
    if level == "token":
        hold(slope, 2 * r * x)
        return
    known = value < torch.finfo(torch.float32).max  # the sequence's share r·k3 and the token's −r·k3 + r·x are added
    hold(slope[known.to(slope.device)], (2 * r * x)[known], scale=1 + 64 * value[known])


@pytest.mark.parametrize(("kind", "level"), CALLS)
def test_a_ratio_that_overflows_leaves_the_other_tokens_their_gradient(kind: str, level: str) -> None:
    """From hidden states: a token 200 nats above the old policy, with a weight of 0 or clipped, among ordinary ones."""
    quick(kind)
    given = inputs()
    given["old_per_token_logps"][0, :2] = -200.0
    given["vllm_is_ratio"] = torch.ones(B, T)
    for advantage, weight in ((1.0, 1.0), (-1.0, 0.0), (0.0, 1.0)):
        given["advantages"][0], given["vllm_is_ratio"][0] = advantage, weight
        loss = LigerFusedLinearGRPOLoss(loss_type=kind, importance_sampling_level=level, max_completion_length=9)
        value, slope, metrics = loss_and_gradient(loss, given)
        assert value.isfinite() and slope.isfinite().all() and all(x.isfinite() for x in metrics)
        assert slope[1].any()


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    """Log-probs, advantages and weights as float32 gives them for the same numbers; the gradient in the input's dtype."""
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in {**inputs(), "vllm_is_ratio": torch.rand(B, T)}.items()}
    wide = {k: x.float() if x.is_floating_point() else x for k, x in given.items()}
    for kind in ("dapo", "vespo"):
        loss = LigerFusedLinearGRPOLoss(loss_type=kind)
        (value, slope, _), (want, want_slope, _) = loss_and_gradient(loss, given), loss_and_gradient(loss, wide)
        assert value.dtype == torch.float32 and slope.dtype == dtype
        assert relative(value, want) <= 1e-4
        assert relative(slope.float(), want_slope) <= 2 * torch.finfo(dtype).eps


@pytest.mark.cpu
@pytest.mark.parametrize(("kind", "level"), [("bnpo", "token"), ("grpo", "sequence"), ("vespo", "token")])
def test_it_compiles_fullgraph(kind: str, level: str) -> None:
    loss = LigerFusedLinearGRPOLoss(loss_type=kind, importance_sampling_level=level, use_bias_correction_kl=True)
    given = {**inputs(), "vllm_is_ratio": torch.rand(B, T)}
    want = loss_and_gradient(loss, given)
    got = loss_and_gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), given)
    assert all(relative(x, y) <= 1e-6 for x, y in zip(got[:2], want[:2], strict=True))
