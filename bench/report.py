"""``python -m bench.report FILE.json``: the Markdown tables and the pictures of a run, beside its JSON."""

from __future__ import annotations

import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.plan import MODELS, ODD
from bench.providers import PROVIDERS

Row = dict[str, Any]
COLUMNS = (
    "Forward and backward of the mean of −advantage·logp. Time: median and spread of the interleaved rounds, also in units of the "
    "run's bare products (three: h@W.T, g@W, g.T@h; one for what has no backward sweep). Memory: peak of a fresh process beyond "
    "inputs and gradients. Error: against float64 at N 512, D 64, V 4,096, relative for gradients. TFLOP and GB: counted."
)


def units(row: Row) -> list[float]:
    """Seconds of one bare product and of all three, medians over the rounds that the row took part in."""
    return [statistics.median(r[0] for r in row["bare_s"]), statistics.median(sum(r) for r in row["bare_s"])]


def relative(row: Row) -> tuple[float, float, float, int]:
    """Median, least and largest time in bare products: in three of them, or in one where there is no backward sweep."""
    of = 1 if row["products"] == 1 else 3
    unit = units(row)[of == 3]
    times = row["times_s"]
    return statistics.median(times) / unit, min(times) / unit, max(times) / unit, of


def title(case: dict[str, Any]) -> str:
    shapes = {**MODELS, "GPT-2": ODD}
    names = [case["data"]] if case.get("data") else [name for name, shape in shapes.items() if shape == (case["d"], case["v"])]
    shape = f"N {case['n']:,}, D {case['d']:,}, V {case['v']:,}, {case['dtype']}" + ", peaked logits" * case.get("peaked", False)
    return ": ".join([*names, shape])


def table(rows: list[Row]) -> str:
    lines = [
        "| | time, s (min–max) | in bare products | extra memory, MB | of N×V float32 logits "
        "| error: loss, d_hidden, d_weight | TFLOP | GB moved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"`{row['provider']}` {PROVIDERS[row['provider']].what}"
        if "absent" in row:
            lines.append(f"| {name} | absent: {row['absent'].replace('|', '/')} | | | | | | |")
            continue
        time, ratio = "–", "–"
        if row.get("times_s"):
            median, low, high, of = relative(row)
            times = row["times_s"]
            time = f"{statistics.median(times):.3g} ({min(times):.3g}–{max(times):.3g})"
            ratio = f"{median:.2f} × {of} ({low:.2f}–{high:.2f})"
        error = ", ".join(f"{e:.0e}" for e in row["errors"].values())
        memory = f"{row['extra_bytes'] / 1e6:,.0f} | {row['extra_bytes'] / row['logits_bytes']:.1%}"
        lines.append(f"| {name} | {time} | {ratio} | {memory} | {error} | {row['flops'] / 1e12:.2f} | {row['bytes'] / 1e9:.1f} |")
    return "\n".join(lines)


def markdown(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    parts = [f"{run['device']}. {run['date']}, commit {run['commit']}. {versions}.", COLUMNS]
    for case in run["cases"]:
        measured = [r for r in case["rows"] if r.get("bare_s")]
        unit = "" if not measured else "; one bare product {:.3g} s, three {:.3g} s".format(*units(measured[0]))
        parts += [f"## {title(case)}", f"{case['rounds']} interleaved rounds{unit}.", table(case["rows"])]
    return "\n\n".join(parts) + "\n"


def write(path: Path, *, pictures: bool = True) -> list[Path]:
    """The tables beside the JSON, and the pictures."""
    run = json.loads(path.read_text())
    tables = path.with_suffix(".md")
    tables.write_text(markdown(run))
    if not pictures or find_spec("matplotlib") is None:  # a GPU machine draws nothing: that is done from the JSON elsewhere
        return [tables]
    from bench.plots import draw

    return [tables, *draw(run, path)]


if __name__ == "__main__":
    for written in write(Path(sys.argv[1])):
        print(written)
