"""What no test would see: a seeded sample of cosmic-ray's changes to four rooms, each under the tests that run its line.

``make mutants`` makes a map of the tests, at most ``CASES`` of each function; then ``python -m tests.mutants run`` changes a copy
of the tree, forks a process that has PyTorch, and runs the tests that touch the line, cheapest first, until one fails. A mutant
that no test kills is printed: it becomes a test, or cannot matter. What is in ``--out`` is not run again.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("losses", "engine", "linear", "integrations")
CASES = 12  # of a test's parameters; a test among those left out could kill more
SECONDS = 60.0  # of tests for one mutant, as long as they took on the code unchanged
GRACE = 20.0  # on top of three times that: what takes longer loops for ever and is seen
WARM = ("torch", "torch._dynamo", "numpy", "hypothesis", "transformers", "trl")
SEEN, PLACES = "tests.json", "lines.json"
KEY, KILLED = ("file", "operator", "occurrence"), ("killed", "timed out")
WIDE = 900.0  # for what survives: every case of the files that run its function, and these
RANKS = ("tests/test_shards.py", "tests/test_data_parallel.py", "tests/test_context_parallel.py")
FAR = (  # tests of other rooms, and those that take minutes
    "bench bf16_products compile_gate cpp_gradients cpp_rows cuda_graphs divergence_rows docstrings engine_recipes every_kernel",
    "example_scripts fuzz house hub launches limits long_runs new_kernel notebooks official_losses plan reference resume",
    "rlad_and_others row_blocks supply_chain triton_losses triton_math triton_rows tune wheel",
)


# --- the map: which tests run which line, and how long each takes


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """As a plugin, ``-p tests.mutants``: of each test function, ``CASES`` cases."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.split("[")[0]].append(item)
    kept = {id(one) for same in cases.values() for one in random.Random(0).sample(same, min(CASES, len(same)))}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def pytest_configure(config: pytest.Config) -> None:
    if "RLAD_MUTANTS" in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations(Path(os.environ["RLAD_MUTANTS"])))


class Durations:
    """The seconds of each test that passed."""

    def __init__(self, file: Path) -> None:
        self.file, self.took = file, dict[str, float]()
        self.failed = set[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.took[report.nodeid] = self.took.get(report.nodeid, 0.0) + report.duration
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps({k: v for k, v in self.took.items() if k not in self.failed}))


def make_map(out: Path, pytest_args: list[str]) -> None:
    env = {**os.environ, "RLAD_MUTANTS": str(out / SEEN), "COVERAGE_FILE": str(out / ".coverage"), "OMP_NUM_THREADS": "1"}
    sources = [f"--cov=rlad_kernels/{room}" for room in ROOMS]  # as names, coverage would import PyTorch a first time
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n2",
        "--dist=worksteal",
        "-ptests.mutants",
        "--cov-context=test",
        "--cov-report=",
    ]
    tests = pytest_args or ["tests", *(f"--ignore=tests/test_{name}.py" for name in " ".join(FAR).split())]
    subprocess.run([*command, *sources, *tests], env=env, cwd=ROOT, check=False)
    from coverage import CoverageData

    data = CoverageData(str(out / ".coverage"))
    data.read()
    took = json.loads((out / SEEN).read_text())
    places: dict[str, dict[int, list[str]]] = {}
    for file in data.measured_files():
        lines = {
            line: sorted({c.split("|")[0] for c in found} & took.keys()) for line, found in data.contexts_by_lineno(file).items()
        }
        places[str(Path(file).relative_to(ROOT))] = lines
    (out / PLACES).write_text(json.dumps(places))


# --- the mutants


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where code is only read by people: with ``from __future__ import annotations`` an annotation is never run."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            found.append(node.returns)
    return [((a.lineno, a.col_offset), (a.end_lineno or 0, a.end_col_offset or 0)) for a in found if a is not None]


def mutants() -> Iterator[dict[str, Any]]:
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    for file in sorted(f for room in ROOMS for f in (ROOT / "rlad_kernels" / room).rglob("*.py")):
        source = file.read_text()
        tree, unread = get_ast(source), annotations(source)
        for name in plugins.operator_names():
            operator = plugins.get_operator(name)
            if operator.arguments():
                continue
            places = (start for node in ast_nodes(tree) for start, _ in operator().mutation_positions(node))
            for occurrence, start in enumerate(places):
                if not any(a <= start < b for a, b in unread):
                    yield {"file": str(file.relative_to(ROOT)), "operator": name, "occurrence": occurrence, "line": start[0]}


def changed(mutant: dict[str, Any]) -> tuple[str, str]:
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    source = (ROOT / mutant["file"]).read_text()
    return source, mutate_code(source, plugins.get_operator(mutant["operator"])(), mutant["occurrence"])


def innermost(tree: ast.Module, line: int, kinds: Any) -> Any:
    """The last to begin of the nodes that a line is in, decorators included."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, kinds)]
    inside = [n for n in nodes if min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))]) <= line <= n.end_lineno]
    return max(inside, key=lambda n: n.lineno, default=None)


def statement(tree: ast.Module, line: int) -> range:
    """The lines of the innermost statement, of an ``if`` or ``def`` without what is under it."""
    inner = innermost(tree, line, ast.stmt)
    body = getattr(inner, "body", None)
    return range(min(inner.lineno, line), body[0].lineno if body else inner.end_lineno + 1)


def block(tree: ast.Module, line: int) -> range:
    """The lines of the innermost function or class, or all."""
    inner = innermost(tree, line, ast.FunctionDef | ast.ClassDef)
    return range(inner.lineno, inner.end_lineno + 1) if inner else range(1, (tree.body[-1].end_lineno or 0) + 1)


def tests_of(mutant: dict[str, Any], places: dict[str, Any], took: dict[str, float]) -> list[list[str]]:
    """Tests that run the line, by file: the cheapest of every file, then the second of every file, and so on."""
    lines, tree = places.get(mutant["file"], {}), ast.parse((ROOT / mutant["file"]).read_text())
    names = {name for line in statement(tree, mutant["line"]) for name in lines.get(str(line), [])}
    if not names and str(mutant["line"]) in lines:  # run when it was imported
        names = {name for line in block(tree, mutant["line"]) for name in lines.get(str(line), [])}
    files: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda t: took[t]):
        files[name.split("::")[0]].append(name)
    rounds = [(k, name) for same in files.values() for k, name in enumerate(same)]
    chosen, left = defaultdict(list), SECONDS
    for _, name in sorted(rounds, key=lambda r: (r[0], took[r[1]])):
        if took[name] <= left:
            left -= took[name]
            chosen[name.split("::")[0]].append(name)
    return list(chosen.values())


def files_of(mutant: dict[str, Any], places: dict[str, Any]) -> list[list[str]]:
    """Whole files, every case: of ranks where it is about ranks, those that run the function, those that name the module."""
    path = ROOT / mutant["file"]
    source, lines = path.read_text(), places.get(mutant["file"], {})
    near = block(ast.parse(source), mutant["line"])
    ranks = RANKS if re.search("shard|group|gather", "\n".join(source.split("\n")[near.start - 1 : near.stop - 1])) else ()
    count = Counter(name.split("::")[0] for name in {name for line in near for name in lines.get(str(line), [])})
    naming = [str(f.relative_to(ROOT)) for f in (ROOT / "tests").glob("test_*.py") if re.search(rf"\b{path.stem}\b", f.read_text())]
    return [[file] for file in dict.fromkeys((*ranks, *(file for file, _ in count.most_common()), *sorted(naming)))]


def drawn(count: int, seed: int) -> list[dict[str, Any]]:
    """The first ``count`` of all mutants in a random order; what Python refuses to compile would be killed by anything."""
    every = sorted(mutants(), key=lambda m: json.dumps(m, sort_keys=True))
    random.Random(seed).shuffle(every)
    found: list[dict[str, Any]] = []
    while len(found) < count:
        mutant = every[len(found)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of `is` beside a literal
            try:
                compile(changed(mutant)[1], mutant["file"], "exec")
            except SyntaxError:
                del every[len(found)]
                continue
        found.append(mutant)
    return found


# --- one at a time


def under_tests(files: list[list[str]], log: Path) -> int:
    """In a fork: 1 when a test fails, or the code cannot be imported."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for names in files:
        if pytest.main(["-x", "-q", "--no-header", "--tb=line", *names]):
            return 1
    return 0


def forked(files: list[list[str]], log: Path, seconds: float) -> str:
    """What becomes of the tests in a process of their own."""
    deadline, pid = time.monotonic() + seconds, os.fork()
    if not pid:
        code = 1
        try:
            code = under_tests(files, log)
        finally:
            os._exit(code)
    while time.monotonic() < deadline:
        time.sleep(0.05)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "killed" if status else "survived"
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timed out"


def run_one(tree: Path, mutant: dict[str, Any], files: list[list[str]], seconds: float, log: Path) -> dict[str, Any]:
    before, after = changed(mutant)
    begun, file, wide = time.monotonic(), tree / mutant["file"], seconds == WIDE
    file.write_text(after)
    outcome = forked(files, log, seconds) if files else "untested"
    file.write_text(before)
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", log.read_text()) if wide and outcome == "killed" else []
    if wide and (outcome == "timed out" or (failed and forked([failed], log, seconds) != "survived")):
        outcome = "survived"  # too many tests, or one that fails without the mutant too
    diff = [x for x in unified_diff(before.split("\n"), after.split("\n"), lineterm="", n=0) if x[:1] in "+-"][2:]
    found = {"outcome": outcome, "tests": sum(map(len, files)), "wide": wide, "by": failed, "seconds": time.monotonic() - begun}
    return {**mutant, **found, "diff": diff}


def work(out: Path, number: int, workers: int, todo: list[dict[str, Any]]) -> None:
    """Every ``workers``-th mutant, in a tree of its own, whose package and tests this process is yet to import."""
    for name in WARM:
        importlib.import_module(name)
    places, took = json.loads((out / PLACES).read_text()), json.loads((out / SEEN).read_text())
    for mutant in todo[number::workers]:
        wide = mutant.pop("wide", False)
        files = files_of(mutant, places) if wide else tests_of(mutant, places, took)
        seconds = WIDE if wide else GRACE + 3 * sum(took[t] for names in files for t in names)
        found = run_one(Path.cwd(), mutant, files, seconds, out / f"log-{number}")
        print(f"{found['outcome']:9} {mutant['file']}:{mutant['line']}", file=sys.stderr, flush=True)
        with (out / "results.jsonl").open("a") as f:
            f.write(json.dumps(found) + "\n")


def start(out: Path, workers: int) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    running = []
    for number in range(workers):
        tree = out / f"tree-{number}"
        shutil.rmtree(tree, ignore_errors=True)
        for name in [*filter(None, tracked), *(str(so.relative_to(ROOT)) for so in (ROOT / "rlad_kernels").glob("_C*.so"))]:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        arguments = ["work", "--out", str(out), "--workers", str(workers), "--number", str(number)]
        running.append(subprocess.Popen([sys.executable, "-m", "tests.mutants", *arguments], cwd=tree, env=env))
    for process in running:
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("do", choices=["map", "run", "work"])
    parser.add_argument("pytest_args", nargs="*", help="of map: other tests than all")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "mutants")
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    args, others = parser.parse_known_args()
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.do == "map":
        make_map(out, [*args.pytest_args, *others])
        return 0
    sample = out / "sample.json"
    if args.do == "work":
        work(out, args.number, args.workers, json.loads(sample.read_text()))
        return 0
    chosen, results = drawn(args.sample, args.seed), out / "results.jsonl"

    def known() -> list[dict[str, Any]]:
        """What is known of each that was drawn, its last round."""
        lines = map(json.loads, results.read_text().splitlines()) if results.exists() else ()
        last = {tuple(m[k] for k in KEY): m for m in lines}
        return [m for c in chosen if (m := last.get(tuple(c[k] for k in KEY)))]

    done = {tuple(m[k] for k in KEY) for m in known()}
    sample.write_text(json.dumps([c for c in chosen if tuple(c[k] for k in KEY) not in done]))
    start(out, args.workers)
    again = [m for m in known() if m["outcome"] not in KILLED and not m["wide"]]
    sample.write_text(json.dumps([{**{k: m[k] for k in (*KEY, "line")}, "wide": True} for m in again]))
    start(out, args.workers)
    found = known()
    for m in found:
        if m["outcome"] not in KILLED:
            print(f"{m['outcome']}, {m['tests']} tests: {m['file']}:{m['line']} {m['operator']}", *m["diff"], sep="\n  ")
    count = Counter(m["outcome"] for m in found)
    killed = sum(count[outcome] for outcome in KILLED)
    print(f"{len(found)} mutants: {dict(count)}; {killed / max(1, len(found)):.1%} are seen")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
