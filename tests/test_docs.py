"""The documentation's Python runs as printed, its make targets exist, its new method is one file, and every method has its row."""

from __future__ import annotations

import importlib.util
import io
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels import losses
from rlad_kernels.core.registry import FAMILIES, METHODS, TOKEN_LOSSES
from tests.oracles import gradient, hold, reduced

ROOT = Path(__file__).parent.parent


def loaded(path: str) -> ModuleType:
    """A script that is not in a package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_methods = loaded("docs/make_methods.py")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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
def new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[rk.registry.Method]:
    """CONTRIBUTING's example, as one more file of ``losses``."""
    (code,) = blocks(ROOT / "CONTRIBUTING.md")
    (tmp_path / "entropy_bonus.py").write_text(code)
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path)])
    before = dict(METHODS), dict(TOKEN_LOSSES)
    losses.load()
    yield METHODS["entropy_bonus"]
    for now, then in zip((METHODS, TOKEN_LOSSES), before, strict=True):
        now.clear()
        now.update(then)
    del sys.modules["rlad_kernels.losses.entropy_bonus"], losses.entropy_bonus  # type: ignore[attr-defined]


def test_a_new_method_is_one_file(new_method: rk.registry.Method) -> None:
    shape, v = (3, 5), 11
    hidden, weight = torch.randn(*shape, 4, requires_grad=True), torch.randn(v, 4, requires_grad=True)
    target, advantages, mask = torch.randint(v, shape), torch.randn(shape), torch.rand(shape) > 0.3
    out = new_method(hidden, rk.LMHead(weight), target, advantages, mask, beta=0.3, reduction="seq-mean-token-mean")
    out.loss.backward()

    def oracle(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logp = (hidden @ weight.T).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        token = -advantages.to(logp.dtype) * logp.gather(-1, target[..., None])[..., 0] - 0.3 * entropy
        return reduced(token, mask, "seq-mean-token-mean")

    hold(out.loss.detach(), oracle, hidden.detach(), weight.detach())
    hold(hidden.grad, gradient(oracle), hidden.detach(), weight.detach())
    hold(weight.grad, gradient(lambda w, h: oracle(h, w)), weight.detach(), hidden.detach())
    assert set(out.metrics) == {"entropy", "rows_skipped"}
    with pytest.raises(ValueError, match="entropy_bonus_loss: beta must be at least 0, got -1"):
        new_method(hidden, rk.LMHead(weight), target, advantages, beta=-1)


def test_a_new_method_compiles(new_method: rk.registry.Method) -> None:
    hidden, weight, target = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.randint(9, (6,))

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return new_method.call(hidden, rk.LMHead(weight), target, torch.ones(6)).loss

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # outputs that alias are only warned of
        got = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    want = loss(hidden)
    assert torch.allclose(got, want, rtol=1e-6)
    grads = [torch.autograd.grad(x, hidden)[0] for x in (got, want)]
    assert torch.allclose(*grads, rtol=1e-6, atol=1e-8)


@pytest.mark.cpu
def test_a_new_method_gets_its_row_and_its_panel(new_method: rk.registry.Method) -> None:
    assert "| `entropy_bonus` | −Â·log π(y) − β·H, β = 0.01 | `entropy_bonus_loss` | `advantages` |" in make_methods.page()
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


@pytest.mark.cpu
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_has_a_panel(family: str) -> None:
    names = [m.name for m in make_methods.members(family)]
    if names:
        png = make_methods.picture(family).read_bytes()
        assert panels(png) == names, "run `make docs`"
        assert len(png) <= 40_000


@pytest.mark.cpu
@pytest.mark.parametrize("name", METHODS)
def test_panels_are_drawn_from_the_methods_own_gradients(name: str) -> None:
    for _, y in make_methods.curves(METHODS[name]):
        assert y.shape == (make_methods.POINTS,)


@pytest.mark.cpu
def test_a_method_that_cannot_be_drawn_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"make_methods: grpo wants \['mystery'\]; add them to the inputs of 'ratio'"):
        make_methods.curves(replace(METHODS["grpo"], needs=("mystery",)))
    with pytest.raises(ValueError, match="make_methods: grpo takes no denominator"):
        make_methods.curves(replace(METHODS["grpo"], call=lambda logp: logp, needs=()))
    for factor in (0, torch.nan):

        def flat(logp: torch.Tensor, factor: float = factor, denominator: float = 1.0) -> rk.LossOutput:
            return rk.LossOutput((logp * factor).sum(), logp, {})

        with pytest.raises(ValueError, match="make_methods: grpo has no finite gradient"):
            make_methods.curves(replace(METHODS["grpo"], call=flat, needs=()))


@pytest.mark.cpu
def test_the_examples_of_the_page_run() -> None:
    for code in blocks(ROOT / "docs" / "methods.md"):
        world: dict[str, object] = {}
        exec(code, world)
        assert world["out"].loss.item() == -1
        assert world["reward"].shape == (1,)


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
    for link in re.findall(r"\]\(([^)#:,]+)\)", text):
        assert (page.parent / link).exists(), link


ON_TINY_MODELS = ("trl", "transformers", "liger")  # run by test_integration_docs.py


@pytest.mark.cpu
@pytest.mark.parametrize("page", [p for p in PAGES[2:] if p.stem not in ON_TINY_MODELS], ids=lambda p: p.name)
def test_python_on_the_docs_pages_runs(page: Path) -> None:
    for code in blocks(page):
        exec(code, {})
