"""The reference: its pages are what the code says, every public name is on them, every method's call runs, commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import rlad_kernels as rk
from tests.test_docs import PAGES, ROOT, blocks, loaded

make_calls, make_reference = loaded("docs/make_calls.py"), loaded("docs/make_reference.py")
ENTRIES = [name for page in make_reference.pages().values() for names in page.values() for name in names]

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("page", make_reference.pages())
def test_the_pages_are_what_the_code_says(page: str) -> None:
    committed = (ROOT / "docs" / "reference" / f"{page}.rst").read_text()
    assert committed == make_reference.api_page(page), "run `make docs`"


def test_the_other_pages_are_up_to_date() -> None:
    assert make_calls.PAGE.read_text() == make_calls.page(), "run `make docs`"
    for name in ("versions", "benchmarks"):
        assert (ROOT / "docs" / f"{name}.md").read_text() == getattr(make_reference, f"{name}_page")(), "run `make docs`"


def test_every_public_name_has_an_entry() -> None:
    rooms = {"losses", "context", "masks", "spans", "supports"}
    public = {*rk.__all__} - rooms | {f"losses.{k}" for k in rk.losses.__all__}
    public |= {f"{room}.{k}" for room in rooms - {"losses"} for k in make_reference.functions(room)}
    assert public <= {*ENTRIES}
    assert len(ENTRIES) == len({*ENTRIES})
    for name in (x for x in ENTRIES if not x.startswith("integrations.")):
        assert make_reference.resolved(name) is not None


def test_every_call_of_a_method_runs_and_reaches_the_weights() -> None:
    setup, *calls = blocks(ROOT / "docs" / "reference" / "methods.md")
    assert len(calls) == len(rk.METHODS)
    world: dict[str, Any] = {}
    exec(setup, world)
    for code in calls:
        world.pop("out", None)
        exec(code, world)
        assert world["out"].loss.isfinite(), code
        world["weight"].grad = None
        world["out"].loss.backward()
        assert world["weight"].grad.isfinite().all(), code


def test_the_signature_has_every_tensor_that_the_call_needs() -> None:
    for method in rk.METHODS.values():
        words = re.findall(r"\w+", method.signature())
        assert {*method.needs} <= {*words}, method.name


def test_what_one_is_told_to_begin_with_exists() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    table = text.split("## Which loss do I want?")[1].split("\n## ")[0]
    names = re.findall(r"`(\w+)`", "".join(row.split("|")[2] for row in table.split("\n") if row.startswith("|")))
    assert len(names) > 12 and {*names} <= {*rk.METHODS}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_is_of_a_kind_that_is_run_or_checked(page: Path) -> None:
    text = page.read_text()
    kinds = {*re.findall(r"^ *```(\w+)$", text, re.MULTILINE)}
    assert kinds <= {"python", "bash", "text"} | ({"cpp"} if page.name == "CONTRIBUTING.md" else set())


COMMAND = re.compile(r"python (?:-m ([\w.]+)|((?:examples|docs|bench)/[\w/]+\.py))")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_is_of_a_module_or_a_script_that_exists(page: Path) -> None:
    for module, script in COMMAND.findall(page.read_text()):
        if script or module.startswith(("rlad_kernels", "bench")):
            assert (ROOT / script).is_file() if script else importlib.util.find_spec(module.rstrip(".")), module or script
