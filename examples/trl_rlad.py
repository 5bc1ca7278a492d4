"""RLAD in TRL: a student learns from its reward and from a teacher at once. Tiny models built in memory, nothing is downloaded.

    python examples/trl_rlad.py              # about a minute; exit code 1 if reward or KL to the teacher did not improve
    python examples/trl_rlad.py --alpha 1 --topk 0    # the same without a teacher: GRPO

The task: repeat the letter of the prompt. The teacher learns it from examples first; the student knows nothing. Runs on the GPU
where there is one. What it prints, after what TRL logs, on a CPU:

    reward: 0.006 -> 0.650
    reverse_kl: 4.389 -> 0.300

Needs: pip install trl peft datasets
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import rlad_kernels as rk
from rlad_kernels.integrations.trl import RLADConfig, RLADTrainer, use_rlad_kernels

LETTERS, LENGTH, EOS, PAD = "abcdefgh", 8, 256, 257


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, an end and a padding token."""
    alphabet = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE({**alphabet, "<eos>": EOS, "<pad>": PAD}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def tiny_model(seed: int, hidden: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=258, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=EOS, pad_token_id=PAD, initializer_range=0.05,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def teach(teacher: Qwen3ForCausalLM, tok: Any, steps: int) -> None:
    """Fit the teacher to the task's answers."""
    rows = torch.tensor([tok(x + ":" + x * LENGTH).input_ids for x in LETTERS], device=teacher.device)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = F.cross_entropy(teacher(input_ids=rows).logits[:, 1:-1].flatten(0, 1), rows[:, 2:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The share of the wanted letter in the completion."""
    return [c.count(p[0]) / LENGTH for p, c in zip(prompts, completions, strict=True)]


@torch.no_grad()
def measure(student: Any, teacher: Any, tok: Any) -> dict[str, float]:
    """Mean reward and reverse KL(student‖teacher) per token, whole vocabulary, on samples of the student."""
    torch.manual_seed(1)
    student.eval()
    prompts = [x + ":" for x in LETTERS * 8]
    ids = torch.tensor([tok(p).input_ids for p in prompts], device=student.device)
    out = student.generate(ids, do_sample=True, max_new_tokens=LENGTH, top_k=0, eos_token_id=EOS, pad_token_id=PAD)
    texts = tok.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    q, p = (m(input_ids=out).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1) for m in (student, teacher))
    keep = (out[:, ids.shape[1] :] != PAD).float()
    kl = ((q.exp() * (q - p)).sum(-1) * keep).sum() / keep.sum()
    return {"reward": sum(reward(prompts, texts)) / len(texts), "reverse_kl": float(kl)}


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="training steps of the student")
    parser.add_argument("--alpha", type=float, default=0.5, help="weight of the old policy in the ratio's anchor")
    parser.add_argument("--topk", type=int, default=16, help="K of the teacher's top-K; 0 leaves the KL out")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--top-p", type=float, default=0.95, help="of the rollouts")
    options = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tok, teacher, student = tokenizer(), tiny_model(0, 64).to(device), tiny_model(1, 32).to(device)
    teach(teacher, tok, 60)
    before = measure(student, teacher, tok)
    with tempfile.TemporaryDirectory() as folder, use_rlad_kernels():
        config = RLADConfig(
            folder, use_cpu=device == "cpu", report_to="none", save_strategy="no", logging_steps=10, bf16=False,
            disable_tqdm=not sys.stderr.isatty(),
            max_steps=options.steps, learning_rate=options.lr, lr_scheduler_type="constant", per_device_train_batch_size=32,
            num_generations=4, max_completion_length=LENGTH, top_p=options.top_p,
            alpha=options.alpha, teacher_clamp=1.0, topk=options.topk, **({"normalize": "tail"} if options.topk else {}),
        )  # fmt: skip
        trainer = RLADTrainer(
            student, reward, teacher=teacher, args=config, processing_class=tok,
            train_dataset=Dataset.from_dict({"prompt": [x + ":" for x in LETTERS * 8]}),
        )  # fmt: skip
        trainer.train()
    after = measure(student.eval(), teacher, tok)
    for name in before:
        print(f"{name}: {before[name]:.3f} -> {after[name]:.3f}")
    return {"before": before, "after": after, "log": trainer.state.log_history[-2]}


if __name__ == "__main__":
    print(f"rlad_kernels {rk.__version__}")
    found = main()
    better = found["after"]["reward"] > found["before"]["reward"], found["after"]["reverse_kl"] < found["before"]["reverse_kl"]
    sys.exit(not all(better))
