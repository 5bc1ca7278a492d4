"""The site: ``make site``. Its source folder is the repository's root, so that links mean the same on it as beside the code."""

from __future__ import annotations

import shutil
from pathlib import Path

from sphinx.application import Sphinx

from rlad_kernels import __version__

project, author, release = "rlad_kernels", "rlad_kernels", __version__
project_copyright = "rlad_kernels, Apache-2.0"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "sphinx_copybutton"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/**.md",
    "docs/**.rst",
    "bench/results/*.md",
]
exclude_patterns = [".*", "out", "build", "dist"]

html_theme = "furo"
html_title = f"rlad_kernels {__version__}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style, pygments_dark_style = "friendly", "github-dark"

myst_heading_anchors = 3
autodoc_mock_imports = ["verl"]  # which is installed without what it needs
napoleon_custom_sections = [("Tensors of a call", "params_style")]
maximum_signature_line_length = 100
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
python_use_unqualified_type_names = True

PARTS = {
    "Guides": [
        "methods", "trl", "transformers", "liger", "verl", "served_teachers", "long_context", "sparse", "scale", "wiring", "hub",
        "demo",
    ],
    "Reference": [
        "reference/calls", "reference/losses", "reference/methods", "reference/batch", "reference/integrations", "reference/tools",
        "benchmarks", "versions",
    ],
}  # fmt: skip
PROJECT = ["CONTRIBUTING", "CHANGELOG", "SECURITY"]
PLACED = {name for pages in PARTS.values() for name in pages}
PARTS["Guides"] += sorted(p.stem for p in Path(__file__).parent.glob("*.md") if p.stem not in PLACED)


def toctree(caption: str, documents: list[str]) -> str:
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *(f"/{x}" for x in documents), "```", ""])


def add_toctree(app: Sphinx, docname: str, source: list[str]) -> None:
    """The table of contents goes under the start page here, so that README shows none where it is read as a file."""
    if docname == root_doc:
        parts = {caption: [f"docs/{x}" for x in pages] for caption, pages in PARTS.items()} | {"Project": PROJECT}
        source[0] += "".join(toctree(caption, documents) for caption, documents in parts.items())
    elif docname.startswith("bench/results/"):
        source[0] = f"---\norphan: true\n---\n# {Path(docname).name}\n\n{source[0]}"


def keep_bars(app: Sphinx, what: str, name: str, x: object, options: object, lines: list[str]) -> None:
    """|s − o| is no substitution."""
    for i, line in enumerate(lines):
        if ">>>" not in line and "|" in line:
            words = line.split("``")
            lines[i] = "``".join(word if j % 2 else word.replace("|", "\\|") for j, word in enumerate(words))


def plain_defaults(
    app: Sphinx, what: str, name: str, x: object, options: object, signature: str | None, returns: str | None
) -> object:
    """A default that is made is an ellipsis: Sphinx lays out only what parses."""
    if name.endswith(".RLADConfig"):  # not the hundred fields of TRL's
        own = ", ".join(f"{k}={getattr(x, k, ...)!r}" for k in vars(x)["__annotations__"])
        return f"(output_dir=None, *, {own}, **of_grpo_config)", returns
    return (signature.replace("<factory>", "..."), returns) if signature else None


def add_index(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_toctree)
    app.connect("autodoc-process-docstring", keep_bars)
    app.connect("autodoc-process-signature", plain_defaults)
    app.connect("build-finished", add_index)
