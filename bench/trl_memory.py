"""Peak memory of a step of TRL's stock GRPOTrainer with and without us, on CPU: python -m bench.trl_memory

Each in a process of its own: a Qwen3 of 2 layers, hidden size 256, V = 151,936, float32, 4,096 scored tokens; seconds and MiB.
Completions are given, so that no time or memory goes into generation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def status(key: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024


def step(ours: bool, vocab: int, tokens: int) -> str:
    """One training step; the memory that it needed over what was there before it."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from rlad_kernels.integrations.trl import use_rlad_kernels
    from tests import tiny

    batch, length = 16, tokens // 16
    model = tiny.model(vocab_size=vocab, hidden_size=256, intermediate_size=512, head_dim=64, max_position_embeddings=8192)

    def generate(input_ids: Any, **_: Any) -> Any:
        return torch.cat([input_ids, torch.randint(0, 256, (len(input_ids), length))], 1)

    with tempfile.TemporaryDirectory() as folder, use_rlad_kernels() if ours else nullcontext():
        args = GRPOConfig(
            folder, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, bf16=False, optim="sgd", max_steps=1,
            per_device_train_batch_size=batch, num_generations=batch, max_completion_length=length, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, lambda completions, **_: [float(len(x) % 5) for x in completions], args=args,
            processing_class=tiny.tokenizer(), train_dataset=Dataset.from_dict({"prompt": ["a b"] * batch}),
        )  # fmt: skip
        trainer.model.generate = generate
        before, start = status("VmRSS"), time.perf_counter()
        trainer.train()
    seconds, memory = time.perf_counter() - start, status("VmHWM") - before
    return f"{'with us' if ours else 'without us':>10}: {seconds:.1f} s, {memory:.0f} MiB over the {before:.0f} MiB before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--one", choices=("ours", "theirs"), help="only this one, in this process")
    options = parser.parse_args()
    if options.one:
        print(step(options.one == "ours", options.vocab, options.tokens), flush=True)
        return
    for one in ("theirs", "ours"):
        command = [sys.executable, "-m", "bench.trl_memory", "--one", one]
        subprocess.run([*command, "--vocab", str(options.vocab), "--tokens", str(options.tokens)], check=True)


if __name__ == "__main__":
    main()
