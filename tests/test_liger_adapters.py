"""The Liger-shaped adapters against Liger 0.8.5 in float32 where it is right, and against the truth where it is not."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlad_kernels.integrations import liger as ours

pytestmark = pytest.mark.cpu
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel not installed: pip install -r requirements-dev.txt"
)
B, T, H, V = 5, 7, 16, 61


def grpo_inputs() -> dict[str, Any]:
    logp = -torch.rand(3, B, T) * 4 - 1
    mask = (torch.arange(T) < torch.tensor([7, 3, 5, 1, 6]).unsqueeze(1)).long()
    return {
        "_input": torch.randn(B, T, H), "lin_weight": torch.randn(V, H) * 0.4, "selected_token_ids": torch.randint(0, V, (B, T)),
        "attention_mask": mask, "advantages": torch.tensor([1.0, -0.5, 0.3, -2.0, 0.0]), "bias": torch.randn(V),
        "ref_per_token_logps": logp[0], "old_per_token_logps": logp[1],
    }  # fmt: skip


def value_and_gradients(call: Any, inputs: dict[str, Any], leaves: tuple[str, ...]) -> list[Tensor]:
    given = {k: v.clone().requires_grad_() if k in leaves else v for k, v in inputs.items()}
    out = call(**given)
    loss, rest = (out, ()) if isinstance(out, Tensor) else (out[0], out[1] if isinstance(out[1], tuple) else out[1:])
    (loss * 1.7).backward()
    return [loss.detach(), *rest, *[given[k].grad for k in leaves]]


def assert_equal(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7


RATIO = torch.rand(B, T, generator=torch.Generator("cpu").manual_seed(3), device="cpu") + 0.5
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *[({"loss_type": x, "max_completion_length": 9}, {}) for x in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")],
    ({"loss_type": "dapo", "beta": 0.0, "use_ref_model": False, "temperature": 0.7, "delta": 1.5}, {"num_items_in_batch": 31}),
    ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"vllm_is_ratio": RATIO[:, 0]}),
    ({"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0}, {}),
    ({"loss_type": "vespo"}, {"vllm_is_ratio": RATIO[:, :1]}),
    ({"loss_type": "bnpo", "use_bias_correction_kl": True}, {"vllm_is_ratio": RATIO, "old_per_token_logps": None}),
]


@needs_liger
@pytest.mark.parametrize("options, changes", CASES)
def test_grpo_equals_ligers(options: dict[str, Any], changes: dict[str, Any]):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    inputs = {**grpo_inputs(), **changes}
    leaves = ("_input", "lin_weight", "bias")
    theirs = value_and_gradients(LigerFusedLinearGRPOLoss(compiled=False, **options), inputs, leaves)
    assert_equal(value_and_gradients(ours.LigerFusedLinearGRPOLoss(compiled=False, **options), inputs, leaves), theirs)


@needs_liger
def test_grpo_takes_the_references_hidden_states():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    inputs = {**grpo_inputs(), "ref_per_token_logps": None, "ref_input": torch.randn(B, T, 8), "ref_weight": torch.randn(V, 8)}
    leaves = ("_input", "lin_weight")
    mine = value_and_gradients(ours.LigerFusedLinearGRPOLoss(compiled=False), inputs, leaves)
    assert_equal(mine, value_and_gradients(LigerFusedLinearGRPOLoss(compiled=False), inputs, leaves))


def test_grpo_is_deaf_to_what_is_masked():
    inputs = grpo_inputs()
    hole = inputs["attention_mask"] == 0
    noisy = {
        **inputs, "_input": torch.where(hole.unsqueeze(-1), torch.nan, inputs["_input"]),
        "selected_token_ids": torch.where(hole, V + 5, inputs["selected_token_ids"]),
        "ref_per_token_logps": torch.where(hole, torch.nan, inputs["ref_per_token_logps"]),
        "old_per_token_logps": torch.where(hole, -torch.inf, inputs["old_per_token_logps"]),
    }  # fmt: skip
    for kind in ("dapo", "vespo", "luspo"):
        loss = ours.LigerFusedLinearGRPOLoss(loss_type=kind)
        a, b = (value_and_gradients(loss, x, ("_input", "lin_weight")) for x in (inputs, noisy))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def jsd_inputs() -> dict[str, Any]:
    return {
        "student_input": torch.randn(23, H), "student_weight": torch.randn(V, H) * 0.4, "teacher_input": torch.randn(23, 24),
        "teacher_weight": torch.randn(V, 24) * 0.3, "student_bias": torch.randn(V),
        "teacher_bias": torch.randn(V),
        "true_labels": torch.randint(0, V, (23,)).where(torch.arange(23) % 4 > 0, -100),
    }  # fmt: skip


@needs_liger
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_equals_ligers(beta: float):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    options = {"beta": beta, "temperature": 1.7, "weight_hard_loss": 0.3, "return_soft_hard_loss": True, "compiled": False}
    inputs, leaves = jsd_inputs(), ("student_input", "student_weight", "student_bias")
    theirs = value_and_gradients(LigerFusedLinearJSDLoss(**options), inputs, leaves)
    assert_equal(value_and_gradients(ours.LigerFusedLinearJSDLoss(**options), inputs, leaves), theirs)


def test_a_padded_teacher_changes_nothing():
    hidden, weight = torch.randn(9, H), torch.randn(V, H)
    padded, bias = torch.cat([weight, torch.zeros(3, H)]), torch.cat([torch.zeros(V), torch.full((3,), -1e4)])
    loss = ours.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, beta=1.0)
    assert loss(hidden, weight, hidden, padded, torch.zeros(9).long(), torch.zeros(V), bias) == 0


def test_small_divergences_in_bfloat16():
    hidden, weight = torch.randn(64, 64).bfloat16(), (torch.randn(500, 64) * 0.3).bfloat16()
    near = (hidden.float() + 0.03 * torch.randn(64, 64)).bfloat16()
    leaf = near.clone().requires_grad_()
    ours.LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0)(leaf, weight, hidden, weight, torch.zeros(64).long()).backward()
    exact = near.double().requires_grad_()
    q, p = ((x @ weight.double().T).log_softmax(-1) for x in (exact, hidden.double()))
    kl = (q.exp() * (q - p)).sum(-1).mean()
    kl.backward()
    assert 1e-4 < kl < 1e-2
    assert leaf.grad is not None and exact.grad is not None
    assert (leaf.grad.double() - exact.grad).norm() <= 5e-3 * exact.grad.norm()


@pytest.mark.parametrize("clamp", [None, -2.5])
@pytest.mark.parametrize("shift", [True, False])
def test_topk_distillation_is_the_dense_formula(clamp: float | None, shift: bool):
    hidden, weight = torch.randn(2, 9, H), torch.randn(V, H) * 0.3
    labels = torch.randint(0, V, (2, 9)).where(torch.rand(2, 9) > 0.2, -100)
    teacher, ids = (torch.randn(2, 9, V) * 2).log_softmax(-1).topk(4)
    results = []
    for dense in (False, True):
        h, w = (x.double() if dense else x for x in (hidden, weight))
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        if dense:
            y, i, p = (a[:, 1:] if shift else a for a in (labels, ids, teacher))
            x = h[:, :-1] if shift else h
            logp = (x @ w.T / 0.8).log_softmax(-1)
            keep = y != -100
            q, raw, p = logp.gather(-1, i), p.double(), p.double()
            student_mass, teacher_mass = q.exp().sum(-1), raw.exp().sum(-1)
            if clamp is not None:
                q, p = q.clamp_min(clamp), p.clamp_min(clamp)
            entropy = -(logp.exp() * logp).sum(-1)
            found = (logp.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1), entropy, (p.exp() * (p - q)).sum(-1))
            out = [torch.where(keep, a, 0) for a in (*found, student_mass.detach(), teacher_mass)]
            out = [F.pad(a, (0, 1)) for a in out] if shift else out
        else:
            more = {} if shift else {"shift_labels": labels}
            out = ours.chunk_topk_distill_function(
                h, w, labels, ids, teacher, temperature=0.8, log_prob_min_clamp=clamp, **more
            )  # fmt: skip
            assert not out[3].requires_grad and not out[4].requires_grad
        (out[0].sum() + 0.3 * out[1].sum() + 2 * out[2].sum()).backward()
        results.append([*out, h.grad, w.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)


def test_topk_distillation_counts_missing_slots_as_nothing():
    hidden, weight, labels = torch.randn(6, H), torch.randn(V, H), torch.randint(0, V, (6,))
    teacher, ids = torch.randn(6, V).log_softmax(-1).topk(3)
    wide = F.pad(ids, (0, 2), value=-1), F.pad(teacher, (0, 1), value=-torch.inf)
    wide = wide[0], F.pad(wide[1], (0, 1), value=torch.nan)
    a = ours.chunk_topk_distill_function(hidden, weight, labels, ids, teacher)
    b = ours.chunk_topk_distill_function(hidden, weight, labels, *wide)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_wrong_wiring_names_the_fix():
    inputs = grpo_inputs()
    with pytest.raises(ValueError, match="pass the head of the model that gave the hidden states"):
        ours.LigerFusedLinearGRPOLoss()(**{**inputs, "lin_weight": torch.randn(V, H + 1)})
    with pytest.raises(ValueError, match="needs ref_per_token_logps, or ref_input and ref_weight"):
        ours.LigerFusedLinearGRPOLoss()(**{**inputs, "ref_per_token_logps": None})
    with pytest.raises(ValueError, match=r"vllm_is_ratio has shape \(3,\), wanted \(5,\), \(5, 1\) or \(5, 7\)"):
        ours.LigerFusedLinearGRPOLoss()(**inputs, vllm_is_ratio=torch.ones(3))
    with pytest.raises(ValueError, match="loss_type must be one of"):
        ours.LigerFusedLinearGRPOLoss(loss_type="ppo")(**inputs)
