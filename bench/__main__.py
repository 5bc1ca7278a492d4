"""``python -m bench``: time, peak memory and error of ours and of others, as JSON, tables and pictures."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import rlad_kernels
from bench import report
from bench.plan import PRESETS, real
from bench.providers import PROVIDERS
from bench.rounds import measure

PEERS = ("triton", "trl", "liger-kernel", "cut-cross-entropy", "verl", "quack-kernels")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _chip(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.ops.rlad.cpu_isa()}, {torch.get_num_threads()} threads"


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy of the tree without git
        return "unknown"


def header(device: str) -> dict[str, Any]:
    versions = {"rlad_kernels": rlad_kernels.__version__, "torch": torch.__version__, **{p: _version(p) for p in PEERS}}
    return {
        "date": datetime.date.today().isoformat(), "commit": _commit(), "device": f"{device}: {_chip(device)}",
        "versions": {k: v for k, v in versions.items() if v},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the JSON, the tables and the pictures")
    size = parser.add_mutually_exclusive_group()
    for name in ("smoke", "full"):
        size.add_argument(f"--{name}", dest="preset", action="store_const", const=name, default="quick", help=PRESETS[name].__doc__)
    parser.add_argument(
        "--data", type=Path, help="instead: a file of real tensors, hidden (N, D), weight (V, D), target (N,), by torch.save"
    )
    parser.add_argument("--only", type=lambda s: s.split(","), help="these providers, by name, with commas; a file of its own")
    parser.add_argument("--rounds", type=int, help="rounds of every case, instead of the plan's")
    parser.add_argument("--resume", action="store_true", help="keep the cases that an interrupted run of this commit has finished")
    args = parser.parse_args()

    info = header(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    plan = real(args.data) if args.data else PRESETS[args.preset](args.device)
    if unknown := [p for p in args.only or () if p not in PROVIDERS]:
        parser.error(f"--only: no provider {unknown[0]!r}; there are {', '.join(PROVIDERS)}")
    name = "-".join([args.data.stem if args.data else args.preset, *(args.only or ())])
    path = args.out / f"{name}-{args.device}-{info['date']}.json"
    old = json.loads(path.read_text()) if args.resume and path.exists() else {}
    done = {_key(c): c for c in old.get("cases", [])} if old.get("commit") == info["commit"] else {}
    cases: list[dict[str, Any]] = []
    for planned in plan:
        providers = tuple(p for p in planned.providers if not args.only or p in args.only)
        if not providers:
            continue
        case = replace(planned, providers=providers, rounds=args.rounds or planned.rounds)
        key = json.loads(json.dumps(asdict(case)))
        cases.append(done.get(_key(key)) or {**key, "rows": measure(case, args.device, args.data and str(args.data))})
        path.write_text(json.dumps({**info, "cases": cases}, indent=1) + "\n")  # after every case: a cut-off run can go on
        print(f"\n{report.title(key)}\n{report.table(cases[-1]['rows'])}", flush=True)
    for file in report.write(path):
        print(f"written: {file}")


def _key(case: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in case.items() if k != "rows"}, sort_keys=True)


if __name__ == "__main__":
    main()
