"""Causal LMs of transformers without logits: loss and gradients of the unpatched model, alone and in Trainer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from rlad_kernels import LMHead
from tests import tiny

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers not installed"),
]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "output_router_logits": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("Qwen3", {}),
    "Llama": ("Llama", {"tie_word_embeddings": True, "mlp_bias": True}),
    "Gemma 2": ("Gemma2", {"final_logit_softcapping": 2.0, "layer_types": ["full_attention"] * 2}),
    "Gemma 3": ("Gemma3", {"final_logit_softcapping": 3.0, "layer_types": ["sliding_attention", "full_attention"]}),
    "Granite": ("Granite", {"logits_scaling": 3.0}),
    "Cohere": ("Cohere", {"logit_scale": 0.25}),
    "Qwen3 MoE": ("Qwen3Moe", {**MOE, "router_aux_loss_coef": 0.3}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.3}),
}


def build(name: str) -> Any:
    kind, changes = MODELS[name]
    if kind == "Gemma3":
        import transformers

        config = tiny.config("Gemma3Text" if hasattr(transformers, "Gemma3TextConfig") else kind, **changes)
        torch.manual_seed(0)
        return transformers.Gemma3ForCausalLM(config).float()
    return tiny.model(kind, **changes)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 256, (3, 11))
    attention = (torch.arange(11) < torch.tensor([11, 6, 9]).unsqueeze(1)).long()
    return {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(attention == 0, -100)}


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[Any, torch.Tensor]:
    model.train()
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("items", [None, torch.tensor(40)])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_are_the_models_own(name: str, items: torch.Tensor | None):
    from rlad_kernels.integrations.transformers import use_rlad_loss

    model, inputs = build(name), batch()
    theirs, wanted = loss_and_gradients(model, **inputs, num_items_in_batch=items)
    with use_rlad_loss(model):
        ours, found = loss_and_gradients(model, **inputs, num_items_in_batch=items)
        assert ours.logits is None
        model.eval()
        assert model(**inputs).logits is not None
    assert abs(ours.loss - theirs.loss) <= 2e-6 * abs(theirs.loss)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    if "aux_loss" in theirs:
        torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
    assert loss_and_gradients(model, **inputs)[0].logits is not None


def test_lora_with_a_frozen_head():
    peft = pytest.importorskip("peft", reason="peft not installed: pip install -r requirements-dev.txt")
    from rlad_kernels.integrations.transformers import use_rlad_loss

    model, inputs = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)), batch()
    theirs, wanted = loss_and_gradients(model, **inputs)
    with use_rlad_loss(model):
        ours, found = loss_and_gradients(model, **inputs)
    assert ours.logits is None and abs(ours.loss - theirs.loss) <= 2e-6 * abs(theirs.loss)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm() and wanted.norm() > 0


def trained(tmp_path: Path, ours: bool, **options: Any) -> tuple[list[torch.Tensor], list[float], list[torch.Tensor]]:
    """Five steps of SGD with batches of unequal length, two to a step."""
    from transformers import Trainer, TrainingArguments

    from rlad_kernels.integrations.transformers import use_rlad_loss

    model = tiny.model()
    before = [p.detach().clone() for p in model.parameters()]
    if ours:
        use_rlad_loss(model)
    made = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, 256, (int(n),), generator=made) for n in torch.randint(3, 14, (40,), generator=made)]

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [x["input_ids"] for x in items]
        ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(x) for x in ids], batch_first=True, padding_value=tiny.PAD)
        return {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long(), "labels": ids.masked_fill(ids == tiny.PAD, -100)}

    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        lr_scheduler_type="constant", max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1,
        disable_tqdm=True, remove_unused_columns=False, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": x} for x in rows], data_collator=collate)
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    return before, losses, [p.detach() for p in model.parameters()]


def test_trainer_counts_the_items_of_all_accumulated_batches(tmp_path: Path):
    before, losses, theirs = trained(tmp_path, False)
    _, found, ours = trained(tmp_path, True)
    assert found == pytest.approx(losses, rel=1e-5)
    change = sum((a - b).norm() ** 2 for a, b in zip(theirs, before, strict=True)) ** 0.5
    gap = sum((a - b).norm() ** 2 for a, b in zip(theirs, ours, strict=True)) ** 0.5
    assert change > 1e-2
    assert gap <= 1e-4 * change


def test_wrong_wiring_names_the_fix(monkeypatch: pytest.MonkeyPatch):
    from rlad_kernels.integrations import transformers as ours

    model = tiny.model()
    plain = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.loss = None if out.loss is None else out.loss * 2
        return out

    monkeypatch.setattr(model, "forward", doubled)
    with pytest.raises(ValueError, match="its forward does more than LMHead knows"):
        ours.use_rlad_loss(model)
    head = LMHead.from_model(model)
    with pytest.raises(ValueError, match="pass one of them"):
        ours.causal_lm_loss(torch.randn(1, 3, 32), head)
    model.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(ValueError, match="wanted a linear layer"):
        ours.use_rlad_loss(model)
