"""``python -m bench``: time and peak memory of ours against naive PyTorch, as JSON and a Markdown table."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import rlad_kernels

GIB = 1 << 30
REFERENCE = {"n": 1024, "d": 1024, "v": 151_936}
ACCEPTANCE = {"n": 8192, "d": 1024, "v": 151_936}


def cases(smoke: bool, device: str) -> list[dict[str, Any]]:
    """Time at the reference shape, in both dtypes; peak memory at eight times its tokens for ours."""
    every = ("naive", "linear_logp", "fused", "topk")
    if smoke:
        return [{"provider": p, "n": 128, "d": 64, "v": 8192, "dtype": "float32", "rounds": 1} for p in every]
    speed = [{"provider": p, **REFERENCE, "dtype": t, "rounds": 2} for t in ("float32", "bfloat16") for p in every]
    dtype = "float32" if device == "cpu" else "bfloat16"
    return speed + [{"provider": p, **ACCEPTANCE, "dtype": dtype, "rounds": 0} for p in every[1:]]


def run(case: dict[str, Any], device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.worker", json.dumps({**case, "device": device})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {case} failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(row: dict[str, Any]) -> float | None:
    """Median time in units of three bare products of the same run (one, for an extraction)."""
    if not row["times_s"]:
        return None
    unit = statistics.median(row["bare_product_s"]) * (3 if row["products"] > 1 else 1)
    return statistics.median(row["times_s"]) / unit


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| provider | N | D | V | dtype | time, in bare products | extra memory, MB | of N×V float32 logits | worst error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        time = ratio(row)
        unit = "3" if row["products"] > 1 else "1"
        worst = max(row["errors"].values())
        lines.append(
            f"| {row['provider']} | {row['n']:,} | {row['d']:,} | {row['v']:,} | {row['dtype']} | "
            f"{'–' if time is None else f'{time:.2f} × {unit}'} | {row['extra_bytes'] / 1e6:,.0f} | "
            f"{row['extra_bytes'] / row['logits_bytes']:.1%} | {worst:.1e} |"
        )
    return "\n".join(lines)


def header(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    chip = torch.cuda.get_device_name() if device == "cuda" else torch.ops.rlad.cpu_isa()
    return {
        "date": datetime.date.today().isoformat(), "device": f"{device}: {chip}", "machine": platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "rlad_kernels": rlad_kernels.__version__, "commit": commit,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the JSON and the table")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: does it run and is it right")
    parser.add_argument("--resume", action="store_true", help="keep the cases an interrupted run has finished")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    info = header(args.device)
    path = args.out / f"{'smoke-' if args.smoke else ''}{args.device}-{info['date']}.json"
    known = json.loads(path.read_text())["cases"] if args.resume and path.exists() else []
    rows: list[dict[str, Any]] = []
    for case in cases(args.smoke, args.device):
        old = [r for r in known if all(r[k] == v for k, v in case.items() if k != "rounds")]
        rows.append(old[0] if old else run(case, args.device))
        path.write_text(json.dumps({**info, "cases": rows}, indent=1) + "\n")  # after every case: a cut-off run can go on
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    path.with_suffix(".md").write_text(f"{json.dumps(info)}\n\n{table(rows)}\n")
    print(f"\n{table(rows)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
