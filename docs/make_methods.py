"""Write the tables of docs/methods.md and docs/img/methods/*.png from the registry: ``python docs/make_methods.py``.

A row a method, a panel a method. A panel is drawn by calling the method on a few tokens and asking autograd for its gradient;
a method whose arguments are not known here, or whose gradient is not finite, stops the run.
"""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.core.registry import FAMILIES, METHODS, Method

DOCS = Path(__file__).parent
PICTURES = DOCS / "img" / "methods"
MARK = "<!-- From here on written by docs/make_methods.py. -->\n"
COLORS = ("#1f6f8b", "#c8553d")
POINTS = 61
STUDENT = ("logp", "topk_logp", "tail_logp", "entropy")
GIVEN = {*STUDENT, "teacher_weights"}  # what a method is given whenever it takes it


class Drawn(NamedTuple):
    """How a family is drawn: the arguments of one curve, by name, from the places on its axis; and what axes and curves say."""

    inputs: Callable[[Method, Tensor, int], tuple[Tensor, dict[str, Any]]]  # also gives the leaf
    places: Tensor
    of: Callable[[Tensor, int], Tensor]  # (gradient of the leaf, which curve) → height of the curve, before the sign
    x: str
    y: str
    curves: tuple[str, ...]
    caption: str


def on_ratio(method: Method, x: Tensor, curve: int) -> tuple[Tensor, dict[str, Any]]:
    """Sampled tokens, each a sequence and a group of its own, whose log-ratio to the old policy is ``x``."""
    old, sign = torch.full_like(x, -2.0), 1 - 2 * curve
    logp = (old + x).requires_grad_()
    gap = 0.4 if "advantages" in method.needs else 0.4 * sign
    others = {"teacher_logp": old + gap, "ref_logp": old - 0.2, "base_logp": old - 0.2, "rollout_logp": old - 0.1}
    known = {"logp": logp, "old_logp": old, "advantages": torch.full_like(x, sign), **others}
    return logp, {**known, "correct": torch.full_like(x, 1 - curve), "group_ids": torch.arange(x.shape[0])}


# Eight tokens: of the teacher's probabilities, and the two tokens whose gradient is drawn.
TEACHER = torch.tensor([0.30, 0.25, 0.15, 0.10, 0.08, 0.06, 0.04, 0.02])
TOKENS = (0, 6)
K = 4
WITH_SAMPLED = ("lsm_sampled",)  # their support has the sampled token too
TWO_TEACHERS = ("multi_teacher_rkl",)  # the second, of weight 0.3, has the probabilities in reverse order


def on_logits(method: Method, x: Tensor, curve: int, sampled: int | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Students that give one token the probability ``x`` and share the rest alike; the head is the identity, so hidden = z.

    The sampled token is the one drawn, or ``sampled``.
    """
    token, v, shape = TOKENS[curve], len(TEACHER), x.shape
    q = ((1 - x) / (v - 1)).unsqueeze(-1).expand(*shape, v).clone()
    q[..., token] = x
    hidden = q.log().requires_grad_()
    teacher_hidden = TEACHER.log().expand(*shape, v).contiguous()
    head, target = rk.LMHead(torch.eye(v)), torch.full(shape, token if sampled is None else sampled)
    teacher = rk.linear_topk(teacher_hidden, head, K, target=target, entropy=True)
    if method.name in WITH_SAMPLED:
        again = (teacher.ids == target.unsqueeze(-1)).any(-1)
        more = torch.where(again, -1, target).int(), teacher.target_logp
        ids, logp = (torch.cat((x, y.unsqueeze(-1)), -1) for x, y in zip((teacher.ids, teacher.logp), more, strict=True))
        teacher = teacher._replace(ids=ids, logp=logp)
    s = rk.linear_logp(hidden, head, target, topk_ids=teacher.ids, entropy=True, tail=True)
    given = {"weights": torch.ones_like(x), "advantages": torch.ones_like(x), "old_logp": s.logp.detach()}
    given |= {"old_topk_logp": s.topk_logp.detach(), "teacher_logp": teacher.target_logp, "ref_logp": s.logp.detach() - 0.2}
    student = {"hidden": hidden, "head": head, "target": target, **{k: getattr(s, k) for k in STUDENT}}
    full = {"teacher_hidden": teacher_hidden, "teacher_head": head, "teacher_weights": None}
    if method.name in TWO_TEACHERS:
        both = [teacher_hidden, teacher_hidden.flip(-1)]
        full = {"teacher_hidden": both, "teacher_head": [head, head], "teacher_weights": (0.7, 0.3)}
    return hidden, {**student, **given, "teacher": teacher, **full}


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
        on_logits, _Q, _of_token, *_AXES, _P,
        f"What a divergence over the whole vocabulary does to one logit. {_WORLD} Blue: the token with {_P[0]}; red: the one with "
        f"{_P[1]}. {_DOTS}",
    ),
    "other": Drawn(
        partial(on_logits, sampled=TOKENS[0]), _Q, _of_token, *_AXES, ("target", "another token"),
        f"What the loss does to one logit of eight; {_STUDENT}. Blue: the target; red: another token. Weights, advantages: 1.",
    ),
}  # fmt: skip


def arguments(method: Method, known: dict[str, Any]) -> dict[str, Any]:
    """What the method must be given, by name: its required parameters, its needs, and ``GIVEN``. The last divisor is 1.

    Raises:
        ValueError: naming what is not known here.
    """
    parameters = inspect.signature(method.call).parameters
    required = {k for k, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    wanted = (required | set(method.needs) | parameters.keys() & GIVEN) - set(method.options)
    if missing := sorted(wanted - set(known)):
        raise ValueError(f"make_methods: {method.name} wants {missing}; add them to the inputs of {method.family!r}")
    if "denominator" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(f"make_methods: {method.name} takes no denominator, so the height of its curves is not known")
    return {k: known[k] for k in wanted} | {"denominator": 1.0}


def curves(method: Method) -> list[tuple[Tensor, Tensor]]:
    """The (x, y) of the method's two curves, from its own gradient.

    Raises:
        ValueError: for a method that cannot be drawn.
    """
    family, found = DRAWN[method.family], []
    for curve in range(2):
        leaf, known = family.inputs(method, family.places, curve)
        (gradient,) = torch.autograd.grad(method(**arguments(method, known)).loss, leaf)
        found.append((family.places.flatten(), -family.of(gradient, curve).flatten()))
    if not all(y.isfinite().all() for _, y in found) or not any(y.any() for _, y in found):
        raise ValueError(f"make_methods: {method.name} has no finite gradient other than 0 to draw")
    return found


def members(family: str) -> list[Method]:
    return [m for m in METHODS.values() if m.family == family]


def picture(family: str) -> Path:
    return PICTURES / f"{family}.png"


def draw(family: str) -> bytes:
    """A PNG with a panel a method; its text chunk ``Description`` names them."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

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
            if drawn.inputs is on_logits:
                ax.axvline(TEACHER[TOKENS[i]].item(), color=color, linewidth=0.9, linestyle=":")
        ax.set_title(method.name, fontsize=8)
    for ax in axes[len(methods) :]:
        ax.axis("off")
    axes[0].legend(frameon=False, fontsize=6)
    figure.supxlabel(drawn.x, fontsize=8)
    figure.supylabel(drawn.y, fontsize=8)
    raw, small, info = io.BytesIO(), io.BytesIO(), PngInfo()
    figure.savefig(raw, dpi=100)
    info.add_text("Description", " ".join(m.name for m in methods))
    image = Image.open(raw).convert("RGB").quantize(40, dither=Image.Dither.NONE)
    image.save(small, "png", optimize=True, pnginfo=info)
    return small.getvalue()


def _row(method: Method) -> str:
    options = ", ".join(f"{k}={v!r}" for k, v in method.options.items())
    call = f"`{method.call.__name__}({options})`" if options else f"`{method.call.__name__}`"
    needs = ", ".join(f"`{x}`" for x in method.needs)
    notes = " ".join([method.note, *(f"`{k}` has no default: {v}." for k, v in method.required.items())]).strip()
    cells = (f"`{method.name}`", method.formula, call, needs, method.paper, method.confidence, str(method.products), notes)
    escaped = "\\|"
    return f"| {' | '.join(x.replace('|', escaped) or '–' for x in cells)} |"


TITLES = {
    "ratio": "Ratios and sampled tokens",
    "top-k": "On a teacher's top-K",
    "divergence": "Divergences over the whole vocabulary",
    "other": "The rest",
}
COLUMNS = ("method", "formula", "call", "also needs", "paper", "conf.", "products", "notes")


def _section(family: str) -> str:
    methods = members(family)
    head = [f"\n## {TITLES[family]}\n", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    image = f"\n![{', '.join(m.name for m in methods)}]({picture(family).relative_to(DOCS)})\n\n{DRAWN[family].caption}\n"
    return "\n".join([*head, *map(_row, methods), image])


def page() -> str:
    """The text of docs/methods.md: what stands above the mark, then a section a family."""
    above, _, _ = (DOCS / "methods.md").read_text().partition(MARK)
    return above + MARK + "".join(_section(family) for family in FAMILIES if members(family))


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    (DOCS / "methods.md").write_text(page())
    for family in FAMILIES:
        if members(family):
            picture(family).write_bytes(draw(family))


if __name__ == "__main__":
    main()
