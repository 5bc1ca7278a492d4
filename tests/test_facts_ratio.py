"""examples/facts_ratio.py: every fact it prints holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "facts_ratio.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("facts_ratio", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.cpu
@pytest.mark.parametrize("section", ["estimators", "extrapolation", "anchor"])
def test_every_fact_holds(section: str) -> None:
    facts = list(getattr(load(), section)())
    assert len(facts) >= 3
    assert [fact for fact in facts if not fact.holds] == []


@pytest.mark.cpu
def test_the_script_prints_a_line_a_fact_and_fails_on_a_false_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load()
    monkeypatch.setattr(module, "SECTIONS", (module.anchor,))
    assert module.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(list(module.anchor()))
    monkeypatch.setattr(module, "SECTIONS", (lambda: [module.Fact("a falsehood", 1.0, 2.0, 0.5)],))
    assert module.main() == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out
