"""Pictures of a run: time, memory, error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.providers import PROVIDERS
from bench.report import relative, title

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
    return max((e for name, e in row["errors"].items() if name != "loss"), default=None)


PICTURES: dict[str, tuple[Callable[[Row], float | None], str, bool]] = {
    "time": (_time, "time, in units of three bare products", False),
    "memory": (_memory, "peak memory beyond inputs and gradients, MB", True),
    "error": (_error, "largest relative gradient error against float64", True),
}


def draw(run: dict[str, Any], path: Path) -> Iterator[Path]:
    """A file a picture: bars for each shape and dtype, then growth in N and V."""
    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    speed = [c for c in run["cases"] if c["figure"] == "speed"]
    growth = [
        (f, t) for f in GROWTH for t in ("float32", "bfloat16") if any((c["figure"], c["dtype"]) == (f, t) for c in run["cases"])
    ]
    for name, (value, label, log) in PICTURES.items():
        curves = [] if name == "error" else growth
        panels = len(speed) + len(curves)
        columns = max(1, min(panels, 3))
        lines = max(1, math.ceil(panels / columns))
        figure = Figure(figsize=(5.6 * columns, 4.6 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, case in zip(axes, speed, strict=False):
            _bars(ax, case, value, label, log)
        for ax, (kind, dtype) in zip(axes[len(speed) :], curves, strict=False):
            _curves(ax, [c for c in run["cases"] if (c["figure"], c["dtype"]) == (kind, dtype)], kind, name)
        for ax in axes[panels:]:
            ax.axis("off")
        figure.suptitle("colour: rlad_kernels, grey: others", fontsize=9, color="#555555")
        file = path.with_name(f"{path.stem}-{name}.png")
        figure.savefig(file, dpi=110)
        yield file


def _bars(ax: Axes, case: dict[str, Any], value: Callable[[Row], float | None], label: str, log: bool) -> None:
    found = [(r, value(r)) for r in case["rows"] if "absent" not in r]
    bars = [(r, x) for r, x in found if x is not None][::-1]
    names, values = [r["provider"] for r, _ in bars], [x for _, x in bars]
    ax.barh(names, values, color=[OURS if PROVIDERS[name].bound else THEIRS for name in names])
    ends = values
    if value is _time:
        spread = [relative(r) for r, _ in bars]
        low, high = ([abs(s[0] - s[i]) * s[3] / 3 for s in spread] for i in (1, 2))
        ax.errorbar(values, names, xerr=[low, high], fmt="none", ecolor="black", elinewidth=1, capsize=2)
        ends = [s[2] * s[3] / 3 for s in spread]
        ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
    for i, (end, x) in enumerate(zip(ends, values, strict=True)):
        ax.annotate(_short(x), (end, i), (4, 0), textcoords="offset points", va="center", fontsize=9)
    if log and values:
        ax.set_xscale("log")
        ax.set_xlim(min(values) / 5, 8 * max(values))
    elif values:
        ax.set_xlim(0, 1.15 * max(ends))
    ax.set(xlabel=label, title=title(case))


def _short(x: float) -> str:
    return f"{x:.1e}" if x < 0.01 else f"{x:,.2f}" if x < 10 else f"{x:,.0f}"


def _curves(ax: Axes, cases: list[dict[str, Any]], kind: str, name: str) -> None:
    key, label = GROWTH[kind]
    rows = [r for c in cases for r in c["rows"] if "absent" not in r and r["times_s"]]
    for provider in dict.fromkeys(r["provider"] for r in rows):
        mine = sorted((r for r in rows if r["provider"] == provider), key=lambda r: r[key])
        values = [_memory(r) if name == "memory" else sorted(r["times_s"])[len(r["times_s"]) // 2] for r in mine]
        theirs = not PROVIDERS[provider].bound
        color, line = ("gray", "--") if theirs else (None, "-")
        ax.plot([r[key] for r in mine], values, marker="o", label=provider, color=color, linestyle=line)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = sorted({r[key] for r in rows})
    ax.set_xticks(ticks, [f"{t:,}" for t in ticks], rotation=0 if len(ticks) < 5 else 20)
    for which in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        which(lambda y, _: f"{y:,g}" if f"{y:.0e}"[0] in "125" else "")
    fixed = f"V {cases[0]['v']:,}" if key == "n" else f"N {cases[0]['n']:,}"
    ax.set(xlabel=label, ylabel="extra memory, MB" if name == "memory" else "seconds")
    ax.set_title(f"growth: D {cases[0]['d']:,}, {fixed}, {cases[0]['dtype']}")
    ax.legend(frameon=False)
