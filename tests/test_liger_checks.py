"""What the JSD and the top-K distillation of the Liger-shaped adapters refuse, and their edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlad_kernels.integrations import liger as ours

pytestmark = pytest.mark.cpu
H, V = 16, 61


def jsd_inputs() -> dict[str, Any]:
    return {
        "student_input": torch.randn(23, H), "student_weight": torch.randn(V, H) * 0.4, "teacher_input": torch.randn(23, 24),
        "teacher_weight": torch.randn(V, 24) * 0.3, "student_bias": torch.randn(V),
        "true_labels": torch.randint(0, V, (23,)).where(torch.arange(23) % 4 > 0, -100),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"beta": float("nan")}, r"beta must be in \[0, 1\], got nan"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"weight_soft_loss": -1.0}, "weight_soft_loss must be at least 0 and finite, got -1.0"),
    ],
)
def test_jsd_options_are_refused_when_made(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^LigerFusedLinearJSDLoss: {message}"):
        ours.LigerFusedLinearJSDLoss(**options)


@pytest.mark.parametrize(
    ("argument", "bad", "message"),
    [
        ("true_labels", torch.zeros(22).long(), r": true_labels has shape \(22,\), wanted \(23,\)"),
        ("true_labels", torch.zeros(23, 1).long(), r": true_labels has shape \(23, 1\), wanted \(23,\)"),
        ("true_labels", torch.zeros(23), ": true_labels must be integers, got torch.float32"),
        ("true_labels", torch.full((23,), V), r": true_labels must be in \[0, vocab_size=61\) where it is not masked, got 61"),
        ("teacher_input", torch.zeros(1, 24), r": teacher_input has shape \(1,\), wanted \(23,\)"),
        ("teacher_weight", torch.zeros(V, 24).bfloat16(), r" \(teacher\): hidden has dtype torch.float32, weight torch.bfloat16"),
        ("teacher_weight", torch.zeros(V, H), r" \(teacher\): weight \(V, D\) has shape \(61, 16\)"),
    ],
)
def test_jsd_tensors_that_do_not_fit_are_refused(argument: str, bad: Tensor, message: str):
    inputs = {**jsd_inputs(), argument: bad}
    with pytest.raises(ValueError, match=f"^LigerFusedLinearJSDLoss{message}"):
        ours.LigerFusedLinearJSDLoss()(**inputs)


def test_jsd_of_a_batch_of_no_label_and_of_another_ignore_index():
    inputs = jsd_inputs()
    loss = ours.LigerFusedLinearJSDLoss(ignore_index=-1, return_soft_hard_loss=True)
    plain = ours.LigerFusedLinearJSDLoss(return_soft_hard_loss=True)
    moved = torch.where(inputs["true_labels"] == -100, -1, inputs["true_labels"])
    packed = loss(**{**inputs, "true_labels": moved})
    assert all(torch.equal(a, b) for a, b in zip(packed, plain(**inputs), strict=True))
    with pytest.raises(ValueError, match=r"true_labels must be in .*, got -100"):
        loss(**inputs)
    wide = {k: inputs[k].unsqueeze(0) for k in ("student_input", "teacher_input")}
    batch = loss(**{**inputs, **wide, "true_labels": moved.unsqueeze(0)})
    assert all(torch.equal(a, b) for a, b in zip(packed, batch, strict=True))
    for labels in (torch.full((23,), -1), moved[:0]):
        cut = {k: inputs[k][: len(labels)].clone().requires_grad_() for k in ("student_input", "teacher_input")}
        none = loss(**{**inputs, **cut, "true_labels": labels})
        assert [x.item() for x in none] == [0, 0, 0]
        assert not torch.autograd.grad(none[0], cut["student_input"])[0].any()


def topk_inputs() -> dict[str, Any]:
    teacher, ids = (torch.randn(2, 5, V) * 2).log_softmax(-1).topk(3)
    labels = torch.randint(0, V, (2, 5))
    return {
        "hidden_states": torch.randn(2, 5, H), "weights": torch.randn(V, H), "labels": labels, "teacher_topk_ids": ids,
        "teacher_topk_log_probs": teacher,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_topk_ids": torch.zeros(5, 3).long()}, r"teacher_topk_ids has shape \(5, 3\), wanted \(2, 5, K\)"),
        ({"teacher_topk_log_probs": torch.zeros(5, 3)}, r"teacher_topk_log_probs has shape \(5, 3\), wanted \(2, 5, K\)"),
        ({"teacher_topk_log_probs": torch.zeros(2, 5, 1)}, r"teacher_topk_log_probs must be floats \(2, 5, 3\), .*\(2, 5, 1\)"),
        ({"teacher_topk_log_probs": torch.zeros(2, 5, 3).int()}, r"teacher_topk_log_probs must be floats .*, got torch.int32"),
        ({"teacher_topk_ids": torch.zeros(2, 5, 3)}, "teacher_topk_ids must be integers, got torch.float32"),
        ({"teacher_topk_ids": torch.full((2, 5, 3), V)}, r"teacher_topk_ids must be in \[0, vocab_size=61\) or -1 .*, got 61"),
        (
            {"teacher_topk_ids": torch.zeros(2, 5, V + 1).long(), "teacher_topk_log_probs": torch.zeros(2, 5, V + 1)},
            "teacher_topk_ids .* must have 1 <= K <= min.4096, vocab_size=61., got K=62",
        ),
        ({"labels": torch.zeros(5).long()}, r"labels has shape \(5,\), wanted \(2, 5\)"),
        ({"labels": torch.zeros(2, 5)}, "labels must be integers"),
        ({"labels": torch.full((2, 5), -7)}, r"labels must be in \[0, vocab_size=61\) where it is not masked, got -7"),
        ({"shift_labels": torch.zeros(1, 5).long()}, r"shift_labels has shape \(1, 5\), wanted \(2, 5\)"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"log_prob_min_clamp": 2.5}, "log_prob_min_clamp must be negative and finite, or None, got 2.5"),
        ({"hidden_states": torch.zeros(H)}, r"hidden_states must be \(B, L, H\) or \(L, H\), got shape \(16,\)"),
    ],
)  # fmt: skip
def test_topk_distillation_refuses_what_does_not_fit(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^chunk_topk_distill_function: {message}"):
        ours.chunk_topk_distill_function(**{**topk_inputs(), **changes})


def test_topk_distillation_of_one_position_and_of_none():
    inputs = topk_inputs()
    for length in (0, 1):
        cut = {k: x[:, :length] if k != "weights" else x for k, x in inputs.items()}
        assert all(x.shape == (2, length) and not x.any() for x in ours.chunk_topk_distill_function(**cut))
    ignored = ours.chunk_topk_distill_function(**{**inputs, "labels": torch.full((2, 5), -1)}, ignore_index=-1)
    assert not any(x.any() for x in ignored)
