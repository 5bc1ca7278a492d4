"""What part two of ``rlad_smollm2.py`` prints and draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = {  # metric: heading
    "reward": "reward",
    "loss": "loss",
    "kl_teacher": "kl teach",
    "clip_frac_low": "clip low",
    "clip_frac_high": "clip high",
    "ratio_mean": "ratio",
    "entropy": "entropy",
    "length": "tokens",
    "seconds": "seconds",
}
KINDS = {"all": "all", "no_negative_term": "no negative term", "negative_term": "a negative term"}


def opening(training: int, held_out: int, recipe: dict[str, Any]) -> None:
    print(f"\nPart two. {training + held_out} distinct sums of two one-digit terms, with + or − and negative terms too:")
    print(f"{held_out} held out, {training} to train on; no question is in both. The prompt ends 'Reply with the answer only.'")
    print("A reply is right if its last number is the answer. The teacher is the untrained model that is shown the answer.")
    print("Recipe: " + ", ".join(f"{name} {value:g}" for name, value in recipe.items()), flush=True)


def held_out(when: str, result: dict[str, Any]) -> None:
    print(f"\nHeld-out accuracy {when} training, greedy (± one standard error):")
    for kind, label in KINDS.items():
        mean, error, count = result[kind]
        print(f"  {label:18}{100 * mean:6.1f} % ± {100 * error:.1f}  of {count}")
    for question, answer, reply in result["samples"]:
        print(f"    {question} {answer:>3}   the model: {reply!r}")


def table(history: Sequence[dict[str, float]]) -> None:
    print("\nstep" + "".join(f"{heading:>10}" for heading in COLUMNS.values()))
    for row in history:
        print(f"{row['step']:4d}" + "".join(f"{row.get(name, float('nan')):10.3f}" for name in COLUMNS))
    print("kl teach: mean log π/π_T of the sampled tokens.")


def curves(history: Sequence[dict[str, float]], points: Sequence[tuple[int, dict[str, Any]]], file: Path, title: str) -> None:
    """Four panels: reward, held-out accuracy, KL to the teacher, clip fractions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    steps = [row["step"] for row in history]
    figure, ((reward, held), (kl, clip)) = pyplot.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")
    reward.plot(steps, [row["reward"] for row in history], color="tab:blue", marker=".")
    reward.set(title="reward of the rollouts (share right)", ylim=(0, 1))
    for kind, label in KINDS.items():
        means, errors, counts = zip(*(result[kind] for _, result in points), strict=True)
        style = {"color": "black", "linewidth": 2} if kind == "all" else {"linestyle": "--", "alpha": 0.7}
        held.errorbar([step for step, _ in points], means, errors, marker="o", capsize=3, label=f"{label} ({counts[0]})", **style)
    held.set(title="held-out accuracy, greedy (± 1 standard error)", ylim=(0, 1))
    held.legend(loc="best")
    kl.plot(steps, [row["kl_teacher"] for row in history], color="tab:purple", marker=".")
    kl.axhline(0, color="gray", linewidth=0.8)
    kl.set(title="KL to the teacher (nats a token, sampled)", xlabel="step")
    for name, label in (("clip_frac_low", "low: r < 1 − ε, advantage < 0"), ("clip_frac_high", "high: r > 1 + ε, advantage > 0")):
        clip.plot(steps, [100 * row[name] for row in history], marker=".", label=label)
    clip.set(title="clipped tokens (%)", xlabel="step")
    clip.set_ylim(bottom=0, top=1.35 * max(clip.get_ylim()[1], 0.1))  # room for the legend
    clip.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    clip.legend(loc="upper right")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    print(f"\nCurves: {file}")
