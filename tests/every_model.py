"""Every causal LM of the installed transformers from a small configuration, and what becomes of its head: docs/wiring.md's table.

``python -m tests.every_model`` writes that table anew.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.probe import backbone_of

os.environ["HF_HUB_OFFLINE"] = "1"
PAGE = Path(__file__).parent.parent / "docs" / "wiring.md"
EPS = torch.finfo(torch.float32).eps
KINDS = ("agrees", "refused", "not built")
V, LARGEST = 97, 30_000_000  # ids; parameters of a model that is still built
SIZES = {
    32: "hidden_size n_embd d_model dim embed_dim hidden_dim emb_dim word_embed_proj_dim embedding_size encoder_hidden_size "
    "decoder_hidden_size lru_width attention_hidden_size out_hidden_size cross_attention_hidden_size projection_dim",
    48: "intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner d_ff ffn_hidden_size moe_intermediate_size "
    "shared_expert_intermediate_size dense_intermediate_size dim_ff expert_ffn_hidden_size mlp_dim",
    2: "num_hidden_layers n_layer n_layers num_layers depth num_attention_heads n_head n_heads num_heads encoder_layers "
    "decoder_layers encoder_attention_heads decoder_attention_heads num_encoder_layers num_decoder_layers num_mem_blocks "
    "num_key_value_heads num_kv_heads multi_query_group_num num_experts_per_tok moe_topk moe_k num_experts_per_token "
    "top_k_experts moe_top_k index_n_heads linear_num_value_heads linear_num_key_heads linear_num_heads",
    1: "n_group topk_group n_shared_experts num_shared_experts mamba_n_groups n_groups first_k_dense_replace",
    16: "head_dim kv_channels v_head_dim global_head_dim swa_head_dim q_lora_rank kv_lora_rank index_head_dim index_topk "
    "linear_key_head_dim linear_value_head_dim linear_head_dim state_size mamba_d_state",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim hidden_size_per_layer_input",
    4: "num_experts n_routed_experts num_local_experts moe_num_experts",
    V: "vocab_size vocab_size_per_layer_input",
    64: "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_sequence_length",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
HEAD = {  # what a forward may do to logits: strong enough to be missed
    "final_logit_softcapping": 3.0, "logits_soft_cap": 3.0, "output_logit_soft_cap": 3.0, "logit_scale": 0.25,
    "logits_scaling": 4.0, "lm_head_multiplier": 0.3, "output_multiplier": 0.3,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SECTIONS = {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}}
CHANGES: dict[str, dict[str, Any]] = {  # what has to fit, and what a default configuration leaves out
    "BambaForCausalLM": {"mamba_n_heads": 4},
    "CodeGenForCausalLM": {"n_head": 4},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": ROPE}},
    "CohereCompassForConditionalGeneration": {"text_config": {"rope_parameters": {"full_attention": ROPE}}},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "DeepseekOcr2ForConditionalGeneration": {"text_config": {"mlp_layer_types": ["dense", "dense"]}},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "Glm46VForConditionalGeneration": SECTIONS,
    "Glm4vForConditionalGeneration": SECTIONS,
    "Glm4vMoeForConditionalGeneration": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}},
    "GlmOcrForConditionalGeneration": SECTIONS,
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridForCausalLM": {"mamba_n_heads": 4},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 16},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 16},
    "Inkling2ForConditionalGeneration": {"vision_config": {"text_hidden_size": 32}},
    "Lfm2MoeForCausalLM": {"layer_types": ["full_attention", "conv"]},
    "LongcatFlashForCausalLM": {"head_dim": 8},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 16},
    "MiMoV2FlashForCausalLM": {"num_key_value_heads": 1},
    "MinistralForCausalLM": {"head_dim": 16},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "PaddleOCRVLForConditionalGeneration": SECTIONS,
    "Qwen2_5OmniThinkerForConditionalGeneration": SECTIONS,
    "Qwen2_5_VLForConditionalGeneration": SECTIONS,
    "Qwen2VLForConditionalGeneration": SECTIONS,
    "ReformerModelWithLMHead": {"is_decoder": True, "axial_pos_embds": False},
    "Step3p7ForConditionalGeneration": {"text_config": {"sliding_window": 8}},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91, "<|visual token 000000|>": 92}},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 90, "IMGIMGBZ": 91}},
}


def names() -> dict[str, str]:
    """Class → kind of causal LMs, and of those that read images as well."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, str] = {}
    for table in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for kind, name in table.items():
            found.setdefault(name, kind)
    return found


def small(cls: Any, changes: dict[str, Any]) -> Any:
    """A configuration of ``cls`` with every size that SMALL names made small, those inside it as well."""
    import transformers

    default, made = cls(), {}
    for name, value in vars(default).items():
        if isinstance(value, transformers.PreTrainedConfig):
            made[name] = small(type(value), changes.get(name, {}))
        elif name in HEAD:
            made[name] = HEAD[name]
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool) and value > SMALL[name]:
            made[name] = SMALL[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= V:
            made[name] = V - 7
    rope = getattr(default, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        made["head_dim"] = 2 * sum(rope["mrope_section"])
        made["hidden_size"] = made["num_attention_heads"] * made["head_dim"]
    fields = getattr(cls, "__dataclass_fields__", None)
    made = {k: v for k, v in made.items() if fields is None or k in fields}
    return cls(**{**made, **{k: v for k, v in changes.items() if k not in made or not isinstance(v, dict)}})


def build(name: str) -> Any:
    """A float32 model, its head's weights thirty times as large and its biases random."""
    import transformers

    transformers.logging.set_verbosity_error()
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("ignore")
        config = small(cls.config_class, CHANGES.get(name, {}))
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        if size > LARGEST:
            raise ValueError(f"still {size / 1e6:.0f} million parameters")
        model = cls(config).float().eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        if isinstance(getattr(head, "weight", None), Tensor):
            head.weight.mul_(30)
        if isinstance(getattr(head, "bias", None), Tensor):
            head.bias.normal_()
    return model


def gap(model: Any, head: rk.LMHead) -> tuple[float, float]:
    """(largest error of log-probs in units of its bound, largest log-prob's distance from that of a bare product)."""
    ids = torch.randint(3, V - 10, (1, 4), generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {})}
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted or "kwargs" in accepted:
        given["use_cache"] = False
    with torch.no_grad():
        want = model(**given)
        want = (want[0] if isinstance(want, tuple) else want.logits).double().log_softmax(-1)
        hidden = backbone_of(model)(**given)
        hidden = (hidden[0] if isinstance(hidden, tuple) else hidden.last_hidden_state).float()
        count = want.shape[-1]
        found = rk.linear_gather(hidden, head, torch.arange(count, device="cpu").expand(1, 4, count)).double().log_softmax(-1)
        bare = (hidden @ head.weight.T)[..., :count].double().log_softmax(-1)
        terms = hidden.abs().double() @ head.weight.abs().double().T + (0 if head.bias is None else head.bias.abs())
    bound = (hidden.shape[-1] + 8) * EPS * (terms * abs(head.logit_scale)).amax(-1, keepdim=True) + 8 * EPS * want.abs()
    return float(((found - want).abs() / bound).max()), float((bare - want).abs().max())


def outcome(name: str) -> tuple[str, str]:
    """What the table says of a class: ``agrees`` and the formula, ``refused`` and why, ``not built`` and the error."""
    try:
        model = build(name)
    except Exception as error:
        text = re.sub(r"\s+|`", " ", str(error)).split("ValueError: ")[-1].split(";")[0]
        return "not built", " ".join(text.split(". ")[0].split())[:120].rstrip(" .")
    try:
        head = rk.LMHead.from_model(model)
    except ValueError as error:
        why = str(error).removeprefix(f"LMHead.from_model: {name} ")
        return "refused", re.split(";|: | with ", why)[0]
    error, bare = gap(model, head)
    said = formula(head)
    if error > 1 or (said[0] != "h" and bare < 0.1):
        return "wrong", f"{said}: {error:.3g} bounds from the model's own, a bare product is {bare:.3g} nats from it"
    return "agrees", said


def formula(head: rk.LMHead) -> str:
    inner = "h·Wᵀ" + ("" if head.bias is None else " + b")
    if head.logit_scale != 1:
        inner = f"{head.logit_scale:g}·" + (inner if head.bias is None else f"({inner})")
    cap = "" if head.softcap is None else f"{head.softcap:g}"
    return f"{cap}·tanh({inner}/{cap})" if cap else inner


def rows() -> dict[str, tuple[str, str]]:
    """Class → outcome and reason, as docs/wiring.md has them."""
    cells = (line.strip("| ").split(" | ") for line in PAGE.read_text().split("\n") if line.startswith("| "))
    return {name: (kind, why.strip("`")) for kind, why, found in (x for x in cells if x[0] in KINDS) for name in found.split(", ")}


def main() -> None:
    """Write the table into the page."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names():
        found[outcome(name)].append(name)
        print(name, *outcome(name), flush=True)
    table = ["| | how, or why not | classes |", "|---|---|---|"]
    for kind in KINDS:
        these = sorted((x for x in found if x[0] == kind), key=lambda x: -len(found[x]))
        table += [f"| {kind} | `{why}` | {', '.join(sorted(found[kind, why], key=str.lower))} |" for kind, why in these]
    head, _, tail = re.split(r"(?<=-->\n)(.*)(?=\n<!-- end)", PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(head + "\n".join(table) + tail)


if __name__ == "__main__":
    main()
