"""The driver: a worker per provider, all alive, asked in turn, so that the machine's noise hits all alike.

On CPU a worker is a process, whose peak memory is its own. On CUDA, where the allocator counts and a start takes ten seconds,
all live in this one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import IO, Any

from bench.plan import Case, groups, too_large
from bench.providers import PROVIDERS, absent
from bench.worker import BARE, Worker, answer

Row = dict[str, Any]
WRONG = "wrong: "


class Gone(Exception):
    """A worker said why it cannot go on, or died."""


def _value(reply: dict[str, Any]) -> Any:
    if "error" in reply:
        raise Gone(reply["error"])
    return reply.get("value")


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
        return _value(reply)


class Here:
    """A worker in this process: it does what it is told, and is heard afterwards."""

    def __init__(self, case: dict[str, Any], stack: ExitStack) -> None:
        self.worker = Worker(**case)
        stack.callback(self.worker.close)
        self.reply: dict[str, Any] = {}

    def tell(self, line: str) -> None:
        self.reply = answer(self.worker, line)

    def hear(self) -> Any:
        reply, self.reply = self.reply, {}
        if "wrong" in reply:  # what is right is measured all the same: the machine is lent
            raise Gone(WRONG + reply["wrong"])
        return _value(reply)


def measure(case: Case, device: str, data: str | None = None, *, here: bool = False) -> list[Row]:
    """A row per provider of the case: its figures, or why it is absent."""
    shape = {"n": case.n, "d": case.d, "v": case.v, "dtype": case.dtype, "device": device}
    rows: dict[str, Row] = {}
    for p in case.providers:
        if why := absent(PROVIDERS[p], device) or too_large(case, p, device):
            rows[p] = {"provider": p, **shape, "absent": why}
    given = {**shape, "data": data, "peaked": case.peaked}
    able = [p for p in case.providers if p not in rows]
    for group in filter(None, [able] if here else groups(case, able, device)):
        rows |= _together(group, shape, given, case.rounds, Here if here else Process)
    return [rows[p] for p in case.providers]


def _together(
    names: list[str], shape: dict[str, Any], given: dict[str, Any], rounds: int, start: type[Process] | type[Here]
) -> dict[str, Row]:
    """One group: all start and pass the gate side by side; from then on only one computes at a time."""
    rows: dict[str, Row] = {p: {"provider": p, **shape} for p in [BARE, *names]}
    with ExitStack() as stack:
        alive = {p: start({"provider": p, **given}, stack) for p in rows}

        def attempt(name: str, command: str | None) -> Any:
            try:
                if command:
                    alive[name].tell(command)
                return alive[name].hear()
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
