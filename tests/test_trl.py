"""TRL's own trainers on our head: the same gradients and parameters as without us, on fixed completions."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import tiny
from tests.trl_runs import assert_same_training, lora, needs_trl, train

pytestmark = [pytest.mark.cpu, needs_trl]
RUNS: dict[str, tuple[str, Any]] = {
    "GRPO, accumulation and checkpointing": ("GRPO", lambda: {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    "GRPO, LoRA with a frozen head": ("GRPO", lora),
    "RLOO": ("RLOO", dict),
    "DPO": ("DPO", dict),
    "KTO": ("KTO", dict),
    "SFT, padded": ("SFT", dict),
    "Distillation, JSD": ("Distillation", lambda: {"beta": 0.3}),
    "Distillation, reverse KL": ("Distillation", lambda: {"beta": 1.0, "max_steps": 2}),
    "SFT, packed": ("SFT", lambda: {"packing": True, "packing_strategy": "bfd", "max_length": 64}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_trainer_trains_the_same_with_us(run: str, tmp_path: Path):
    from rlad_kernels.integrations.trl import patch as ours

    kind, options = RUNS[run]
    calls = []
    score = ours.score
    theirs = train(kind, tmp_path, **options())
    with pytest.MonkeyPatch.context() as patch, ours.use_rlad_kernels():
        patch.setattr(ours, "score", lambda *a, **k: calls.append(1) or score(*a, **k))
        mine = train(kind, tmp_path, **options())
    assert calls
    assert_same_training(mine, theirs)
    if kind in ("GRPO", "RLOO"):
        assert all(row["reward_std"] > 0 for row in mine["logs"] if "reward_std" in row)
        assert any("reward_std" in row for row in mine["logs"])


@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "DPO", "KTO", "SFT", "Distillation"])
def test_every_trainer_goes_through_our_op(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rlad_kernels.integrations.trl import patch as ours

    def broken(*_: Any, **__: Any) -> None:
        raise ArithmeticError("our op was called")

    monkeypatch.setattr(ours, "score", broken)
    with ours.use_rlad_kernels(), pytest.raises(ArithmeticError, match="our op was called"):
        train(kind, tmp_path, max_steps=1)


@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (5.0, 0.7)])
def test_the_function_equals_trls(softcap: float | None, scale: float):
    from trl.kernels import ChunkedLogProbFunction as theirs

    from rlad_kernels.integrations.trl import ChunkedLogProbFunction as ours

    hidden, weight, bias = torch.randn(37, 48), torch.randn(501, 48) * 0.3, torch.randn(501)
    target = (hidden @ weight.T + bias).argmax(1).where(torch.arange(37) % 2 == 0, torch.randint(0, 501, (37,)))
    results = []
    for function in (theirs, ours):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        out = function.apply(*leaves, target, 0.8, 128, softcap, scale)
        assert out[0] is not None and out[1] is not None
        (out[0] * torch.linspace(-1, 1, 37) + out[1] * torch.linspace(0, 0.3, 37)).sum().backward()
        results.append((*out, *[x.grad for x in leaves]))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
        torch.testing.assert_close(b.float(), a.float(), rtol=1e-5, atol=4e-6)
    assert results[0][4].any() and not results[0][4].all()
    assert ours.apply(hidden, weight, bias, target, 1.0, 128, outputs=())[1:] == (None,) * 4


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_equals_trls(beta: float):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as theirs

    from rlad_kernels.integrations.trl import ChunkedDivergenceFunction as ours

    student = torch.randn(37, 48), torch.randn(501, 48) * 0.3, torch.randn(501)
    teacher = torch.randn(37, 24), torch.randn(501, 24) * 0.4, torch.randn(501)
    results = []
    for function in (theirs, ours):
        leaves = [x.clone().requires_grad_() for x in student]
        divergence, entropy = function.apply(*leaves, *teacher, beta, 0.8, 0.7, 5.0, 1.2, None)
        assert not entropy.requires_grad
        (divergence * torch.linspace(-1, 1, 37)).sum().backward()
        results.append((divergence, entropy, *[x.grad for x in leaves]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=4e-6)
    with pytest.raises(ValueError, match="501 ids, the teacher's 499; cut the larger head"):
        ours.apply(*student, teacher[0], teacher[1][:499], None, beta)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.zeros(1).long()}, r"targets has shape \(1,\), wanted \(9,\)"),
        ({"targets": torch.zeros(9, 1).long()}, r"targets has shape \(9, 1\)"),
        ({"targets": torch.zeros(9)}, "targets must be integers, got torch.float32"),
        ({"targets": torch.full((9,), 31)}, r".* must be in \[0, vocab_size=31\), got 31"),
        ({"outputs": ("entropies",)}, r"outputs must be a tuple of names among \('log_probs', 'entropy', .*got \('entropies',\)"),
        ({"outputs": "entropy"}, "outputs must be a tuple of names"),
    ],
)
def test_the_function_refuses_what_does_not_fit(changes: dict[str, Any], message: str):
    from rlad_kernels.integrations.trl import ChunkedLogProbFunction as ours

    given = {"hidden": torch.randn(9, 8), "weight": torch.randn(31, 8), "bias": None, "targets": torch.zeros(9).long()}
    given |= {"temperature": 1.0, "chunk_size": 128}
    with pytest.raises(ValueError, match=f"^ChunkedLogProbFunction: {message}"):
        ours.apply(**{**given, **changes})
    assert ours.apply(**given, outputs=("log_probs",))[1:] == (None,) * 4
    packed, wide = ours.apply(**given), {k: given[k].unsqueeze(0) for k in ("hidden", "targets")}
    assert all(torch.equal(x, y[0]) for x, y in zip(packed, ours.apply(**{**given, **wide}), strict=True))


def test_the_divergence_refuses_what_does_not_fit():
    from rlad_kernels.integrations.trl import ChunkedDivergenceFunction as ours

    hidden, weight = torch.randn(9, 8), torch.randn(31, 8)
    for states, beta, message in (
        (hidden[:1], 0.5, r"teacher_hidden has shape \(1,\), wanted \(9,\)"),
        (hidden, 1.5, r"beta must be in \[0, 1\], got 1.5"),
        (hidden, float("nan"), r"beta must be in \[0, 1\], got nan"),
    ):
        with pytest.raises(ValueError, match=f"^ChunkedDivergenceFunction: {message}"):
            ours.apply(hidden, weight, None, states, weight, None, beta)


def test_a_model_made_before_the_patch_uses_it_until_undo(monkeypatch: pytest.MonkeyPatch):
    from trl.trainer.utils import add_fused_lm_head

    from rlad_kernels.integrations.trl import patch as ours

    rows: list[int] = []
    score = ours.score
    monkeypatch.setattr(ours, "score", lambda name, hidden, *a, **k: rows.append(len(hidden)) or score(name, hidden, *a, **k))
    model = tiny.model()
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    add_fused_lm_head(model, 0.8, outputs=outputs)
    ids = torch.randint(0, 256, (2, 7))
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    with ours.use_rlad_kernels():
        mine = model(input_ids=ids, labels=labels, fused_lm_head=True)
        none = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
        none.loss.backward()
    assert rows == [8, 0]  # masked rows are not computed
    assert none.loss == 0  # and gradients that DDP can wait for: 0 and not None
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    theirs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert rows == [8, 0]
    for name in ("loss", *outputs, "label_mask"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-5, atol=4e-6)


def test_undo_restores_every_name(monkeypatch: pytest.MonkeyPatch):
    import sys

    import trl.kernels
    import trl.trainer.grpo_trainer
    import trl.trainer.utils

    from rlad_kernels.integrations.trl import patch as ours

    def names() -> dict[tuple[str, str], Any]:
        modules = {k: m for k, m in list(sys.modules.items()) if k == "trl" or k.startswith("trl.")}
        wanted = ("ChunkedLogProb", "ChunkedDivergence", "add_fused_lm_head", "_use_triton")
        return {(k, n): v for k, m in modules.items() for n, v in vars(m).items() if any(w in n for w in wanted)}

    with ours.use_rlad_kernels():  # imports what it patches
        pass
    before = names()
    first = ours.use_rlad_kernels()
    with ours.use_rlad_kernels():
        assert trl.kernels.ChunkedLogProbFunction is ours.ChunkedLogProbFunction
        assert trl.trainer.grpo_trainer.add_fused_lm_head is not before["trl.trainer.grpo_trainer", "add_fused_lm_head"]
        late = ModuleType("trl.late")  # a module of TRL's that is imported under the patch
        monkeypatch.setitem(sys.modules, "trl.late", late)
        exec("from trl.trainer.utils import add_fused_lm_head", vars(late))
        assert vars(late)["add_fused_lm_head"] is not before["trl.trainer.utils", "add_fused_lm_head"]
    assert trl.kernels.ChunkedLogProbFunction is ours.ChunkedLogProbFunction
    first.undo()
    first.undo()
    after = names()
    assert {k: after[k] for k in before} == before
    assert after["trl.late", "add_fused_lm_head"] is before["trl.trainer.utils", "add_fused_lm_head"]


@pytest.mark.parametrize("times", [1.04, 0.96])
def test_a_factor_that_the_configuration_does_not_say_is_refused(times: float):
    from trl.trainer import utils

    from rlad_kernels.integrations.trl import patch as ours

    model = tiny.model("Cohere", logit_scale=0.25)
    model.logit_scale *= times
    with (
        ours.use_rlad_kernels(),
        pytest.raises(ValueError, match=r"TRL takes the head of CohereForCausalLM for .*'logit_scale': 0.25"),
    ):
        utils.add_fused_lm_head(model)


def test_wrong_wiring_names_the_fix():
    import trl
    from peft import LoraConfig, get_peft_model
    from trl.trainer import utils

    from rlad_kernels.integrations.trl import patch as ours

    with ours.use_rlad_kernels():
        adapted = get_peft_model(tiny.model(), LoraConfig(target_modules=["lm_head"]))
        with pytest.raises(ValueError, match="remove it from target_modules"):
            utils.add_fused_lm_head(adapted.get_base_model())
        with pytest.raises(ValueError, match="pass the head of the model that gave the hidden states"):
            trl.kernels.ChunkedLogProbFunction.apply(torch.randn(3, 8), torch.randn(9, 16), None, torch.zeros(3).long(), 1.0, 128)
