"""Train a student at contexts whose logits do not fit: peak memory against length, naive and with rlad_kernels.

    python examples/long_context.py --out long_context                # a GPU: Qwen3-1.7B's sizes, 8,192 to 262,144 tokens
    python examples/long_context.py --device cpu                      # a small Qwen3 with Qwen's vocabulary, minutes
    python examples/long_context.py --lengths 65536 --batch 2 --accumulate 4 --steps 1

Each way trains in a process of its own, gradient checkpointing on, AdamW, two steps a length; its peak is everything beyond the
imports: weights, gradients, optimizer, activations, loss. The student is built from a config, nothing is downloaded. Before each
length the planner says what the naive step would take, and naive stops where that is more than --memory. Results: a table,
memory.json and memory.png in --out. The exit code is 1 if losses differ. With --device cpu --memory 8GiB the last lines but one are

    | 4,096 | 7.18 | 7.19 | … | 0.44 | 0.44 | … |
    longest context: naive 4,096, ours 16,384; losses agree

Needs: pip install transformers matplotlib
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.sizes import byte_size
from rlad_kernels.tools.plan import MODELS, Model, Plan

WAYS = {"naive": "naive", "ours": "linear_logp"}
LENGTHS = {"cuda": [8192 << i for i in range(6)], "cpu": [1024 << i for i in range(5)]}
LARGE = MODELS["Qwen3-1.7B"]
SMALL = Model(hidden=128, vocab=151_936, blocks=2, heads=4, kv_heads=2, head_dim=32, mlp=384, tied=True)
SMOKE = Model(hidden=64, vocab=8192, blocks=2, heads=2, kv_heads=1, head_dim=32, mlp=128, tied=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--model", help="a transformers folder or name; left out: a Qwen3 built from a config, of 1.7B's sizes on CUDA"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help=f"tokens of a sequence; left out: {LENGTHS}")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a forward pass")
    parser.add_argument("--accumulate", type=int, default=1, help="forward and backward passes of an update")
    parser.add_argument("--steps", type=int, default=2, help="updates a length")
    parser.add_argument("--memory", help="budget of the naive way, such as 8GiB; left out: 80 %% of what is free")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("long_context"))
    parser.add_argument("--smoke", action="store_true", help="a tiny model and two lengths, for CI")
    parser.add_argument("--way", choices=tuple(WAYS), help=argparse.SUPPRESS)  # what a child process does
    return parser.parse_args()


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


class Peak:
    """The most memory held since the last reset, beyond what was held at first."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.base = torch.cuda.memory_allocated() if self.cuda else self._status("VmRSS")

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")) - self.base

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def student(args: argparse.Namespace, m: Model) -> Any:
    """The student in training mode, gradient checkpointing on: bfloat16 on CUDA, float32 on CPU; ``m`` is its default size."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        sizes = {"hidden_size": m.hidden, "intermediate_size": m.mlp, "num_hidden_layers": m.blocks, "head_dim": m.head_dim}
        heads = {"num_attention_heads": m.heads, "num_key_value_heads": m.kv_heads, "tie_word_embeddings": m.tied}
        config = Qwen3Config(vocab_size=m.vocab, max_position_embeddings=max(args.lengths), **sizes, **heads)
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # transformers renames it
    next(getattr(model, name) for name in names if hasattr(model, name))()
    return model.to(args.device).train()


def sizes_of(config: Any) -> Model:
    """What the planner needs of a transformers config."""
    c = config.get_text_config()
    return Model(
        c.hidden_size, c.vocab_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
        c.intermediate_size, c.tie_word_embeddings,
    )  # fmt: skip


def loss_of(way: str, model: Any, tokens: Tensor) -> Tensor:
    """−mean log π of the next tokens; any loss on log-probs costs the same."""
    hidden = model.base_model(tokens[:, :-1], use_cache=False).last_hidden_state
    if way == "naive":
        return -model.lm_head(hidden).float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    return -rk.linear_logp(hidden, rk.LMHead.from_model(model), tokens[:, 1:]).logp.mean()


def update(way: str, model: Any, optimizer: torch.optim.Optimizer, batches: Tensor) -> float:
    """One step on batches of tokens, whose gradients are added up; the mean of their losses."""
    total = 0.0
    for tokens in batches:
        loss = loss_of(way, model, tokens) / len(batches)
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def train(args: argparse.Namespace) -> None:
    """One way at every length; prints a JSON line a length, so that what was measured stays if the process dies."""
    budget = byte_size("long_context", "memory", args.memory) if args.memory else int(0.8 * free_bytes(args.device))
    warm = student(argparse.Namespace(**vars(args) | {"model": None}), SMOKE)
    update(args.way, warm, torch.optim.AdamW(warm.parameters()), torch.arange(65, device=args.device).view(1, 1, 65))
    del warm  # it has imported and started what is no part of a peak
    torch.manual_seed(0)
    peak = Peak(args.device)
    model = student(args, SMOKE if args.smoke else LARGE if args.device == "cuda" else SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    plan = Plan(sizes_of(model.config), dtype=model.dtype, optimizer="adamw", device=args.device)
    held = plan.static()["gradients"] if args.accumulate > 1 else 0  # from one pass to the next
    for length in args.lengths:
        row: dict[str, Any] = {"way": args.way, "length": length, "planned": held + plan.step(WAYS[args.way], args.batch * length)}
        if args.way == "naive" and row["planned"] > budget:
            print(json.dumps(row | {"stopped": budget}), flush=True)
            continue
        generator = torch.Generator().manual_seed(length)
        period = torch.randint(plan.model.vocab, (args.accumulate, args.batch, 64), generator=generator)
        tokens = period.repeat(1, 1, length // 64 + 1)[..., : length + 1].to(args.device)
        start = time.perf_counter()
        peak.reset()
        losses = [update(args.way, model, optimizer, tokens) for _ in range(args.steps)]
        row |= {"peak": peak.bytes(), "losses": losses, "seconds": time.perf_counter() - start}
        row["tokens_s"] = args.steps * args.accumulate * args.batch * length / row["seconds"]
        print(json.dumps(row), flush=True)


def measure(way: str) -> list[dict[str, Any]]:
    """The rows of one way, from a process of its own whose freed memory goes back to the system at once."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    rows = []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout or ():
            row = json.loads(line)
            rows.append(row)
            planned = row["planned"] / 2**20
            if "stopped" in row:
                text = f"stopped before it starts: {planned:,.0f} MiB planned, {row['stopped'] / 2**20:,.0f} MiB to be had"
            else:
                first, last = row["losses"][0], row["losses"][-1]
                text = f"{row['peak'] / 2**20:8,.0f} MiB ({planned:,.0f} planned)  {row['seconds']:6.1f} s  "
                text += f"loss {first:.4f} → {last:.4f}"
            print(f"{way:>6} {row['length']:>8,} tokens: {text}", flush=True)
    if child.returncode:
        print(f"{way:>6} died with exit code {child.returncode}: what is above was measured before", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line a length: GiB planned and measured of each way, and the tokens that it trains on a second."""
    lines = [
        "| tokens | " + " | ".join(f"{WAYS[way]}: planned, GiB | measured | tokens/s" for way in WAYS) + " |",
        "|---" * 7 + "|",
    ]
    for length in sorted({row["length"] for row in rows}):
        cells = [f"{length:,}"]
        for way in WAYS:
            row = next((r for r in rows if (r["way"], r["length"]) == (way, length)), None)
            done = row is not None and "peak" in row
            cells.append(f"{row['planned'] / 2**30:.2f}" if row else "")
            cells += [f"{row['peak'] / 2**30:.2f}", f"{row['tokens_s']:,.0f}"] if done else ["stopped" if row else "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for way, color in (("naive", "tab:red"), ("ours", "tab:blue")):
        mine = [r for r in rows if r["way"] == way]
        done = [r for r in mine if "peak" in r]
        label = "naive: all logits" if way == "naive" else "linear_logp"
        axes.plot([r["length"] for r in done], [r["peak"] / 2**30 for r in done], "o-", color=color, label=f"{label}, measured")
        axes.plot([r["length"] for r in mine], [r["planned"] / 2**30 for r in mine], ":", color=color, label=f"{label}, planned")
    axes.set(xscale="log", yscale="log", xlabel="tokens in the context", ylabel="peak memory of a training step, GiB")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xticks(sorted({r["length"] for r in rows}), minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> int:
    args = options()
    args.lengths = args.lengths or LENGTHS[args.device]
    if args.smoke:
        args.lengths, args.memory = [256, 1024], args.memory or "48MiB"
    if args.way:
        train(args)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [row for way in WAYS for row in measure(way)]
    what = {"device": args.device, "model": args.model, "batch": args.batch, "accumulate": args.accumulate}
    (args.out / "memory.json").write_text(json.dumps({**what, "rows": rows}, indent=1) + "\n")
    plot(rows, args.out / "memory.png")
    losses = {(r["way"], r["length"]): r["losses"] for r in rows if "losses" in r}
    naive = {n: x for (way, n), x in losses.items() if way == "naive"}
    bound = 1e-2 if args.device == "cuda" else 1e-3  # naive's logits are bfloat16 on CUDA
    same = all(abs(a / b - 1) < bound for n, x in naive.items() for a, b in zip(x, losses.get(("ours", n), x), strict=True))
    reached = [max((n for way, n in losses if way == w), default=0) for w in WAYS]
    print(f"\n{table(rows)}\n")
    print(f"longest context: naive {reached[0]:,}, ours {reached[1]:,}; losses {'agree' if same else 'DIFFER'}")
    print(f"results: {args.out / 'memory.json'}, {args.out / 'memory.png'}")
    return 0 if same and reached[1] == max(args.lengths) else 1


if __name__ == "__main__":
    sys.exit(main())
