"""The notebooks run from top to bottom as they are, and are committed with what they printed and drew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))

pytestmark = pytest.mark.cpu


def cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def run(path: Path) -> dict[str, Any]:
    """What the notebook's names are at its end."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    world: dict[str, Any] = {}
    for cell in cells(path):
        exec(compile("".join(cell["source"]), path.name, "exec"), world)
    world["plt"].close("all")
    return world


def test_both_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["replace_your_loss", "rlad_with_a_teacher"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_committed_as_it_ran(path: Path) -> None:
    assert [cell["execution_count"] for cell in cells(path)] == [*range(1, len(cells(path)) + 1)]
    outputs = [x for cell in cells(path) for x in cell["outputs"]]
    assert {x["output_type"] for x in outputs} <= {"stream", "display_data"}
    assert {x.get("name", "stdout") for x in outputs} == {"stdout"}
    assert sum("image/png" in x.get("data", {}) for x in outputs) == 1
    assert path.stat().st_size < 100_000


def test_the_loss_is_replaced() -> None:
    world = run(EXAMPLES / "replace_your_loss.ipynb")  # it compares losses by itself
    wanted = world["wanted"]
    for mine, theirs in zip((world["hidden"].grad, world["lm_head"].weight.grad), wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_student_learns_from_reward_and_teacher() -> None:
    world = run(EXAMPLES / "rlad_with_a_teacher.ipynb")
    assert world["accuracy"](world["teacher"]) > 0.9
    for curves in world["curves"].values():
        assert all(curve[0] < 0.2 for curve in curves)
        assert sum(curve[-1] for curve in curves) > sum(curve[0] for curve in curves) + 0.1 * len(curves)
