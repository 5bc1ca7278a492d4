"""Write docs/reference/*.rst from the public names, docs/versions.md from pins and CI, docs/benchmarks.md from bench/results.

``python docs/make_reference.py``.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import rlad_kernels as rk
from rlad_kernels.core.divergence import Divergence
from rlad_kernels.tools.compile_gate.gate import ARCHS

DOCS = Path(__file__).parent
ROOT = DOCS.parent


def table(rows: list[list[str]]) -> str:
    escaped = "\\|"
    lines = [[cell.replace("|", escaped) or "–" for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [lines[0], ["---"] * len(rows[0]), *lines[1:]])


# Which pin is of what, in the order of the table; a pin that is not here is a tool of this repository.
SHOWN = (
    "torch", "triton", "numpy", "transformers", "trl", "peft", "accelerate", "datasets", "liger-kernel", "verl", "openrlhf",
)  # fmt: skip


def pins() -> dict[str, list[str]]:
    """Name → versions, of every requirements file."""
    found: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("requirements*.txt")):
        for name, version in re.findall(r"(?m)^([a-z][\w-]*)(?:\[\w+\])?==([\d.]+\d)", path.read_text()):
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return found


def ci() -> list[list[str]]:
    """CI's steps that are make targets, with what the Makefile says of them and the environment that they set."""
    makefile = (ROOT / "Makefile").read_text()
    steps = re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    rows = []
    for step in steps:
        rule = re.search(rf"^{step}:(?P<needs>[^#\n]*)(?:##(?P<what>.*))?\n(?P<recipe>(?:\t.*\n)*)", makefile, re.MULTILINE)
        if rule is None:
            raise ValueError(f"make_reference: .ci/run has `make {step}`, the Makefile has no such target")
        what = (rule["what"] or "").strip()
        env = [x for x in shlex.split(rule["recipe"].split("\n")[0]) if re.fullmatch(r"[A-Z_]+=[\w.]+", x)]
        rows.append([f"`make {step}`", what, ", ".join(f"`{x}`" for x in env)])
    return rows


def versions_page() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, extras = pins(), project["optional-dependencies"]
    wanted = {re.split(r"[<>=!]", x)[0]: x for x in (*project["dependencies"], *(x for extra in extras.values() for x in extra))}
    rows = [["package", "version that the suite runs", "what installing asks for"]]
    rows += [[k, ", ".join(found[k]), f"`{wanted[k]}`" if k in wanted else ""] for k in SHOWN if k in found]
    archs = ", ".join(f"sm_{x}" for x in ARCHS)
    return f"""# Versions

<!-- Written by docs/make_reference.py. -->

## What is tested

Python {project["requires-python"].replace(">=", "from ")}. The packages that every test run of this repository has, from its pins:

{table(rows)}

The Triton kernels are compiled ahead of time for {archs}.

## What a run does

CI runs these steps, on a machine without a GPU, from a fresh clone:

{table([["step", "what", "environment"], *ci()])}
"""


# The names of each room that people import from, and what its page says first.
INTEGRATIONS = {
    "trl": ("use_rlad_kernels", "RLADTrainer", "RLADConfig", "ChunkedLogProbFunction", "ChunkedDivergenceFunction"),
    "transformers": ("use_rlad_loss", "causal_lm_loss"),
    "liger": ("LigerFusedLinearGRPOLoss", "LigerFusedLinearJSDLoss", "chunk_topk_distill_function"),
    "served": ("from_logprobs",),
    "verl": ("rlad_grpo", "rlad_trrd", "FusedLinearForPPO"),
}
TOOLS = {
    "doctor": ("main",),
    "plan": ("model_of", "loss_bytes", "Plan"),
    "hub": ("write",),
}
# Whose example is a block of a guide, which the tests run there: a trainer wants a model, verl a cluster.
SHOWN_ON = {
    "integrations.trl.use_rlad_kernels": "trl",
    "integrations.trl.RLADTrainer": "trl",
    "integrations.trl.RLADConfig": "trl",
    "integrations.verl.rlad_grpo": "verl",
    "integrations.verl.rlad_trrd": "verl",
    "integrations.verl.FusedLinearForPPO": "verl",
}
SWITCHES = tuple(k for k in rk.__all__ if k.startswith("set_"))
LINEAR = (
    "linear_logp", "linear_topk", "linear_gather", "linear_support", "linear_loss", "linear_divergence_loss", "linear_divergence",
)  # fmt: skip
TYPES = tuple(k for k in rk.__all__ if inspect.isclass(getattr(rk, k)))
BATCH = ("context", "masks", "spans", "supports")
LOSSES = {
    "Sampled tokens": "losses.ratio",
    "A support of K tokens": "losses.support",
    "Divergences over the vocabulary": "losses.vocab",
    "Cross-entropy, RLAD": "losses",
    "What they share": "",
}


def functions(room: str) -> tuple[str, ...]:
    """The functions that a room of ``batch`` defines."""
    module = getattr(rk, room)
    return tuple(k for k, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == module.__name__ and k[0] != "_")


def part_of_losses(name: str) -> str:
    """The title under which a name of ``rk.losses`` stands."""
    x = getattr(rk.losses, name)
    room = getattr(x, "__module__", "").removeprefix("rlad_kernels.").rpartition(".")[0]
    shared = name in SHARED or not (inspect.isclass(x) and issubclass(x, rk.TokenLoss | Divergence))
    return "What they share" if shared else next(title for title, folder in LOSSES.items() if folder == room)


SHARED = ("Divergence", "SampledLoss", "ClippedLoss")


def pages() -> dict[str, dict[str, tuple[str, ...]]]:
    """The entries of the reference: page → heading → full names."""
    losses: dict[str, tuple[str, ...]] = dict.fromkeys(LOSSES, ())
    for name in sorted(rk.losses.__all__):
        losses[part_of_losses(name)] += (f"losses.{name}",)
    calls = {
        "From hidden states": LINEAR,
        "What they take and give": TYPES,
        "Switches": SWITCHES,
        "Methods": ("METHODS", "losses.methods.Method"),
    }
    return {
        "calls": calls,
        "losses": losses,
        "batch": {room.capitalize(): tuple(f"{room}.{k}" for k in functions(room)) for room in BATCH},
        "integrations": {room: tuple(f"integrations.{room}.{k}" for k in names) for room, names in INTEGRATIONS.items()},
        "tools": {room: tuple(f"tools.{room}.{k}" for k in names) for room, names in TOOLS.items()},
    }


INTRODUCTIONS = {
    "calls": (
        "Calls from hidden states",
        "Everything here is in ``rlad_kernels`` itself; the examples say ``import rlad_kernels as rk``.",
    ),
    "losses": (
        "Losses",
        "Classes of ``rk.losses``: an object is a method with its options, checked when it is made, frozen and hashable. "
        ":doc:`methods` has a call of each published method.",
    ),
    "batch": ("Masks, spans, supports", "What is made of a batch before a loss: ``rk.masks``, ``rk.spans``, ``rk.supports``."),
    "integrations": ("Integrations", "Each module of ``rlad_kernels.integrations`` alone imports its framework."),
    "tools": ("Tools", "``python -m rlad_kernels`` has the doctor, the planner and the methods; these are their functions."),
}


def resolved(name: str) -> object:
    """What a full name below ``rlad_kernels`` names."""
    x: object = rk
    for part in name.split("."):
        x = getattr(x, part) if hasattr(x, part) else import_module(f"{x.__name__}.{part}")  # type: ignore[attr-defined]
    return x


def entry(name: str) -> str:
    module, _, own = name.rpartition(".")
    if name == "METHODS":
        about = "The published methods by name, :doc:`each with a call <methods>`."
        return f".. py:data:: rlad_kernels.METHODS\n   :type: dict[str, Method]\n\n   {about}\n"
    if module.startswith("integrations."):  # whose import takes seconds, or a framework
        kind = "autoclass" if own[0].isupper() else "autofunction"
    else:
        x = resolved(name)
        kind = "autoclass" if inspect.isclass(x) else "autofunction" if inspect.isroutine(x) else "autodata"
    options = {"LMHead": "   :members:\n", "TokenLoss": "   :members:\n", "METHODS": "   :no-value:\n"}
    separator = "::" if module in BATCH else "."  # a room of batch is an attribute here, no module
    return f".. {kind}:: rlad_kernels{separator}{name}\n{options.get(name, '')}{shown(name)}"


def guide_block(name: str) -> tuple[str, str]:
    """Language and text of the guide's block that shows the name, or of its first one."""
    text = (DOCS / f"{SHOWN_ON[name]}.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return next((b for b in blocks if name.rpartition(".")[2] in b[1]), blocks[0])


def shown(name: str) -> str:
    """The example of an entry that has it in a guide."""
    if name not in SHOWN_ON:
        return ""
    language, code = guide_block(name)
    indented = "".join(f"      {line}\n" if line else "\n" for line in code.rstrip().split("\n"))
    return f"\n   Of :doc:`/docs/{SHOWN_ON[name]}`:\n\n   .. code-block:: {language}\n\n{indented}"


def api_page(page: str) -> str:
    title, words = INTRODUCTIONS[page]
    parts = [
        f"{title}\n{'=' * len(title)}\n\n.. Written by docs/make_reference.py.\n\n{words}\n\n.. currentmodule:: rlad_kernels\n"
    ]
    for heading, names in pages()[page].items():
        parts.append(f"{heading}\n{'-' * len(heading)}\n")
        parts += [entry(name) for name in names]
    return "\n".join(parts)


def benchmarks_page() -> str:
    """The newest run of `make bench`: its pictures, and where its figures are."""
    results = ROOT / "bench" / "results"
    run = max(results.glob("quick-cpu-*.md")).stem
    said = json.loads((results / f"{run}.json").read_text())
    about = (results / f"{run}.md").read_text().split("\n")[0]
    pictures = (
        ("memory", "Peak memory beyond inputs and gradients; at the end, how it grows with tokens and with the vocabulary."),
        ("time", "Time of forward and backward in units of the bare matrix products of the same rounds."),
        ("error", "Error of loss and gradients against float64."),
    )
    shown = "\n\n".join(f"## {k.capitalize()}\n\n{what}\n\n![{k}](../bench/results/{run}-{k}.png)" for k, what in pictures)
    others = [p.name for p in sorted(results.glob("*.json")) if p.stem != run]
    rest = "\n".join(f"- [{name}](../bench/results/{name})" for name in others)
    return f"""# Benchmarks

<!-- Written by docs/make_reference.py. -->

The run of `make bench` that README quotes: {about}

Every case with ranges, errors and counted work: [tables](../bench/results/{run}.md); [JSON](../bench/results/{run}.json),
{len(said["cases"])} cases. In each picture grey is others', `lce` is PyTorch's `F.linear_cross_entropy`, `fused` is `linear_loss`,
`kept` is `linear_logp` with `keep`, `half` has half of the sequences without advantage. How it is measured, and how to measure on
your machine: [CONTRIBUTING.md](../CONTRIBUTING.md#measure).

{shown}

## Other runs

{rest}

Memory of a whole training step against its length: [Long contexts](long_context.md). Steps of TRL's trainers before and after:
[TRL](trl.md).
"""


def main() -> None:
    for page in pages():
        (DOCS / "reference" / f"{page}.rst").write_text(api_page(page))
    (DOCS / "versions.md").write_text(versions_page())
    (DOCS / "benchmarks.md").write_text(benchmarks_page())


if __name__ == "__main__":
    main()
