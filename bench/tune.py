"""``python -m bench.tune``: which launch rows, tile sizes and thresholds are fastest on this device, as JSON and a table.

What each kernel is given is taken from the library's own calls. Nothing is timed before it gives what today's row gives; then the
candidates are asked in turn.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk
from bench.candidates import Shape, calls, compile_together, difference, inputs, launched_with, neighbours, source
from bench.clock import copy_rate, in_turn
from bench.inputs import Inputs
from bench.providers import PROVIDERS
from bench.run import Run, budget, header
from bench.worker import Peak
from rlad_kernels.backends.triton import KERNELS
from rlad_kernels.backends.triton._launch import Config, record
from rlad_kernels.engine import sparse as sparse_engine

SHAPES = ((8192, 4096, 151_936), (1024, 1024, 151_936), (8192, 768, 50_257), (64, 4096, 151_936))  # N, D, V
TOY = (4, 16, 130)
FIRST = ("fold_kernel", "dlogits_kernel", "fold_topk_kernel", "divergence_kernel", "column_stats_kernel")
TILES = ((4096, 16_384), (8192, 8192), (8192, 16_384), (4096, 8192), (4096, 2048), (2048, 32_768), (1024, 65_536))
CHUNKS = (512, 1024, 2048, 4096)  # rows whose logits are all held
EPS = (2.0**-7, 2.0**-9, 2.0**-10, 2.0**-11, 2.0**-12, 2.0**-14)
BETTER = 0.98  # of today's time, to be worth another row
Row = dict[str, Any]
Option = Callable[[ExitStack], None]  # sets something for the length of a stack of contexts


def rounds(device: str) -> int:
    return 7 if device == "cuda" else 1


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def tune_kernel(name: str, shape: Shape, device: str) -> list[Row]:
    """A row a candidate; the first is today's."""
    kernel = KERNELS[name]
    call = calls(shape, device).get(kernel.launcher.__name__)
    if call is None:
        return []
    with record() as launches:
        call.run()
    today = next((one.config for one in launches if one.kernel is kernel.fn), None)
    if today is None:
        return []
    candidates = neighbours(today)[: None if device == "cuda" else 2]
    if device == "cuda":
        compile_together(kernel, call, candidates)
    want, rows, able = call.outputs(), [], []
    for row in candidates:
        rows.append({"config": source(row)})
        try:
            with launched_with(kernel, row):
                rows[-1]["difference"] = difference(call.outputs(), want)
        except Exception as error:  # too large for the device, or the kernel refuses it
            rows[-1]["why"] = reason(error)
        else:
            if rows[-1]["difference"] <= 1:
                able.append((rows[-1], row))

    def forced(row: Config) -> None:
        with launched_with(kernel, row):
            call.run()

    seconds = in_turn([partial(forced, row) for _, row in able], device, rounds(device), call.reset)
    moved = call.bytes()
    for (measured, _), s in zip(able, seconds, strict=True):
        measured.update(s=s, gb_s=moved / s / 1e9)
    return rows


def compared(options: dict[str, Option], provider: str, x: Inputs, device: str) -> list[Row]:
    """A row an option: its time and memory, and how far it is from the first, today's."""
    p, rows, able = PROVIDERS[provider], {label: {"config": label} for label in options}, {}
    want: list[Tensor] = []

    def step(option: Option) -> list[Tensor]:
        with ExitStack() as stack:
            option(stack)
            return [p.step(x), *(y.grad for y in (x.hidden, x.weight) if y.grad is not None)]

    for label, option in options.items():
        row = rows[label]
        try:
            step(option)
            x.hidden.grad = x.weight.grad = None
            peak = Peak(device)
            got = step(option)
        except Exception as error:
            row["why"] = reason(error)
            continue
        want = want or got
        row |= {"extra_bytes": peak.bytes() - sum(g.nbytes for g in got[1:]), "difference": difference(got, want)}
        if row["difference"] <= 1:
            able[label] = partial(step, option)
    for label, s in zip(able, in_turn(list(able.values()), device, rounds(device)), strict=True):
        rows[label]["s"] = s
    x.hidden.grad = x.weight.grad = None
    return list(rows.values())


def tune_tiles(provider: str, shape: Shape, device: str) -> list[Row]:
    """The library's own tile, then others."""
    sizes = [(rows, None) for rows in CHUNKS] if provider == "fused" else TILES
    if device == "cpu":
        sizes = [(2, 64)]

    def tile(rows: int, cols: int | None, stack: ExitStack) -> None:
        stack.enter_context(rk.set_tile(rows, cols))

    options: dict[str, Option] = {"the library's own": lambda _: None}
    options |= {f"{rows} × {cols or 'its area'}": partial(tile, rows, cols) for rows, cols in sizes}
    return compared(options, provider, inputs(shape, device), device)


def tune_sparse(shape: Shape, device: str) -> list[Row]:
    """Exact and sparse backward at unions of several sizes: where they meet is the threshold."""
    above, x, rows = sparse_engine.EXACT_ABOVE, inputs(shape, device), []
    size = sparse_engine.block_of(x.hidden)
    with torch.no_grad():
        p = (x.hidden[: 2 * size] @ x.weight.T).float().softmax(1)
    most = torch.stack([block.amax(0) for block in p.split(size)])

    def step(eps: float, threshold: float) -> None:
        before = dict(above)
        above.update(dict.fromkeys(above, threshold))
        try:
            x.hidden.grad = x.weight.grad = None
            logp = rk.linear_logp(x.hidden, rk.LMHead(x.weight), x.target, filter_eps=eps).logp
            (-(logp * x.advantage).mean()).backward()
        finally:
            above.update(before)

    for eps in EPS:
        exact, sparse = in_turn([partial(step, eps, 0.0), partial(step, eps, 2.0)], device, rounds(device))
        union = (most > eps).float().mean().item()
        rows.append({"config": f"eps 2^{math.log2(eps):g}, union {union:.3f}", "union": union, "exact_s": exact, "s": sparse})
    x.hidden.grad = x.weight.grad = None
    return rows


def work(device: str) -> Iterator[tuple[str, Shape, Callable[[], list[Row]]]]:
    """What to measure, in order of value: (what, shape, how)."""
    shapes = SHAPES if device == "cuda" else (TOY,)
    names = [n for n in (*FIRST, *sorted(set(KERNELS) - set(FIRST))) if n in KERNELS]
    for i, shape in enumerate(shapes):
        for name in names:
            yield name, shape, partial(tune_kernel, name, shape, device)
        if i == 0:
            for provider in ("linear_logp", "scoring", "topk", "fused"):
                yield f"tiles of {provider}", shape, partial(tune_tiles, provider, shape, device)
            yield "sparse", shape, partial(tune_sparse, shape, device)


def best(case: dict[str, Any]) -> tuple[Row, Row] | None:
    """The first row, today's, and the fastest: today's, unless another is well ahead."""
    rows = [r for r in case["rows"] if "s" in r and r.get("difference", 0) <= 1]
    if not rows or "union" in rows[0]:
        return None
    fastest = min(rows, key=lambda r: r["s"])
    return rows[0], fastest if fastest["s"] <= BETTER * rows[0]["s"] else rows[0]


def table(cases: Sequence[dict[str, Any]], copy_gb_s: float, file: str) -> str:
    """A line a case: today's and the best row, and how much of a device copy it moves."""
    lines = [
        f"| {file}; a copy moves {copy_gb_s:,.0f} GB/s | N, D, V | today, ms | best row | ms | GB/s | of a copy |",
        "|---|" + "---|" * 6,
    ]
    for case in cases:
        start = f"| {case['what']} | {', '.join(f'{x:,}' for x in case['shape'])}"
        found = best(case)
        if found is None:
            for row in case["rows"]:
                exact, sparse = (f"{row[key] * 1e3:.2f}" if key in row else "" for key in ("exact_s", "s"))
                lines.append(f"{start} | {exact} | {row['config']} | {sparse} | | |")
            continue
        today, row = found
        rate = f"{row['extra_bytes'] / 2**30:.2f} GiB held | " if "extra_bytes" in row else f"{row['gb_s']:,.0f} | "
        share = "" if "extra_bytes" in row else f"{row['gb_s'] / copy_gb_s:.2f}"
        kept = "as it is: " * (row is today)
        lines.append(f"{start} | {today['s'] * 1e3:.3f} | {kept}`{row['config']}` | {row['s'] * 1e3:.3f} | {rate}{share} |")
    return "\n".join(lines)


def lost(device: str) -> bool:
    """Whether a fault has ended this process's use of the device."""
    try:
        torch.zeros(1, device=device).item()
    except Exception:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="cpu: interpreted, at toy sizes")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    copy_gb_s = copy_rate(args.device) / 1e9
    info = {**header(args.device), "copy_gb_s": copy_gb_s}
    run = Run(args.out / f"tune-{args.device}-{info['date']}.json", info, resume=True, seconds=budget())
    failed = []

    def attempt(measure: Callable[[], list[Row]]) -> list[Row]:
        try:
            return measure()
        except Exception as error:
            failed.append(error)
            return [{"config": f"failed: {reason(error)}"}]

    for what, shape, measure in work(args.device):
        if case := run.case({"what": what, "shape": shape}, partial(attempt, measure)):
            print(f"{what} {shape}: {len(case['rows'])} candidates", flush=True)
        if failed and lost(args.device):  # the next run goes on after this case
            break
    print(f"\n{table(run.cases, copy_gb_s, run.path.name)}")
    run.end()
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
