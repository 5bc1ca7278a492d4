"""Write the tables of docs/methods.md and docs/img/methods/*.png from ``METHODS``: ``python docs/make_methods.py``.

A row a method, a panel a method. A panel is drawn by calling the method on a few tokens and asking autograd for its gradient;
a method that needs a tensor which is not known here, or whose gradient is not finite, stops the run.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses.methods import FAMILIES, METHODS, Method

DOCS = Path(__file__).parent
PICTURES = DOCS / "img" / "methods"
MARK = "<!-- From here on written by docs/make_methods.py. -->\n"
COLORS = ("#1f6f8b", "#c8553d")
POINTS = 61
SUMMED = rk.Reduction(denominator=1.0)  # the gradient of a token is then its own


class Drawn(NamedTuple):
    """How a family is drawn: the call of one curve from the places on its axis; and what axes and curves say."""

    call: Callable[[Method, Tensor, int], tuple[Tensor, Tensor]]  # gives the leaf, and the loss
    places: Tensor
    of: Callable[[Tensor, int], Tensor]  # (gradient of the leaf, which curve) → height of the curve, before the sign
    x: str
    y: str
    curves: tuple[str, ...]
    caption: str


def needed(method: Method, known: dict[str, Any]) -> dict[str, Any]:
    """The tensors that the method needs, by name.

    Raises:
        ValueError: naming what is not known here.
    """
    if missing := sorted(set(method.needs) - set(known)):
        raise ValueError(f"make_methods: {method.name} needs {missing}; add them to what {method.family!r} knows")
    return {k: known[k] for k in method.needs}


# What a panel is drawn with: a token that is a group of its own has no spread, and a sampler 0.1 below is outside of ±0.1 %.
OPTIONS: dict[str, dict[str, Any]] = {
    "topd": {"normalize": False},
    "geo_rs": {"rollout": rk.losses.Rollout("reject", 0.8, 1.25, level="geometric")},
}


def on_ratio(method: Method, x: Tensor, curve: int) -> tuple[Tensor, Tensor]:
    """Sampled tokens, each a sequence and a group of its own, whose log-ratio to the old policy is ``x``."""
    old, sign = torch.full_like(x, -2.0), 1 - 2 * curve
    logp = (old + x).requires_grad_()
    method = replace(method, loss=replace(method.loss, **OPTIONS.get(method.name, {})))
    gap = 0.4 if "advantages" in method.needs else 0.4 * sign
    known = {
        "old_logp": old, "rollout_logp": old - 0.1, "teacher_logp": old + gap, "ref_logp": old - 0.2, "base_logp": old - 0.2,
        "advantages": torch.full_like(x, sign), "correct": torch.full_like(x, 1 - curve), "group_ids": torch.arange(x.shape[0]),
    }  # fmt: skip
    return logp, method(logp, **needed(method, known), reduction=SUMMED).loss


# Eight tokens: of the teacher's probabilities, and the two tokens whose gradient is drawn.
TEACHER = torch.tensor([0.30, 0.25, 0.15, 0.10, 0.08, 0.06, 0.04, 0.02])
TOKENS = (0, 6)
K = 4
WITH_SAMPLED = ("lsm_sampled",)  # their support has the sampled token too
TWO_TEACHERS = ("multi_teacher_rkl",)  # the second, of weight 0.3, has the probabilities in reverse order


def students(x: Tensor, curve: int) -> tuple[Tensor, Tensor, rk.LMHead]:
    """Hidden states of students and of the teacher, and a head that is the identity, so that hidden = z.

    A student gives the drawn token the probability ``x`` and shares the rest alike.
    """
    v = len(TEACHER)
    q = ((1 - x) / (v - 1)).unsqueeze(-1).expand(*x.shape, v).clone()
    q[..., TOKENS[curve]] = x
    return q.log().requires_grad_(), TEACHER.log().expand(*x.shape, v).contiguous(), rk.LMHead(torch.eye(v))


def on_logits(method: Method, x: Tensor, curve: int, sampled: int | None = None) -> tuple[Tensor, Tensor]:
    """A loss in the sweep. The sampled token is the one drawn, or ``sampled``."""
    leaf, teacher_hidden, head = students(x, curve)
    places = (len(x), 2) if "spans" in method.needs else x.shape  # a span of two tokens alike
    hidden, teacher_hidden = (h.expand(*places, -1) for h in (leaf, teacher_hidden))
    target = torch.full(places, TOKENS[curve] if sampled is None else sampled)
    teacher = rk.linear_topk(teacher_hidden, head, K, target=target, entropy=True)
    if method.name in WITH_SAMPLED:
        teacher = rk.supports.with_sampled(teacher, target)
    old = rk.linear_logp(hidden.detach(), head, target, topk_ids=teacher.ids)
    known = {
        "old_logp": old.logp, "old_topk_logp": old.topk_logp, "ref_logp": old.logp - 0.2, "teacher_logp": teacher.target_logp,
        "teacher": teacher, "advantages": torch.ones(places), "target": target, "spans": torch.zeros_like(target),
    }  # fmt: skip
    given = {k: v for k, v in needed(method, known).items() if k != "target"}
    return leaf, rk.linear_loss(hidden, head, target, method.loss, **given, reduction=SUMMED).loss


def on_two_heads(method: Method, x: Tensor, curve: int) -> tuple[Tensor, Tensor]:
    """A divergence from one teacher, or from two."""
    hidden, teacher, head = students(x, curve)
    teachers, weights = ([teacher, teacher.flip(-1)], (0.7, 0.3)) if method.name in TWO_TEACHERS else ([teacher], None)
    heads = [head] * len(teachers)
    out = rk.linear_divergence_loss(hidden, head, teachers, heads, method.loss, teacher_weights=weights, reduction=SUMMED)
    return hidden, out.loss


def _of_token(gradient: Tensor, curve: int) -> Tensor:
    return gradient[..., TOKENS[curve]]


_Q = torch.linspace(0.01, 0.99, POINTS).unsqueeze(1)
_AXES = ("q of the token", "−∂loss/∂logit of the token")
_P = tuple(f"p = {TEACHER[i]:.2f}" for i in TOKENS)
_STUDENT = "the student gives the drawn token the probability q and shares the rest alike"
_WORLD = f"The teacher's probabilities are {', '.join(f'{x:.2f}' for x in TEACHER.tolist())}; {_STUDENT}."
_DOTS = "Dotted: q = p. A sampled token, where a method has one, is the token drawn, with Â = 1 and r = 1."

DRAWN = {
    "ratio": Drawn(
        on_ratio, torch.linspace(-1.2, 1.2, POINTS).unsqueeze(1), lambda gradient, curve: gradient, "log-ratio s − o", "−∂loss/∂s",
        ("Â = 1", "Â = −1"),
        "The weight of a sampled token's ∇log π, −∂loss/∂s, against its log-ratio to the old policy. Blue: Â = 1, red: Â = −1. "
        "The teacher's log-prob is 0.4 above the old policy's, the reference's and the base's 0.2 below, the sampler's 0.1 below; "
        "where a method has no advantages, blue has the teacher 0.4 above and red 0.4 below. Responses with Â = 1 are right, "
        "others wrong. Each token is a sequence and a group of its own.",
    ),
    "top-k": Drawn(
        on_logits, _Q, _of_token, *_AXES, _P,
        f"What a loss on a support does to one logit. {_WORLD} Blue: the token with {_P[0]}, in the teacher's top {K}; red: the "
        f"one with {_P[1]}, outside it. {_DOTS}",
    ),
    "divergence": Drawn(
        on_two_heads, _Q, _of_token, *_AXES, _P,
        f"What a divergence over the whole vocabulary does to one logit. {_WORLD} Blue: the token with {_P[0]}; red: the one with "
        f"{_P[1]}. {_DOTS}",
    ),
    "other": Drawn(
        partial(on_logits, sampled=TOKENS[0]), _Q, _of_token, *_AXES, ("target", "another token"),
        f"What the loss does to one logit of eight; {_STUDENT}. Blue: the target; red: another token. Weights, advantages: 1.",
    ),
}  # fmt: skip


def curves(method: Method) -> list[tuple[Tensor, Tensor]]:
    """The (x, y) of the method's two curves, from its own gradient.

    Raises:
        ValueError: for a method that cannot be drawn.
    """
    family, found = DRAWN[method.family], []
    for curve in range(2):
        leaf, loss = family.call(method, family.places, curve)
        (gradient,) = torch.autograd.grad(loss, leaf)
        found.append((family.places.flatten(), -family.of(gradient, curve).flatten()))
    if not all(y.isfinite().all() for _, y in found) or not any(y.any() for _, y in found):
        raise ValueError(f"make_methods: {method.name} has no finite gradient other than 0 to draw")
    return found


def members(family: str) -> list[Method]:
    """Its methods, file by file, in the order of each file."""
    return sorted((m for m in METHODS.values() if m.family == family), key=lambda m: type(m.loss).__module__)


def picture(family: str) -> Path:
    return PICTURES / f"{family}.png"


def small_png(figure: Any, names: Iterable[str]) -> bytes:
    """The figure in few colors; its text chunk ``Description`` has the names."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    raw, small, info = io.BytesIO(), io.BytesIO(), PngInfo()
    figure.savefig(raw, dpi=100)
    info.add_text("Description", " ".join(names))
    image = Image.open(raw).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(small, "png", optimize=True, pnginfo=info)
    return small.getvalue()


ACCESS = {
    "none": "no teacher",
    "text": "what it wrote",
    "sampled": "log-probs of\nsampled tokens",
    "top-k": "its top-K",
    "head": "hidden states\nand head",
}
SIGNALS = {"reward": "a reward", "both": "a reward\nand a teacher", "teacher": "a teacher"}
PRODUCT_COLORS = {0: "#7b3fb5", 3: "#1f6f8b", 4: "#c8553d"}


def draw_map() -> bytes:
    """A PNG of all methods: what they learn from, by what they need of a teacher; the color says how many products."""
    from matplotlib.figure import Figure

    cells: dict[tuple[str, str], list[Method]] = {}
    for method in METHODS.values():
        cells.setdefault((method.signal, method.access), []).append(method)
    # long cells in two columns of names
    height = {s: max((math.ceil(len(c) / 2) for (signal, _), c in cells.items() if signal == s), default=1) + 1 for s in SIGNALS}
    figure = Figure(figsize=(14, 0.19 * sum(height.values()) + 0.7), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(0, len(ACCESS)), ylim=(sum(height.values()), 0))
    ax.set_xticks([i + 0.5 for i in range(len(ACCESS))], list(ACCESS.values()), fontsize=9)
    ax.xaxis.tick_top()
    top, middles = 0, []
    for signal, lines in height.items():
        middles.append(top + lines / 2)
        for column, access in enumerate(ACCESS):
            for i, method in enumerate(cells.get((signal, access), ())):
                place = (column + 0.03 + 0.49 * (i % 2), top + i // 2 + 1)
                name = method.name + "*" * (method.granularity == "sequence")
                ax.text(*place, name, fontsize=7, va="center", color=PRODUCT_COLORS[method.products])
        top += lines
        ax.axhline(top, color="#bbbbbb", linewidth=0.6)
    ax.set_yticks(middles, list(SIGNALS.values()), fontsize=9)
    for column in range(1, len(ACCESS)):
        ax.axvline(column, color="#bbbbbb", linewidth=0.6)
    ax.tick_params(length=0)
    for products, color in PRODUCT_COLORS.items():
        ax.plot([], [], "s", color=color, label=f"{products} products")
    ax.legend(frameon=False, fontsize=8, ncols=len(PRODUCT_COLORS), loc="upper center", bbox_to_anchor=(0.5, 0))
    return small_png(figure, METHODS)


def draw(family: str) -> bytes:
    """A PNG with a panel a method."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6})
    drawn, methods = DRAWN[family], members(family)
    columns = min(5, len(methods))
    lines = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(1.9 * max(columns, 2), 1.55 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, method in zip(axes, methods, strict=False):
        ax.axhline(0, color="#999999", linewidth=0.6)
        for i, ((x, y), color, label) in enumerate(zip(curves(method), COLORS, drawn.curves, strict=True)):
            ax.plot(x, y, color=color, linewidth=1.3, label=label)
            if drawn.curves is _P:
                ax.axvline(TEACHER[TOKENS[i]].item(), color=color, linewidth=0.9, linestyle=":")
        ax.set_title(method.name, fontsize=8)
    for ax in axes[len(methods) :]:
        ax.axis("off")
    axes[0].legend(frameon=False, fontsize=6)
    figure.supxlabel(drawn.x, fontsize=8)
    figure.supylabel(drawn.y, fontsize=8)
    return small_png(figure, (m.name for m in methods))


def written(x: Any) -> str:
    """Options as one writes them after ``rk.losses.``: of a loss those that are not the default."""
    if not isinstance(x, rk.TokenLoss):
        return repr(x)
    usual = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(x)}
    changed = (f"{k}={written(getattr(x, k))}" for k, default in usual.items() if getattr(x, k) != default)
    return f"{type(x).__name__}({', '.join(changed)})"


TITLES = {
    "ratio": "Ratios and sampled tokens",
    "top-k": "On a teacher's top-K",
    "divergence": "Divergences over the whole vocabulary",
    "other": "The rest",
}


def _what(method: Method) -> dict[str, str]:
    """What is computed of what."""
    needs = ", ".join(f"`{x}`" for x in method.needs)
    loss, name = f"`{written(method.loss)}`", f"`{method.name}`"
    return {"method": name, "formula": method.formula, "loss": loss, "needs": needs, "products": str(method.products)}


def _source(method: Method) -> dict[str, str]:
    """Where it is from, and how it is there."""
    required = (f"`Reduction({k}=…)` is required: {v}." for k, v in method.required.items())
    cells = {"method": f"`{method.name}`", "source": method.paper, "conf.": method.confidence, "as published": method.published}
    return {**cells, "notes": " ".join([method.note, *required]).strip()}


def _table(rows: list[dict[str, str]]) -> str:
    columns, escaped = list(rows[0]), "\\|"
    lines = ([cell.replace("|", escaped) or "–" for cell in row.values()] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *lines])


def _section(family: str) -> str:
    methods = members(family)
    image = f"![{', '.join(m.name for m in methods)}]({picture(family).relative_to(DOCS)})\n\n{DRAWN[family].caption}"
    tables = (_table([cells(m) for m in methods]) for cells in (_what, _source))
    return "\n\n".join([f"\n## {TITLES[family]}", *tables, image]) + "\n"


def page() -> str:
    """The text of docs/methods.md: what stands above the mark, then a section a family."""
    above, _, _ = (DOCS / "methods.md").read_text().partition(MARK)
    return above + MARK + "".join(_section(family) for family in FAMILIES if members(family))


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    (DOCS / "methods.md").write_text(page())
    (PICTURES / "map.png").write_bytes(draw_map())
    for family in FAMILIES:
        if members(family):
            picture(family).write_bytes(draw(family))


if __name__ == "__main__":
    main()
