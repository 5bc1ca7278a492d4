"""LMHead: everything between hidden states and tempered logits, bundled once."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LMHead:
    """z = softcap·tanh(logit_scale·(h·W_v + b_v)/softcap)/temperature; without ``softcap``, without the tanh.

    Args:
        weight: ``(V, D)`` float32, bfloat16 or float16 (float64 on CPU); never copied if its last dimension is contiguous
            (another layout is copied once, here: make the head anew after the weight has changed).
        bias: ``(V,)`` of the weight's dtype, or None.
        temperature: positive float, or a tensor in the target's shape. It never receives gradient.
        logit_scale: float factor on the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: positive float (Gemma 2's ``final_logit_softcapping``) or None.
        vocab_size: rows of ``weight`` beyond it do not exist; None means all V.
        group: process group of a vocabulary-parallel head; not available yet, must be None.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """

    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    temperature: float | Tensor = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    group: Any = None

    def __post_init__(self) -> None:
        weight, bias, temperature, softcap = self.weight, self.bias, self.temperature, self.softcap
        if weight.dim() != 2:
            raise ValueError(f"LMHead: weight must be (V, D), got shape {tuple(weight.shape)}")
        rows = weight.shape[0]
        if bias is not None and tuple(bias.shape) != (rows,):
            raise ValueError(f"LMHead: bias must be (V,)=({rows},), got shape {tuple(bias.shape)}")
        if bias is not None and bias.dtype != weight.dtype:
            raise ValueError(f"LMHead: bias must have the weight's dtype {weight.dtype}, got {bias.dtype}")
        if bias is not None and bias.device != weight.device:
            raise ValueError(f"LMHead: bias is on {bias.device}, weight on {weight.device}; they must share a device")
        if not isinstance(temperature, Tensor) and not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"LMHead: temperature must be a positive float or a tensor, got {temperature!r}")
        if not math.isfinite(self.logit_scale) or self.logit_scale == 0:
            raise ValueError(f"LMHead: logit_scale must be a finite non-zero float, got {self.logit_scale!r}")
        if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
            raise ValueError(f"LMHead: softcap must be a positive float or None, got {softcap!r}")
        size = self.vocab_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= rows):
            raise ValueError(f"LMHead: vocab_size must be an int in [1, V={rows}], got {self.vocab_size!r}")
        if self.group is not None:
            raise ValueError(f"LMHead: group must be None, vocabulary-parallel heads are not available yet; got {self.group!r}")
        put = object.__setattr__
        put(self, "vocab_size", rows if size is None else size)
        if weight.stride(-1) != 1 and weight.shape[1] > 1:
            put(self, "weight", weight.contiguous())

    @classmethod
    def from_model(cls, model: Any, *, temperature: float | Tensor = 1.0, vocab_size: int | None = None) -> LMHead:
        """The head of a transformers causal LM, with its bias, softcap and logit scale; padding is never guessed.

        Args:
            model: a model with ``get_output_embeddings()`` and ``config`` (Qwen, Llama, SmolLM2, Gemma, Cohere, Granite, …).
            temperature: as in :class:`LMHead`.
            vocab_size: pass the tokenizer's size if the embedding is padded.

        Raises:
            ValueError: if the model has no plain linear output embedding.
        """
        linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        weight = getattr(linear, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(
                f"LMHead.from_model: model must have a linear get_output_embeddings(), {type(model).__name__} gave {linear!r}"
            )
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        kind = getattr(config, "model_type", "")
        scale = float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
        if kind != "mpt":  # whose logit_scale transformers does not apply; Cohere's it does
            scale *= float(getattr(config, "logit_scale", None) or 1.0)
        scaling = float(getattr(config, "logits_scaling", None) or 1.0)
        scale = scale * scaling if kind == "hyperclovax" else scale / scaling  # Granite divides
        caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))  # Gemma 2, RecurrentGemma
        return cls(
            weight,
            getattr(linear, "bias", None),
            temperature=temperature,
            logit_scale=scale,
            softcap=next((float(cap) for cap in caps if cap), None),
            vocab_size=vocab_size,
        )
