"""``python -m bench``: time, peak memory and error of ours and of others, as JSON, tables and pictures."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

from bench import bounds, report
from bench.plan import PRESETS, real
from bench.providers import PROVIDERS
from bench.rounds import WRONG, measure
from bench.run import Run, budget, header


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the JSON, the tables and the pictures")
    size = parser.add_mutually_exclusive_group()
    for name in ("smoke", "full", "gpu"):
        size.add_argument(f"--{name}", dest="preset", action="store_const", const=name, help=PRESETS[name].__doc__)
    parser.add_argument(
        "--data", type=Path, help="instead: a file of real tensors, hidden (N, D), weight (V, D), target (N,), by torch.save"
    )
    parser.add_argument("--only", type=lambda s: s.split(","), help="these providers, by name, with commas; a file of its own")
    parser.add_argument("--rounds", type=int, help="rounds of every case, instead of the plan's")
    parser.add_argument("--resume", action="store_true", help="keep the cases that an interrupted run of this commit has finished")
    args = parser.parse_args()

    info = header(args.device)
    preset = args.preset or ("gpu" if args.device == "cuda" else "quick")
    plan = real(args.data) if args.data else PRESETS[preset](args.device)
    if unknown := [p for p in args.only or () if p not in PROVIDERS]:
        parser.error(f"--only: no provider {unknown[0]!r}; there are {', '.join(PROVIDERS)}")
    name = "-".join([args.data.stem if args.data else preset, *(args.only or ())])
    path = args.out / f"{name}-{args.device}-{info['date']}.json"
    run = Run(path, info, resume=args.resume, seconds=budget())
    here = args.device == "cuda" or preset == "gpu"
    wanted = [(planned, tuple(p for p in planned.providers if not args.only or p in args.only)) for planned in plan]
    wanted = [(planned, providers) for planned, providers in wanted if providers]
    data = args.data and str(args.data)
    for number, (planned, providers) in enumerate(wanted, 1):
        case = replace(planned, providers=providers, rounds=args.rounds or planned.rounds)
        print(f"case {number} of {len(wanted)}: {', '.join(providers)}", file=sys.stderr, flush=True)
        if done := run.case(asdict(case), lambda case=case, data=data: measure(case, args.device, data, here=here)):
            print(f"\n{report.title(done)}\n{report.table(done['rows'])}", flush=True)
    for file in report.write(path, pictures=not here):
        print(f"written: {file}")
    if preset == "gpu":
        print(f"\n{bounds.table(run.cases)}")
    run.end()
    return int(any(row.get("absent", "").startswith(WRONG) for case in run.cases for row in case["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
