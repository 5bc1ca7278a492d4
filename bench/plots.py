"""Pictures of a run: time, memory, error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.providers import PROVIDERS
from bench.report import model, relative

Row = dict[str, Any]
OURS, THEIRS = "#1f6f8b", "#b5b5b5"
GROWTH = {"growth_n": ("n", "tokens N"), "growth_v": ("v", "vocabulary V")}


def _time(row: Row) -> float | None:
    if not row.get("times_s"):
        return None
    median, _, _, of = relative(row)
    return median * of / 3


def _memory(row: Row) -> float:
    return max(row["extra_bytes"] / 1e6, 1.0)


def _error(row: Row) -> float | None:
    gradients = [e for name, e in row["errors"].items() if name != "loss"]
    return max(gradients) if gradients else None


PICTURES: dict[str, tuple[Callable[[Row], float | None], str, bool]] = {
    "time": (_time, "time, in units of three bare products", False),
    "memory": (_memory, "peak memory beyond inputs and gradients, MB", True),
    "error": (_error, "largest relative gradient error against float64", True),
}


def draw(run: dict[str, Any], path: Path) -> Iterator[Path]:
    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    speed = [c for c in run["cases"] if c["figure"] == "speed"]
    growing = [] if not run["cases"] else [k for k in GROWTH if any(c["figure"] == k for c in run["cases"])]
    for name, (value, label, log) in PICTURES.items():
        if not speed:
            continue
        curves = [] if name == "error" else growing
        panels = len(speed) + len(curves)
        columns = min(panels, 3)
        lines = -(-panels // columns)
        figure = Figure(figsize=(5.6 * columns, 4.4 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, case in zip(axes, speed, strict=False):
            _bars(ax, case, value, label, log)
        for ax, curve in zip(axes[len(speed) :], curves, strict=False):
            _curves(ax, [c for c in run["cases"] if c["figure"] == curve], curve, name)
        for ax in axes[panels:]:
            ax.axis("off")
        file = path.with_name(f"{path.stem}-{name}.png")
        figure.savefig(file, dpi=110)
        yield file


def _bars(ax: Axes, case: dict[str, Any], value: Callable[[Row], float | None], label: str, log: bool) -> None:
    found = [(r["provider"], value(r)) for r in case["rows"] if "absent" not in r]
    bars = [(name, x) for name, x in found if x is not None][::-1]
    drawn = ax.barh([b[0] for b in bars], [b[1] for b in bars], color=[OURS if PROVIDERS[b[0]].bound else THEIRS for b in bars])
    ax.bar_label(drawn, fmt=lambda x: f"{x:.1e}" if x < 0.01 else f"{x:,.2f}" if x < 10 else f"{x:,.0f}", padding=3, fontsize=9)
    ax.set(xlabel=label, title=f"{model(case)}: N {case['n']:,}, D {case['d']:,}, V {case['v']:,}\n{case['dtype']}")
    if log:
        ax.set_xscale("log")
    ax.margins(x=0.18)


def _curves(ax: Axes, cases: list[dict[str, Any]], curve: str, name: str) -> None:
    key, label = GROWTH[curve]
    rows = [r for c in cases for r in c["rows"] if "absent" not in r]
    for provider in dict.fromkeys(r["provider"] for r in rows):
        mine = sorted((r for r in rows if r["provider"] == provider), key=lambda r: r[key])
        values = [_memory(r) if name == "memory" else sorted(r["times_s"])[len(r["times_s"]) // 2] for r in mine]
        style = {} if PROVIDERS[provider].bound else {"color": "gray", "linestyle": "--"}
        ax.plot([r[key] for r in mine], values, marker="o", label=provider, **style)
    ticks = sorted({r[key] for r in rows})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
    fixed = f"V {cases[0]['v']:,}" if key == "n" else f"N {cases[0]['n']:,}"
    ax.set(
        xlabel=label,
        ylabel="extra memory, MB" if name == "memory" else "seconds",
        title=f"growth: D {cases[0]['d']:,}, {fixed}\n{cases[0]['dtype']}",
    )
    ax.legend(frameon=False)
