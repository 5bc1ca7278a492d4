"""The driver: a worker per provider, all alive, asked in turn, so that the machine's noise hits all alike."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import IO, Any

from bench.plan import Case, groups
from bench.providers import PROVIDERS, absent
from bench.worker import BARE

Row = dict[str, Any]


class Gone(Exception):
    """A worker said why it cannot go on, or died."""


class Process:
    """The driver's end of one worker."""

    def __init__(self, case: dict[str, Any], stack: ExitStack) -> None:
        command = [sys.executable, "-m", "bench.worker"]
        self.process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        stack.callback(self.process.kill)
        self.tell(json.dumps(case))

    def tell(self, line: str) -> None:
        pipe: IO[str] = self.process.stdin  # type: ignore[assignment]
        try:
            pipe.write(line + "\n")
            pipe.flush()
        except BrokenPipeError:
            pass  # hear() reports it

    def hear(self) -> Any:
        pipe: IO[str] = self.process.stdout  # type: ignore[assignment]
        line = pipe.readline()
        if not line:
            raise Gone(f"died with exit status {self.process.wait()}")
        reply = json.loads(line)
        if "wrong" in reply:
            raise SystemExit(f"bench: {reply['wrong']}")
        if "error" in reply:
            raise Gone(reply["error"])
        return reply.get("value")

    def ask(self, command: str) -> Any:
        self.tell(command)
        return self.hear()


def measure(case: Case, device: str, data: str | None = None) -> list[Row]:
    """A row per provider of the case: its figures, or why it is absent."""
    shape = {"n": case.n, "d": case.d, "v": case.v, "dtype": case.dtype, "device": device}
    missing = {p: absent(PROVIDERS[p], device) for p in case.providers}
    rows = {p: {"provider": p, **shape, "absent": why} for p, why in missing.items() if why}
    for group in groups(case, [p for p in case.providers if p not in rows], device):
        rows |= _together(group, shape, case.rounds, data)
    return [rows[p] for p in case.providers]


def _together(names: list[str], shape: dict[str, Any], rounds: int, data: str | None) -> dict[str, Row]:
    """One group: all start and pass the gate side by side; from then on only one computes at a time."""
    rows: dict[str, Row] = {p: {"provider": p, **shape} for p in [BARE, *names]}
    with ExitStack() as stack:
        alive = {p: Process({"provider": p, **shape, "data": data}, stack) for p in rows}

        def attempt(name: str, command: str | None) -> Any:
            try:
                return alive[name].ask(command) if command else alive[name].hear()
            except Gone as why:
                rows[name]["absent"] = str(why)
                del alive[name]
                return None

        for p in list(alive):
            attempt(p, None)
        for p in alive:
            alive[p].tell("prepare")
        for p in list(alive):
            rows[p].update(attempt(p, None) or {})
        for p in list(alive):
            rows[p].update(attempt(p, "warm") or {})
        for _ in range(rounds):
            for p in list(alive):
                times = attempt(p, "round")
                if times is not None:
                    rows[p].setdefault("times_s", []).append(times if p == BARE else times[0])
    unit = rows.pop(BARE)
    if "absent" in unit:
        raise SystemExit(f"bench: the bare products failed: {unit['absent']}")
    for p, row in rows.items():
        if "absent" not in row:
            row.update(bare_s=unit.get("times_s", []), **_counts(p, shape))
    return rows


def _counts(name: str, shape: dict[str, Any]) -> dict[str, Any]:
    """FLOPs and bytes by count: operands of each product once, gradients once, and each pass over N×V float32 logits."""
    n, d, v = shape["n"], shape["d"], shape["v"]
    size = 4 if shape["dtype"] == "float32" else 2
    p = asdict(PROVIDERS[name])
    return {
        "products": p["products"], "flops": p["products"] * 2 * n * d * v, "logits_bytes": 4 * n * v,
        "bytes": p["products"] * (n + v) * d * size + (p["products"] > 1) * (n + v) * d * size + p["passes"] * 4 * n * v,
    }  # fmt: skip
