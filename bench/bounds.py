"""What this library is held to on a GPU, beside what a run measured; in bfloat16."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from bench.plan import MODELS
from bench.report import units


class Bound(NamedTuple):
    """``most`` in units of three bare products or of one, of TRL's time, GiB beyond inputs and gradients, or milliseconds."""

    shape: tuple[int, int, int]
    provider: str
    unit: str
    most: float


LARGE = (8192, *MODELS["Qwen3-8B"])
LAUNCHES = (64, 256, LARGE[2])
BOUNDS = (
    Bound(LARGE, "fused", "× 3", 1.12),
    Bound(LARGE, "linear_logp", "× TRL", 1.0),
    Bound(LARGE, "kept", "× TRL", 0.85),
    Bound(LARGE, "frozen", "× 3", 0.75),
    Bound(LARGE, "half", "× 3", 1.0),
    Bound(LARGE, "scoring", "× 1", 1.15),
    Bound(LARGE, "topk", "× 1", 1.3),
    Bound(LARGE, "divergence", "× 3", 1.6),
    Bound(LARGE, "sparse", "× 1", 1.6),
    Bound(LARGE, "fused_sparse", "× 1", 1.6),
    Bound(LARGE, "topk_kl", "× 3", 0.13),
    Bound(LARGE, "scoring", "GiB", 0.5),
    Bound(LARGE, "topk", "GiB", 0.5),
    Bound(LARGE, "linear_logp", "GiB", 1.0),
    Bound(LARGE, "fused", "GiB", 4.6),
    Bound(LAUNCHES, "linear_logp", "ms", 2.0),
    Bound(LAUNCHES, "topk", "ms", 0.7),
    Bound((262_144, 2048, LARGE[2]), "rlad", "ms", 850.0),
)


def measured(bound: Bound, cases: list[dict[str, Any]]) -> float | None:
    """The run's figure for a bound, from the first case that has it."""
    for case in cases:
        rows = {row["provider"]: row for row in case["rows"] if row.get("times_s")}
        if (case["n"], case["d"], case["v"]) != bound.shape or case.get("peaked") or bound.provider not in rows:
            continue
        row = rows[bound.provider]
        seconds, (one, three) = statistics.median(row["times_s"]), units(row)
        trl = statistics.median(rows["trl"]["times_s"]) if "trl" in rows else None
        scale = {"× 1": one, "× 3": three, "× TRL": trl, "ms": 1e-3}
        if bound.unit == "GiB":
            return row["extra_bytes"] / 2**30
        return None if scale[bound.unit] is None else seconds / scale[bound.unit]
    return None


def table(cases: list[dict[str, Any]]) -> str:
    lines = ["| | measured | at most | |", "|---|---|---|---|"]
    for bound in BOUNDS:
        found = measured(bound, cases)
        shape = "N {:,}, D {:,}, V {:,}".format(*bound.shape)
        value, verdict = ("–", "not measured") if found is None else (f"{found:.2f}", "met" if found <= bound.most else "MISSED")
        lines.append(f"| `{bound.provider}` {shape} | {value} | {bound.most:g} {bound.unit} | {verdict} |")
    return "\n".join(lines)
