"""The documentation's Python runs as printed, what it names exists, its new method is one file, and every method has its row."""

from __future__ import annotations

import gc
import importlib.util
import io
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels import losses
from rlad_kernels.losses.methods import FAMILIES, METHODS, Method
from tests.oracles import gradient, hold, reduced
from tests.test_house import FLOORS

ROOT = Path(__file__).parent.parent


def loaded(path: str) -> ModuleType:
    """A script that is not in a package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_methods = loaded("docs/make_methods.py")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[str]:
    text = page.read_text()
    found = re.findall(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in code.split("\n")) for indent, code in found]


@pytest.mark.cpu
def test_readme_example_runs_and_its_loss_moves_the_student() -> None:
    (code,) = blocks(ROOT / "README.md")
    world: dict[str, object] = {}
    exec(code, world)
    assert world["hidden"].grad.abs().sum() > 0
    assert world["lm_head"].weight.grad.abs().sum() > 0


@pytest.fixture
def new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    """CONTRIBUTING's example, as one more file of ``losses``."""
    code, *_ = blocks(ROOT / "CONTRIBUTING.md")
    (tmp_path / "entropy_bonus.py").write_text(code)
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path)])
    before, names = dict(METHODS), [*losses.__all__]
    losses.load()
    yield METHODS["entropy_bonus"]
    METHODS.clear()
    METHODS.update(before)
    losses.__all__[:] = names
    del sys.modules["rlad_kernels.losses.entropy_bonus"], losses.entropy_bonus, losses.EntropyBonus  # type: ignore[attr-defined]


def in_the_sweep(loss: rk.TokenLoss, hidden: Tensor, weight: Tensor, target: Tensor, **given: Any) -> losses.LossOutput:
    return rk.linear_loss(hidden, rk.LMHead(weight), target, loss, **given)


def on_log_probs(loss: rk.TokenLoss, hidden: Tensor, weight: Tensor, target: Tensor, **given: Any) -> losses.LossOutput:
    return loss(rk.linear_logp(hidden, rk.LMHead(weight), target, entropy=True, mask=given.get("mask")), **given)


ROADS = (in_the_sweep, on_log_probs)
each_road = pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)


@each_road
def test_a_new_method_is_one_file(new_method: Method, road: Any) -> None:
    shape, v = (3, 5), 11
    hidden, weight = torch.randn(*shape, 4, requires_grad=True), torch.randn(v, 4, requires_grad=True)
    target, advantages, mask = torch.randint(v, shape), torch.randn(shape), torch.rand(shape) > 0.3
    loss = rk.losses.EntropyBonus(beta=0.3)
    out = road(loss, hidden, weight, target, advantages=advantages, mask=mask, reduction="seq-mean-token-mean")
    out.loss.backward()

    def oracle(hidden: Tensor, weight: Tensor) -> Tensor:
        logp = (hidden @ weight.T).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        token = -advantages.to(logp.dtype) * logp.gather(-1, target[..., None])[..., 0] - 0.3 * entropy
        return reduced(token, mask, "seq-mean-token-mean")

    hold(out.loss.detach(), oracle, hidden.detach(), weight.detach())
    hold(hidden.grad, gradient(oracle), hidden.detach(), weight.detach())
    hold(weight.grad, gradient(lambda w, h: oracle(h, w)), weight.detach(), hidden.detach())
    assert set(out.metrics) - {"rows_skipped"} == {"entropy"}


def test_a_new_method_checks_what_it_is_given(new_method: Method) -> None:
    assert new_method.loss == rk.losses.EntropyBonus() and new_method.needs == ("advantages",)
    with pytest.raises(ValueError, match=r"EntropyBonus: beta must be in \[0, inf\), got -1"):
        rk.losses.EntropyBonus(beta=-1)
    with pytest.raises(ValueError, match="EntropyBonus: advantages is None"):
        new_method(rk.TokenScores(logp=torch.zeros(3), entropy=torch.zeros(3)))
    with pytest.raises(ValueError, match="EntropyBonus: scores must be TokenScores with logp, entropy, got Tensor"):
        new_method(torch.zeros(3), advantages=torch.zeros(3))


@each_road
def test_a_new_method_compiles(new_method: Method, road: Any) -> None:
    hidden, weight, target = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.randint(9, (6,))

    def call(hidden: Tensor) -> losses.LossOutput:
        return road(new_method.loss, hidden, weight, target, advantages=torch.ones(6))

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # outputs that alias are only warned of
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(hidden)
    want = call(hidden)
    assert torch.allclose(got.loss, want.loss, rtol=1e-6)
    assert set(got.metrics) == set(want.metrics)
    grads = [torch.autograd.grad(x.loss, hidden)[0] for x in (got, want)]
    assert torch.allclose(*grads, rtol=1e-6, atol=1e-8)


@pytest.mark.cpu
def test_a_new_method_gets_its_row_and_its_panel(new_method: Method) -> None:
    assert "| `entropy_bonus` | −Â·log π(y) − β·H, β = 0.01 | `EntropyBonus()` | `advantages` |" in make_methods.page()
    for x, y in make_methods.curves(new_method):
        assert x.shape == y.shape
    assert "entropy_bonus" in panels(make_methods.draw("other"))


def panels(png: bytes) -> list[str]:
    """The methods that a committed picture shows, from its text chunk."""
    from PIL import Image

    return Image.open(io.BytesIO(png)).info["Description"].split()


def test_the_page_of_methods_is_what_the_registry_says() -> None:
    committed = (ROOT / "docs" / "methods.md").read_text()
    assert committed == make_methods.page(), "run `make docs`"
    assert all(f"\n| `{name}` |" in committed for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_on_the_page_is_what_one_writes(name: str) -> None:
    assert eval(make_methods.written(METHODS[name].loss), vars(losses).copy()) == METHODS[name].loss


@pytest.mark.cpu
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_has_a_panel(family: str) -> None:
    names = [m.name for m in make_methods.members(family)]
    if names:
        png = make_methods.picture(family).read_bytes()
        assert panels(png) == names, "run `make docs`"
        assert len(png) <= 3_000 * (len(names) + 1)


@pytest.mark.cpu
def test_the_map_has_every_method_at_its_place() -> None:
    png = (make_methods.PICTURES / "map.png").read_bytes()
    assert panels(png) == [*METHODS], "run `make docs`"
    assert {m.access for m in METHODS.values()} == {*make_methods.ACCESS}
    assert {m.signal for m in METHODS.values()} == {*make_methods.SIGNALS}
    assert {m.products for m in METHODS.values()} == {*make_methods.PRODUCT_COLORS}
    places = {name: (METHODS[name].signal, METHODS[name].access) for name in ("grpo", "trrd", "opd", "lsm", "gkd_jsd", "seq_kd")}
    assert places == {
        "grpo": ("reward", "none"), "trrd": ("both", "sampled"), "opd": ("teacher", "sampled"), "lsm": ("teacher", "top-k"),
        "gkd_jsd": ("teacher", "head"), "seq_kd": ("teacher", "text"),
    }  # fmt: skip
    assert [METHODS[name].granularity for name in ("gspo", "grpo", "gkd_jsd")] == ["sequence", "token", "token"]


@pytest.mark.cpu
@pytest.mark.parametrize("name", METHODS)
def test_panels_are_drawn_from_the_methods_own_gradients(name: str) -> None:
    for _, y in make_methods.curves(METHODS[name]):
        assert y.shape == (make_methods.POINTS,)


@pytest.mark.cpu
def test_a_method_that_cannot_be_drawn_is_an_error() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Scaled(rk.TokenLoss):
        factor: float = 0.0

        def tokens(self, scores: rk.TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
            return scores.logp * self.factor, {}

    class Mysterious(Scaled):
        needs = ("mystery",)

    with pytest.raises(ValueError, match=r"make_methods: grpo needs \['mystery'\]; add them to what 'ratio' knows"):
        make_methods.curves(replace(METHODS["grpo"], loss=Mysterious()))
    for factor in (0.0, torch.nan):
        with pytest.raises(ValueError, match="make_methods: grpo has no finite gradient"):
            make_methods.curves(replace(METHODS["grpo"], loss=Scaled(factor=factor)))


@pytest.mark.cpu
def test_the_examples_of_the_page_run() -> None:
    worlds: list[dict[str, Any]] = [{} for _ in blocks(ROOT / "docs" / "methods.md")]
    for code, world in zip(blocks(ROOT / "docs" / "methods.md"), worlds, strict=True):
        exec(code, world)
    roads, spans = worlds
    assert roads["dapo"] is METHODS["dapo"] and set(roads["out"].metrics) == {"infinite"}
    assert spans["out"].loss.item() == -1
    assert spans["reward"].shape == (1,)


@pytest.mark.cpu
def test_the_page_about_scale_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    head, data, context, model = blocks(ROOT / "docs" / "scale.md")
    worlds: list[dict[str, Any]] = [{}, {}, {}]
    try:
        for code, world in zip((head, data, context), worlds, strict=True):
            exec(code, world)
    finally:
        torch.distributed.destroy_process_group()
    assert worlds[0]["hidden"].grad.abs().sum() > 0 and worlds[0]["weight"].grad.shape == (1000, 64)
    assert all(p.grad.abs().sum() > 0 for p in worlds[1]["model"].parameters())
    assert worlds[2]["labels"][:, -1].tolist() == [-100, -100] and worlds[2]["out"].loss.isfinite()
    exec(model, {})
    assert capsys.readouterr().out.splitlines() == [x.removeprefix("# ") for x in model.splitlines() if x.startswith("# ")]


@pytest.mark.cpu
def test_the_sequence_level_gradient_varies_more_and_more(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    facts = loaded("examples/facts_variance.py")
    slopes = facts.main(["--samples", "400", "--longest", "32", "--out", str(tmp_path)])
    assert slopes[0.0] + 0.5 < slopes[0.9] < slopes[1.0]
    assert "fitted slope" in capsys.readouterr().out
    assert (tmp_path / "variance.png").stat().st_size > 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_and_files_named_in_the_docs_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^):,]+)\)", prose):
        path, _, anchor = link.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), link
        assert not anchor or anchor in anchors(linked), link


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_contributing_draws_the_house_as_it_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rule = next(x for x in re.findall(r"`([^`\n]+)`", text) if x.startswith("integrations, tools →"))
    assert [set(re.split(r", | \| ", floor)) for floor in rule.split(" → ")] == [set(floor) for floor in FLOORS]
    rooms = {p.name for p in (ROOT / "rlad_kernels").iterdir() if (p / "__init__.py").exists()}
    table = re.findall(r"^\| `(?:rlad_kernels|csrc|tests|bench)/.*$", text, re.MULTILINE)
    rows = {named(row)[0]: row for row in table}
    assert {Path(path).name for path in rows if path.startswith("rlad_kernels/")} == rooms == {x for floor in FLOORS for x in floor}
    for folder, row in rows.items():
        for path in named(row.rpartition(" | ")[2]):
            assert (ROOT / folder / path).exists(), f"{folder}{path}"
    drawn = text.split("```")[1]
    assert set(re.findall(r"─ (\w+) ─", drawn)) == rooms
    assert len({len(line) for line in drawn.strip().split("\n")}) == 1
    for path in re.findall(r"`((?:rlad_kernels|csrc|tests|docs|linear|engine|backends)/[\w./]+)`", text):
        assert any((base / path).exists() for base in (ROOT, ROOT / "rlad_kernels")), path


def named(row: str) -> list[str]:
    return re.findall(r"`([\w./]+)`", row)


def resolved(name: str) -> Any:
    """What ``rk.losses.GRPO`` or ``rlad_kernels.core.config`` names."""
    x: Any = rk
    for part in name.split(".")[1:]:
        x = getattr(x, part) if hasattr(x, part) else import_module(f"{x.__name__}.{part}")
    return x


def renamed() -> tuple[set[str], set[str]]:
    """CHANGELOG's table: names that were in ``rk`` and are gone, and the new ones in full."""
    _, table = (ROOT / "CHANGELOG.md").read_text().split("### Old names and new ones")
    rows = [row.strip("| ").split(" | ") for row in table.split("\n") if row.startswith("| ")]
    old, new = (" ".join(column) for column in zip(*rows, strict=True))
    return set(re.findall(r"\brk\.(\w+)", old)), set(re.findall(r"\b(?:rk|rlad_kernels)\.[\w.]*\w", new))


def test_the_changelog_knows_old_names_and_new_ones() -> None:
    old, new = renamed()
    assert len(old) == 40 and not [name for name in old if hasattr(rk, name)]
    assert all(resolved(name) is not None for name in new)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_page_has_an_old_name(page: Path) -> None:
    old, _ = renamed()
    used = {x for x in re.findall(r"\brk\.(\w+)", page.read_text()) if x in old}
    assert not used | {x for x in re.findall(r"`(\w+_loss)\b", page.read_text()) if x in old}


ON_TINY_MODELS = ("trl", "transformers", "liger")  # run by test_integration_docs.py
ELSEWHERE = (*ON_TINY_MODELS, "hub")  # and by test_hub.py


@pytest.mark.cpu
@pytest.mark.parametrize("page", [p for p in (ROOT / "docs").glob("*.md") if p.stem not in ELSEWHERE], ids=lambda p: p.name)
def test_python_on_the_docs_pages_runs(page: Path) -> None:
    try:
        for code in blocks(page):
            exec(code, {})
    finally:
        if dist.is_initialized():
            gc.collect()  # DDP's reducer before its group: see tests/engine_recipes.py
            dist.destroy_process_group()
