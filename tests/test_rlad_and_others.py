"""What examples/rlad_and_others.py does beside training: problems, grades, table and picture."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
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
    assert len(held_out) == 240 and len(problems) > 300 and not {*problems} & {*held_out, *example.WORKED}
    assert max(Counter(p.answer for p in (*problems, *held_out)).values()) == example.OF_EACH
    for problem in held_out[:20]:
        a, b = map(int, re.findall(r"\d+", problem.question))
        answer = math.gcd(a, b)
        assert str(answer) == problem.answer != "1"
        words = f"The GCD is {answer}."
        assert [score(reply, problem) for reply in (problem.answer, words, "no idea", "")] == [
            1.0,
            len(problem.answer) / len(words),
            0,
            0,
        ]
        assert f"It is {answer}." in example.teacher_chat(problem)[-1]["content"] and len(example.teacher_chat(problem)) == 5
        assert example.student_chat(problem) == [{"role": "user", "content": problem.question}]


def test_the_table_is_over_seeds_and_the_picture_is_drawn(example: Any, tmp_path: Path) -> None:
    def run(method: str, seed: int, after: float) -> dict[str, Any]:
        points = [{"step": 0, "score": 0.25, "right": 0.0}, {"step": 2, "score": after, "right": after / 2}]
        return {"method": method, "seed": seed, "held_out": points, "history": [{"step": s, "reward": after} for s in (1, 2)]}

    runs = [run("rlad", 0, 0.5), run("rlad", 1, 0.7), run("grpo", 0, 0.3)]
    assert example.table(runs).splitlines()[1:] == [
        "rlad    0.250 ± 0.000    0.600 ± 0.141    0.300 ± 0.071",
        "grpo    0.250 ± 0.000    0.300 ± 0.000    0.150 ± 0.000",
    ]
    example.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
