"""Where the suite runs: C++ on CPU (default), interpreted Triton (TRITON_INTERPRET=1), or CUDA (RLAD_TEST_DEVICE=cuda)."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("RLAD_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)  # before the tests' modules are imported: tables of cases hold tensors
DONE = os.environ.get("RLAD_TEST_DONE")  # a file of finished tests: a run that was cut off goes on where it stopped
if DONE and "RLAD_GPU_SECONDS" in os.environ:  # the same instant in every worker: they inherit it
    os.environ.setdefault("RLAD_TEST_UNTIL", str(time.time() + float(os.environ["RLAD_GPU_SECONDS"])))
UNTIL = float(os.environ.get("RLAD_TEST_UNTIL", "inf"))
EARLIER, LATE = "passed in an earlier run", "no time left"

# inductor's cache does not tell capabilities apart: it would serve one the code of another, which does not compile there
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{default_cache_dir()}_{torch.backends.cpu.get_cpu_capability()}"

hypothesis.settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, max_examples=8 if INTERPRET else 40, print_blob=False
)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    done = set(Path(DONE).read_text().split("\n")) if DONE and Path(DONE).exists() else set()
    for item in items:
        if item.get_closest_marker("cpu") and (INTERPRET or DEVICE != "cpu"):
            item.add_marker(pytest.mark.skip(reason="for the CPU: its C++ backend, float64, a full size, or a script"))
        if item.get_closest_marker("slow_interpreted") and INTERPRET:
            item.add_marker(pytest.mark.skip(reason="too slow under the Triton interpreter; C++ and CUDA run it"))
        if item.get_closest_marker("interpreted") and not INTERPRET:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))
        if item.nodeid in done:
            item.add_marker(pytest.mark.skip(reason=EARLIER))


def pytest_runtest_setup() -> None:
    if time.time() > UNTIL:
        pytest.skip(LATE)


def pytest_configure(config: pytest.Config) -> None:
    if DONE and not hasattr(config, "workerinput"):  # xdist's controller hears of every test
        config.pluginmanager.register(Remember(Path(DONE)))


class Remember:
    """Keeps the tests that passed in a file, and the traceback of each that fails in one of its own beside it, as they end."""

    def __init__(self, done: Path) -> None:
        self.done, self.failures = done, done.with_name("failures")
        self.failures.mkdir(parents=True, exist_ok=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = self.failures / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', report.nodeid)[:200]}.txt"
        if report.failed:
            file.write_text("\n\n".join((report.nodeid, report.longreprtext, *(f"{k}\n{text}" for k, text in report.sections))))
        elif report.when == "call" and report.passed:
            file.unlink(missing_ok=True)
            with self.done.open("a") as lines:
                lines.write(report.nodeid + "\n")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        session.config.option.tbstyle = "no"  # tracebacks are in their files: the end is a short table

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        reasons = Counter(str(r.longrepr[2]).removeprefix("Skipped: ") for r in terminalreporter.getreports("skipped"))
        terminalreporter.section("skipped")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:>6}  {reason}")
        if reasons[LATE]:
            terminalreporter.section(f"NOT FINISHED: {reasons[LATE]} tests left, the same command goes on", "!")


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    """Every test: a fixed seed, and settings as they were."""
    from rlad_kernels.core.config import settings

    before = dict(vars(settings))
    torch.manual_seed(0)
    yield
    vars(settings).update(before)


@pytest.fixture(params=("generic", "avx2", "avx512"))  # avx512_bf16 and amx_bf16 run the avx512 row passes
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RLAD_CPU_ISA", request.param)
    try:
        assert torch.ops.rlad.cpu_isa() == request.param
    except RuntimeError:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param
