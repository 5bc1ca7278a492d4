"""``python -m rlad_kernels plan``: what a training step holds at its peak, by loss path, and how many tokens fit."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlad_kernels.backends.contract import has_bf16_mm
from rlad_kernels.core.sizes import byte_size
from rlad_kernels.engine.held import held_rows
from rlad_kernels.engine.tiles import dlogits_wait, scratch_size, slab_columns, tile_sizes

PATHS = ("naive", "linear_logp", "linear_loss", "topk_kl", "linear_topk")
OPTIMIZERS = {  # bytes a parameter of dtype size b: states, and a copy that torch's update makes of one
    "adamw": (lambda b: 2 * b, lambda b: b, "two moments in the weights' dtype, as torch.optim makes them"),
    "adamw-fp32": (lambda b: 12, lambda b: 4, "float32 weights and two float32 moments beside the weights"),
    "adamw-8bit": (lambda b: 2, lambda b: 0, "two 8-bit moments"),
    "sgd": (lambda b: 0, lambda b: 0, "no state"),
}
# Bytes a row and a slot (token × K) of the small tensors around a sweep, as many as add_slots and a truncated KL hold at once,
# by measurement; tests/test_plan.py holds them to it.
_ROW, _SLOT = 80, {"linear_topk": 46, "topk_kl": 80}


@dataclass(frozen=True)
class Model:
    """The sizes of a dense decoder: hidden D, vocabulary V, blocks, attention and MLP widths."""

    hidden: int
    vocab: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    tied: bool

    @property
    def head(self) -> int:
        """Parameters of the LM head."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """All of them; biases and the norms of queries and keys, under 0.1 %, are left out."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        block = attention + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.head * (1 if self.tied else 2) + self.blocks * block + self.hidden


MODELS = {
    "SmolLM2-135M": Model(576, 49_152, 30, 9, 3, 64, 1536, True),
    "Gemma-3-270M": Model(640, 262_144, 18, 4, 1, 256, 2048, True),
    "Qwen3-0.6B": Model(1024, 151_936, 28, 16, 8, 128, 3072, True),
    "Qwen3-1.7B": Model(2048, 151_936, 28, 16, 8, 128, 6144, True),
    "Qwen3-8B": Model(4096, 151_936, 36, 32, 8, 128, 12_288, False),
    "Llama-3-8B": Model(4096, 128_256, 32, 32, 8, 128, 14_336, False),
}


def model_of(name: str) -> Model:
    """A model of the table, in any case and with or without its organisation, or a transformers ``config.json`` or its folder.

    Raises:
        ValueError: for a name that is neither, or a model that is no dense decoder.

    Example:
        >>> from rlad_kernels.tools import plan
        >>> plan.model_of("Qwen/Qwen3-8B").vocab
        151936
    """
    known = {key.lower(): model for key, model in MODELS.items()}
    if (short := name.lower().rsplit("/", 1)[-1]) in known and not Path(name).exists():
        return known[short]
    file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not file.is_file():
        raise ValueError(f"plan: model must be one of {', '.join(MODELS)}, a config.json or its folder, got {name!r}")
    config = json.loads(file.read_text())
    config = config.get("text_config", config)
    if any(key in config for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ValueError(f"plan: {name} is a mixture of experts, which the plan does not count; wanted a dense decoder")
    try:
        d, heads = config["hidden_size"], config["num_attention_heads"]
        return Model(
            d,
            config["vocab_size"],
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or d // heads,
            config["intermediate_size"],
            config.get("tie_word_embeddings", config.get("model_type", "").startswith("gemma")),
        )
    except KeyError as key:
        raise ValueError(f"plan: {name} has no {key}, wanted a dense decoder's config") from None


def loss_bytes(path: str, n: int, d: int, v: int, *, dtype: torch.dtype, device: str = "cuda", k: int = 64, keep: int = 0) -> int:
    """Peak bytes of one loss above hidden states and head, forward and backward, the gradients of both included.

    ``keep`` is that of ``linear_logp``. ``linear_topk`` has no backward. Counted from the tensors each path makes; matrix
    libraries' own workspace is not.

    Example:
        >>> import torch
        >>> from rlad_kernels.tools import plan
        >>> paths = ("naive", "linear_logp")
        >>> [plan.loss_bytes(x, 8192, 1024, 151_936, dtype=torch.bfloat16) // 2**20 for x in paths]
        [14244, 793]
    """
    if path not in PATHS:
        raise ValueError(f"plan: path must be one of {PATHS}, got {path!r}")
    size, logits = dtype.itemsize, 4 * n * v
    gradients = (n + v) * d * size
    if path == "naive":  # log-probs, their gradient and the logits'; then that one, cast, and the products' results
        return max(3 * logits, n * v * size + gradients)
    if path == "topk_kl":
        return gradients + n * k * _SLOT[path]
    native = device == "cuda" or (dtype == torch.bfloat16 and has_bf16_mm())
    slab = d if size < 4 and (path == "linear_logp" or not native) else 0
    waits = path == "linear_loss" and native and dlogits_wait(n, d, dtype)
    lent = d * size if waits else 0
    rows, cols = tile_sizes(device, n, v, keep_logits=int(path == "linear_loss"), slab=slab, lent=lent)
    widened = 0 if native or size == 4 else 4 * d * (n + cols)
    held = 4 * scratch_size(rows, v if path == "linear_loss" else cols)
    total = widened + n * _ROW + (0 if held <= lent * v else held)
    if path == "linear_topk":
        return total + n * k * _SLOT[path]
    if size < 4:  # float32 sums beside the gradients, and dlogits as an operand of their own
        total += 4 * n * d
        if waits:
            total += size * n * v + 4 * d * min(slab_columns(device, d, 4), v)
        else:
            total += 4 * d * (v if path == "linear_loss" else cols) + (rows * cols * size if native else 0)
    if path == "linear_logp" and (kept := held_rows(n, v, 4, keep)):
        total += 4 * scratch_size(kept, v) + (4 * rows * cols if size == 4 else 0)
    return total + gradients


@dataclass(frozen=True)
class Plan:
    """A training step's choices.

    Example:
        >>> from rlad_kernels.tools import plan
        >>> step = plan.Plan(plan.model_of("Qwen3-8B"))
        >>> step.most_tokens("naive", 80 * 2**30) < step.most_tokens("linear_logp", 80 * 2**30)
        True
    """

    model: Model
    dtype: torch.dtype = torch.bfloat16
    optimizer: str = "adamw"
    checkpointing: bool = True
    device: str = "cuda"
    k: int = 64
    keep: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"plan: optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")

    def block_bytes(self, tokens: int) -> int:
        """What one block of a Llama-like model holds in its backward; an estimate, attention is taken as flash."""
        m, b = self.model, self.dtype.itemsize
        wide = 0 if b == 4 else 4  # norms save a float32 copy
        norms = 2 * m.hidden * (wide + 2 * b)
        attention = b * m.head_dim * (3 * m.heads + 4 * m.kv_heads)
        mlp = 7 * b * m.mlp  # gate, its SiLU, up and their product, and three gradients
        return tokens * (norms + attention + mlp + b * m.hidden)

    def static(self) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer states."""
        p, b = self.model.parameters, self.dtype.itemsize
        return {"weights": p * b, "gradients": p * b, "optimizer": p * OPTIMIZERS[self.optimizer][0](b)}

    def step(self, path: str, tokens: int) -> int:
        """Peak bytes of one step: the largest of the loss, the backward of the last and of the first block, and the update.

        ``linear_topk`` is a teacher: weights, one block's forward and the sweep, no gradients.
        """
        m, b = self.model, self.dtype.itemsize
        fixed, block, stream = self.static(), self.block_bytes(tokens), tokens * m.hidden * b
        loss = loss_bytes(path, tokens, m.hidden, m.vocab, dtype=self.dtype, device=self.device, k=self.k, keep=self.keep)
        if path == "linear_topk":
            return fixed["weights"] + stream + max(loss, block)
        kept = m.blocks * (stream if self.checkpointing else block)
        held = fixed["weights"] + fixed["optimizer"]
        at_loss = held + kept + stream + loss
        last_block = held + kept + stream + m.head * b + block
        embedding = m.head * b if m.tied else 0  # a gradient of its own before it is added to the head's
        first_block = held + fixed["gradients"] + 2 * stream + max(block, embedding)
        copied = m.parameters if self.device == "cuda" else 2 * max(m.head, m.hidden * m.mlp)  # foreach, or one by one
        update = held + fixed["gradients"] + copied * OPTIMIZERS[self.optimizer][1](b)
        return max(at_loss, last_block, first_block, update)

    def most_tokens(self, path: str, memory: int) -> int:
        """The largest number of tokens whose step fits, 0 if none does."""
        if self.step(path, 1) > memory:
            return 0
        low, high = 1, 2
        while self.step(path, high) <= memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.step(path, middle) <= memory else (low, middle)
        return low


def bar(size: int, whole: int, width: int = 30) -> str:
    """``size`` as a bar of which ``width`` is ``whole``; what is beyond it is cut off and marked."""
    length = round(width * size / whole) if whole else width + 1
    return "█" * length if length <= width else "█" * width + "▶"


def report(plan: Plan, name: str, tokens: int, memory: int) -> str:
    """The plan in words and a table."""
    gib, m = 2**30, plan.model
    fixed = plan.static()
    dtype = str(plan.dtype).removeprefix("torch.")
    kept = "block inputs, gradient checkpointing" if plan.checkpointing else "all blocks, no checkpointing"
    streams = m.blocks * (tokens * m.hidden * plan.dtype.itemsize if plan.checkpointing else plan.block_bytes(tokens))
    block = plan.block_bytes(tokens)
    lines = [
        f"{name}: {m.parameters / 1e9:.2f} B parameters, D {m.hidden}, V {m.vocab:,}, {m.blocks} blocks; {dtype} on {plan.device}",
        *(f"  {key:<12}{size / gib:9.2f} GiB   {bar(size, memory)}" for key, size in fixed.items()),
        f"  {'kept':<12}{streams / gib:9.2f} GiB   {bar(streams, memory)} {kept}" + ("" if plan.checkpointing else " (estimated)"),
        f"  {'one block':<12}{block / gib:9.2f} GiB   {bar(block, memory)} recomputed in the backward (estimated)",
        f"\n{tokens:,} tokens in one pass, {memory / gib:.4g} GiB; optimizer {plan.optimizer}: {OPTIMIZERS[plan.optimizer][2]}\n",
        f"{'loss':<20}{'loss alone':>14}{'whole step':>14}{'':>8}{'most tokens':>14}   whole step, of {memory / gib:.4g} GiB",
    ]
    for path in PATHS:
        loss = loss_bytes(path, tokens, m.hidden, m.vocab, dtype=plan.dtype, device=plan.device, k=plan.k, keep=plan.keep)
        step, most = plan.step(path, tokens), plan.most_tokens(path, memory)
        fits = "fits" if step <= memory else "no"
        lines.append(f"{path:<20}{loss / gib:10.2f} GiB{step / gib:10.2f} GiB{fits:>8}{most:>14,}   {bar(step, memory)}")
    return "\n".join(lines) + (
        "\n\nCounted: weights, gradients, optimizer, block inputs, and what each loss makes, gradients of hidden and head included."
        "\nEstimated: what a block holds in its backward, with flash attention. Not counted: CUDA's context, libraries' workspace,"
        "\nfragmentation: leave a tenth of the memory free. linear_topk is a teacher's pass: no gradients, no optimizer."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The planner's options."""
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, in any case; a config.json or its folder")
    parser.add_argument("--tokens", type=int, required=True, help="in one forward pass: sequences × length")
    parser.add_argument("--memory", required=True, help="80, 80G, 80GB and 80GiB are all 80·1,024³ bytes")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--k", type=int, default=64, help="support of the top-K paths")
    parser.add_argument("--keep", default="0", help="memory in which linear_logp keeps logits for its backward, such as 2GiB")


def answer(args: Any) -> str:
    """The plan of parsed arguments.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    for name in ("tokens", "k"):
        if getattr(args, name) <= 0:
            raise ValueError(f"plan: {name} must be positive, got {getattr(args, name)}")
    model = model_of(args.model)
    memory, keep = (byte_size("plan", name, getattr(args, name), "GiB") for name in ("memory", "keep"))
    made = Plan(model, getattr(torch, args.dtype), args.optimizer, not args.no_checkpointing, args.device, args.k, keep)
    return report(made, args.model, args.tokens, memory)
