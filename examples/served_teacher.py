"""RLAD with a teacher behind an OpenAI-style server: sample, ask the server for its top-K at every sampled token, update.

    python examples/served_teacher.py                                         # a local stand-in for vLLM, seconds on a CPU
    vllm serve Qwen/Qwen3-8B --max-logprobs 32
    python examples/served_teacher.py --url http://host:8000 --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-0.6B --k 32 --lr 1e-6

The stand-in's teacher is a small random model whose likely tokens a student of half its width has to find. Printed is the forward
KL to the teacher's top-K and tail on held-out sequences; the exit code is 1 if training does not lower it. Runs on the GPU where
there is one. The last line, on a CPU:

    KL to the served teacher, held out: 2.8148 → 1.7132 nats a token

Needs: pip install transformers
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from contextlib import nullcontext
from typing import Any

import torch
from local_server import serve
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.integrations.served import from_logprobs


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--url", help="base URL of a vLLM server; left out: a stand-in in this process")
    parser.add_argument("--teacher", default="teacher", help="the model's name on the server")
    parser.add_argument("--student", help="a transformers folder or name; left out: a small Qwen3 from a config")
    parser.add_argument("--k", type=int, default=16, help="top log-probs to ask for; above 20 vLLM needs --max-logprobs")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--smoke", action="store_true", help="two steps, for CI; too few to lower anything for sure")
    return parser.parse_args()


def tiny(width: int, scale: float = 1.0) -> Any:
    """A Qwen3 with a vocabulary of 128, built from a config; ``scale`` makes its distributions peaked."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": width // 16, "num_key_value_heads": width // 32, "tie_word_embeddings": False}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=128, max_position_embeddings=128, **size, **heads))
    with torch.no_grad():
        model.lm_head.weight *= scale
    return model.eval()


def ask(url: str, teacher: str, sequences: Tensor, prompt: int, k: int, vocab_size: int) -> rk.TopK:
    """The teacher's top-K at the answers' tokens, one request for the batch."""
    tokens = sequences.tolist()
    body = {"model": teacher, "prompt": tokens, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            choices = json.load(answer)["choices"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url} says {error.code}: {error.read().decode()}") from None
    served = [c["prompt_logprobs"][prompt:] for c in sorted(choices, key=lambda c: c["index"])]
    return from_logprobs(served, sequences[:, prompt:], k=k, vocab_size=vocab_size, out_of_range="tail", device=sequences.device)


@torch.no_grad()
def sample(student: Any, prompts: Tensor, new: int) -> Tensor:
    length = {"max_new_tokens": new, "min_new_tokens": new}
    return student.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0, **length)


def hidden_of(student: Any, sequences: Tensor, prompt: int) -> Tensor:
    """The states that predict the answers' tokens."""
    return student.base_model(sequences).last_hidden_state[:, prompt - 1 : -1]


def main() -> int:
    args = options()
    steps, prompt, new, batch = 2 if args.smoke else args.steps, 8, 16, 16
    torch.manual_seed(0)
    if args.student:
        from transformers import AutoModelForCausalLM

        student = AutoModelForCausalLM.from_pretrained(args.student)
    else:
        student = tiny(32)
    student = student.to(device := "cuda" if torch.cuda.is_available() else "cpu")
    vocab_size = student.config.vocab_size
    with nullcontext(args.url) if args.url else serve(tiny(64, scale=20.0).to(device), args.teacher) as url:
        held_out = torch.randint(vocab_size, (batch, prompt + new)).to(
            device
        )  # tokens at random: put your own prompts here and below
        truth = ask(url, args.teacher, held_out, prompt, args.k, vocab_size)

        kl = rk.losses.TopKKL("forward", normalize="tail")
        rlad = rk.losses.RLAD(topk=kl, topk_coef=1.0, teacher_clamp=2.0)

        @torch.no_grad()
        def distance() -> float:
            head = rk.LMHead.from_model(student)
            hidden = hidden_of(student, held_out, prompt)
            return rk.linear_loss(hidden, head, held_out[:, prompt:], kl, teacher=truth).loss.item()

        optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr)
        first = distance()
        for step in range(steps):
            sequences = sample(student, torch.randint(vocab_size, (batch, prompt)).to(device), new)
            target = sequences[:, prompt:]
            teacher = ask(url, args.teacher, sequences, prompt, args.k, vocab_size)
            reward = teacher.target_logp.nan_to_num(-30).clamp_min(-30).mean(1)  # or any other
            advantages = (reward - reward.mean()) / (reward.std() + 1e-4)
            head, hidden = rk.LMHead.from_model(student), hidden_of(student, sequences, prompt)
            with torch.no_grad():
                old_logp = rk.linear_logp(hidden, head, target).logp
            out = rk.linear_loss(hidden, head, target, rlad, old_logp=old_logp, advantages=advantages, teacher=teacher)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % max(steps // 6, 1) == 0:
                m = {k: f"{out.metrics[k].item():.3f}" for k in ("kl_teacher", "teacher_mass", "student_mass", "invalid_teacher")}
                print(f"step {step:3}: loss {out.loss.item():.4f}  {m}", flush=True)
        last = distance()
    print(f"KL to the served teacher, held out: {first:.4f} → {last:.4f} nats a token")
    return 0 if last < first or args.smoke else 1


if __name__ == "__main__":
    sys.exit(main())
