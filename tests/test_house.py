"""The house: imports run one way, files and signatures stay small, the top level has few names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest

import rlad_kernels as rk

ROOT = Path(rk.__file__).parent
# a room may import the rooms below its own floor, and itself
FLOORS = (("integrations", "tools"), ("linear", "batch"), ("losses", "engine"), ("backends",), ("core",))
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(p for p in ROOT.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module(path: Path) -> str:
    return ".".join(("rlad_kernels", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module(p): p for p in FILES}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules of this package that a file names in an import or a string, and whether that is inside a function."""
    top = set(tree(path).body)
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = module(path).split(".")[: len(module(path).split(".")) - node.level + (path.name == "__init__.py")]
            base = ".".join((*here, node.module or "")).strip(".") if node.level else node.module or ""
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            names = [x.value for x in node.args if isinstance(x, ast.Constant)]
        yield from ((n, node not in top) for n in names if n.split(".")[0] == "rlad_kernels")


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_run_down(path: Path) -> None:
    own = room(module(path))
    if own in ("", "__main__"):  # the front door
        return
    for name, late in imports(path):
        other = room(name)
        if other == "_C":  # the extension: only the contract loads it
            assert own == "backends"
            continue
        assert other in FLOOR, f"{module(path)} imports {name}: the package itself, or no room"
        assert other == own or FLOOR[other] > FLOOR[own], f"{module(path)} imports {name}: that runs up, or across"
        if late:  # of Triton and of frameworks alone
            assert other == "backends" or own == "integrations", f"{module(path)} imports {name} inside a function"


def test_no_circle() -> None:
    arrows = {m: {n for n, _ in imports(p) if n in MODULES and n != m} for m, p in MODULES.items()}
    done: dict[str, bool] = {}

    def visit(m: str, path: tuple[str, ...]) -> None:
        assert not (m in done and not done[m]), " → ".join((*path, m))
        if m in done:
            return
        done[m] = False
        for n in arrows[m]:
            visit(n, (*path, m))
        done[m] = True

    for m in arrows:
        visit(m, ())


def test_files_are_small() -> None:
    lines = {module(p): p.read_text().count("\n") for p in FILES if p.name != "__init__.py"}
    assert max(lines.values()) <= 350, max(lines, key=lines.__getitem__)
    assert median(lines.values()) <= 120


def test_signatures_are_short() -> None:
    counts = {}
    for path in FILES:
        if "triton" in path.parts:
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                counts[f"{module(path)}.{node.name}"] = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
    long = {k: n for k, n in counts.items() if n > 14 and not implements_an_op(k)}
    assert not long
    wide = [k for k, n in counts.items() if n > 8]
    assert len(wide) <= len(counts) / 10, f"{len(wide)} of {len(counts)}: {wide}"


def implements_an_op(name: str) -> bool:
    """Whether an op's schema, which holds tensors and numbers alone, makes this signature."""
    path, function = MODULES[name.rpartition(".")[0]], name.rpartition(".")[2]
    return function == "_fake" or any(
        isinstance(x, ast.Call) and getattr(x.func, "id", "") == "define" and ast.unparse(x.args[-1]) == function
        for x in ast.walk(tree(path))
    )


def test_rows_that_are_kept_as_written_are_few() -> None:
    assert sum(p.read_text().count("# fmt: skip") for p in FILES) <= 30


def test_the_top_level_has_few_names() -> None:
    rooms = {"context", "losses", "masks", "spans", "supports"}
    assert rooms < set(rk.__all__)
    assert len(set(rk.__all__) - rooms) <= 17
    assert all(hasattr(rk, name) for name in rk.__all__)
