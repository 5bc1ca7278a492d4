"""Tiny models and a byte-level tokenizer, built in memory."""

from __future__ import annotations

from typing import Any

import torch

BYTES, EOS, PAD = 256, 256, 257
VOCAB = 264  # of the models: six ids are padding


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE({**alphabet, "<eos>": EOS, "<pad>": PAD}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def config(kind: str = "Qwen3", **changes: Any) -> Any:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    sizes |= {"num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": 256, "initializer_range": 0.1}
    sizes |= {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
    return getattr(transformers, f"{kind}Config")(**{**sizes, **changes})


def model(kind: str = "Qwen3", *, seed: int = 0, **changes: Any) -> Any:
    """A float32 causal LM of a ``kind`` of transformers; equal seeds give equal weights."""
    import transformers

    torch.manual_seed(seed)
    with torch.device("cpu"):
        made = getattr(transformers, f"{kind}ForCausalLM")(config(kind, **changes))
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = EOS, PAD
    return made.float()
