"""What examples/rlad_and_others.py does beside training: problems, grades, table and picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.cpu


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("reasoning_gym")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import rlad_and_others

    yield rlad_and_others
    for name in ("rlad_and_others", "rlad_smollm2", "smollm2_training", "smollm2_loss", "smollm2_report"):
        sys.modules.pop(name, None)


def test_problems_are_apart_and_graded(example: Any) -> None:
    problems, held_out, score = example.load_problems(0, 240)
    assert len(held_out) == 240 and len(problems) > 1000 and not {*problems} & {*held_out, *example.WORKED}
    for problem in held_out[:20]:
        first, second, third = words = problem.answer.split(", ")
        assert words == sorted(words) and sorted(problem.question.partition(": ")[2].split(", ")) == words
        said = f"Sorted: {first.upper()}, {third}; {second}."
        replies = (problem.answer, said, f"{third} {first} {second}", first, "no idea", "")
        assert [score(reply, problem) for reply in replies] == [1.0, 1 / 3, 0.2, 1 / 3, 0.0, 0.0]
        assert problem.answer in example.teacher_chat(problem)[-1]["content"]
        assert problem.answer not in example.student_chat(problem)[-1]["content"] or problem.answer in problem.question


def test_the_table_is_over_seeds_and_the_picture_is_drawn(example: Any, tmp_path: Path) -> None:
    def run(method: str, seed: int, after: float) -> dict[str, Any]:
        points = [{"step": 0, "score": 0.25, "sorted": 0.0}, {"step": 2, "score": after, "sorted": after / 2}]
        return {"method": method, "seed": seed, "held_out": points, "history": [{"step": s, "reward": after} for s in (1, 2)]}

    runs = [run("rlad", 0, 0.5), run("rlad", 1, 0.7), run("grpo", 0, 0.3)]
    assert example.table(runs).splitlines()[1:] == [
        "rlad    0.250 ± 0.000    0.600 ± 0.141    0.300 ± 0.071",
        "grpo    0.250 ± 0.000    0.300 ± 0.000    0.150 ± 0.000",
    ]
    example.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
