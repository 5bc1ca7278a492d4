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
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("Qwen3", {}),
    "Llama": ("Llama", {"tie_word_embeddings": True, "mlp_bias": True}),
    "Gemma 2": ("Gemma2", {"final_logit_softcapping": 2.0, "layer_types": ["full_attention"] * 2}),
    "Gemma 3": ("Gemma3", {"final_logit_softcapping": 3.0, "layer_types": ["sliding_attention", "full_attention"]}),
    "Granite": ("Granite", {"logits_scaling": 3.0}),
    "MiniCPM3": ("MiniCPM3", {**MLA, "num_key_value_heads": 2, "dim_model_base": 10}),
    "Cohere": ("Cohere", {"logit_scale": 0.25}),
    "Qwen3 MoE": ("Qwen3Moe", {**MOE, "router_aux_loss_coef": 0.3}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.3}),
    "Doge": ("Doge", {**MOE, "is_moe": True, "num_experts": 16, "router_aux_loss_coef": 0.3}),
    "Llama 4": ("Llama4", {"num_local_experts": 4, "intermediate_size_mlp": 48, "output_router_logits": True}),
    "Qwen3-VL MoE": ("Qwen3VLMoe", {**MOE, "router_aux_loss_coef": 0.3}),
}


def build(name: str) -> Any:
    import transformers

    kind, changes = MODELS[name]
    torch.manual_seed(0)
    with torch.device("cpu"):
        if kind in ("Gemma3", "Llama4"):
            config = tiny.config(kind + "Text", **changes)
            return getattr(transformers, f"{kind}ForCausalLM")(config).float()
        if kind == "Qwen3VLMoe":
            rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
            vision = {"hidden_size": 16, "depth": 1, "num_heads": 1, "intermediate_size": 16, "out_hidden_size": 32}
            text = tiny.config("Qwen3VLMoeText", **changes, rope_parameters=rope).to_dict()
            config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
            return transformers.Qwen3VLMoeForConditionalGeneration(config).float()
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


@pytest.mark.parametrize("ignored", [-100, 0, 7, 300])
def test_the_label_that_is_left_out_is_the_one_that_is_named(ignored: int):
    from transformers.loss.loss_utils import ForCausalLMLoss

    from rlad_kernels.integrations.transformers import causal_lm_loss

    hidden, weight, labels = torch.randn(2, 9, 16), torch.randn(20, 16), torch.randint(0, 20, (2, 9))
    labels[0, 3:5] = ignored
    ours = causal_lm_loss(hidden, LMHead(weight), labels, ignore_index=ignored)
    theirs = ForCausalLMLoss(hidden @ weight.T, labels, 20, ignore_index=ignored)
    assert abs(ours - theirs) <= 2e-6 * theirs


@pytest.mark.parametrize("name", ["Qwen3 MoE", "Mixtral", "Doge"])
def test_arguments_by_position_count(name: str):
    from rlad_kernels.integrations.transformers import use_rlad_loss

    model, inputs = build(name), batch()
    model.train()
    order = (inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"])
    theirs, other = model(*order), model(inputs["input_ids"], labels=inputs["labels"])
    with use_rlad_loss(model):
        ours = model(*order)
    assert ours.logits is None
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert abs(other.aux_loss - theirs.aux_loss) > 1e-4  # without the mask it is another


@pytest.mark.parametrize("both", [False, True])
def test_labels_that_are_shifted_already(both: bool):
    from rlad_kernels.integrations.transformers import use_rlad_loss

    model, inputs = tiny.model(), batch()
    wanted = model(**inputs).loss
    labels = inputs.pop("labels")
    inputs["shift_labels"] = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with use_rlad_loss(model):
        out = model.train()(**inputs, **({"labels": labels} if both else {}))
    assert out.logits is None and abs(out.loss - wanted) <= 2e-6 * wanted


def test_it_gives_what_the_model_gives_but_logits():
    from rlad_kernels.integrations.transformers import use_rlad_loss

    model, inputs = build("Qwen3 MoE"), batch()
    model.set_attn_implementation("eager")
    model.train()
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    theirs = model(**inputs, **asked)
    with use_rlad_loss(model):
        ours = model(**inputs, **asked)
        plain = model(**inputs)
        pair = model(**inputs, return_dict=False)
    assert type(ours) is type(theirs) and ours.keys() == theirs.keys() - {"logits"}
    for name in ("hidden_states", "attentions", "router_logits"):
        for mine, his in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(mine, his)
    assert ours.past_key_values.get_seq_length() == 11 and plain.past_key_values is None and plain.hidden_states is None
    assert torch.equal(pair[0], plain.loss) and torch.equal(pair[1], plain.aux_loss) and len(pair) == len(plain)


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0), torch.tensor([0.0])])
def test_without_a_label_the_loss_is_zero(items: torch.Tensor | int | None):
    from rlad_kernels.integrations.transformers import use_rlad_loss

    model, inputs = tiny.model(), batch()
    inputs["labels"].fill_(-100)
    theirs, wanted = loss_and_gradients(model, **inputs, num_items_in_batch=items)
    with use_rlad_loss(model):
        ours, found = loss_and_gradients(model, **inputs, num_items_in_batch=items)
    assert ours.loss == 0 and theirs.loss.isnan()
    assert (found == 0).all() and (wanted == 0).all()


def test_a_loss_that_the_model_computes_by_itself_is_refused():
    import transformers

    from rlad_kernels.integrations.transformers import use_rlad_loss

    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 16, "num_mel_bins": 8}
    config = transformers.Qwen2AudioConfig(
        audio_config={**audio, "max_source_positions": 8}, text_config=tiny.config("Qwen2").to_dict(), audio_token_index=263
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config).float()
    kind = type(model)
    for check in (True, False):  # it leaves out labels where attention_mask is 0
        with pytest.raises(ValueError, match="Qwen2AudioForConditionalGeneration computes its loss from logits by itself"):
            use_rlad_loss(model, check=check)
            model.train()(**batch())
    assert kind is not type(model) and model.eval()(**batch()).loss > 0
    model = tiny.model()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM.loss_function is .* wanted transformers' ForCausalLMLoss"):
        use_rlad_loss(model)


def test_a_loss_that_the_model_makes_twice_is_refused():
    from rlad_kernels.integrations.backbone import without_logits

    model, inputs = tiny.model(), batch()

    def forward(**given: Any) -> Any:
        out = model(**given)
        model.loss_function(logits=out.logits, labels=given["labels"], vocab_size=model.config.vocab_size)
        return out

    with pytest.raises(ValueError, match=r"^mine: Qwen3ForCausalLM computes its loss from logits by itself"):
        without_logits("mine", model, forward, inputs, lambda hidden, *args, **kwargs: hidden.sum())


def test_lora_with_a_frozen_head():
    peft = pytest.importorskip("peft", reason="peft not installed: pip install -r requirements-dev.txt")
    from rlad_kernels.integrations.transformers import use_rlad_loss

    model, inputs = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)), batch()
    theirs, wanted = loss_and_gradients(model, **inputs)
    with use_rlad_loss(model):
        ours, found = loss_and_gradients(model, **inputs)
    assert ours.logits is None and abs(ours.loss - theirs.loss) <= 2e-6 * abs(theirs.loss)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm() and wanted.norm() > 0


def trained(tmp_path: Path, ours: bool, no_label: bool = False) -> tuple[list[torch.Tensor], list[float], list[torch.Tensor]]:
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
        labels = ids.masked_fill((ids == tiny.PAD) | no_label, -100)
        return {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long(), "labels": labels}

    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        lr_scheduler_type="constant", max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1,
        disable_tqdm=True, remove_unused_columns=False,
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


def test_trainer_goes_on_where_no_token_has_a_label(tmp_path: Path):
    before, losses, after = trained(tmp_path, True, no_label=True)
    assert losses == [0.0] * 5
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_wrong_wiring_names_the_fix():
    from rlad_kernels.integrations import transformers as ours

    class Louder(type(tiny.model())):
        def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.loss = None if labels is None else self.loss_function(2 * out.logits, labels, out.logits.shape[-1])
            return out

    model = tiny.model()
    model.__class__ = Louder
    with pytest.raises(ValueError, match="its forward does more than LMHead knows"):
        ours.use_rlad_loss(model)
    model = tiny.model()
    head = LMHead.from_model(model)
    with pytest.raises(ValueError, match="pass one of them"):
        ours.causal_lm_loss(torch.randn(1, 3, 32), head)
    model.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(ValueError, match="wanted a linear layer"):
        ours.use_rlad_loss(model)
