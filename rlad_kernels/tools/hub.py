"""Write the library as a repository of Hugging Face's Kernel Hub: ``python -m rlad_kernels.tools.hub OUT``.

What a GPU needs, in Python and Triton: every room but ``integrations`` and ``tools``. ``kernels`` loads it from any path, and
several versions into one process, so each import is relative and the ops' namespace has a digest of the sources in its name.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
NAME = "rlad_kernels"
ROOMS = ("core", "backends", "engine", "losses", "linear", "batch")
BACKENDS = ("cuda", "universal", "cpu")  # kernels prefers the variant of its backend; universal is what kernels < 0.11.2 knows

OPS = '''"""The ops of this build, whose namespace no other build has."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """The op's full name."""
    return f"{namespace}::{{op_name}}"
'''

COMPATIBLE = '''"""The same package for versions of kernels that look for it in a folder of its name."""

import importlib.util
import sys
from pathlib import Path

if "{namespace}" not in sys.modules:
    spec = importlib.util.spec_from_file_location("{namespace}", Path(__file__).parent.parent / "__init__.py")
    sys.modules["{namespace}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["{namespace}"])
globals().update({{k: v for k, v in vars(sys.modules["{namespace}"]).items() if not k.startswith("__") or k == "__all__"}})
'''

README = """---
library_name: kernels
license: apache-2.0
tags: [kernels]
---

# rlad-kernels {version}

What RL and distillation losses need from an LM head, in one sweep over the vocabulary, without logits.

```python
from kernels import get_kernel

rk = get_kernel("OWNER/rlad-kernels", version={major}, trust_remote_code=True)
scores = rk.linear_logp(hidden, rk.LMHead(weight), target)  # on CUDA
```
"""


def sources() -> dict[Path, str]:
    """The files of the rooms and the front door, by their path in the package."""
    rooms = (path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py")))
    return {path.relative_to(PACKAGE): path.read_text() for path in (PACKAGE / "__init__.py", *rooms)}


def relative(path: Path, text: str) -> str:
    """The file with this package's modules named from where it stands.

    Raises:
        ValueError: for an import that stays absolute.
    """
    dots = "." * len(path.parts)
    text = re.sub(rf"^( *)from {NAME}(?:\.([\w.]+))? import ", rf"\1from {dots}\2 import ", text, flags=re.MULTILINE)
    text = re.sub(rf'\bimport_module\("{NAME}\.([\w.]+)"\)', rf'import_module("{dots}\1", __package__)', text)
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names = [x.value for x in node.args if isinstance(x, ast.Constant) and isinstance(x.value, str)]
        if any(n.split(".")[0] == NAME for n in names):
            raise ValueError(f"hub: {path}:{getattr(node, 'lineno', 0)} imports {NAME} by its absolute name: {names}")
    return text


def renamed(text: str, namespace: str) -> str:
    """The file with its ops in ``namespace``."""
    return re.sub(r"\brlad::", f"{namespace}::", re.sub(r"\btorch\.ops\.rlad\b", f"torch.ops.{namespace}", text))


def write(out: Path, backend: str = "cuda", version: int = 1) -> Path:
    """Write ``out/build/torch-<backend>`` and ``out/README.md``, and give the former.

    Args:
        out: the repository; what an earlier call wrote for this backend is replaced.
        backend: ``cuda``; ``universal``, which every backend takes; or ``cpu``, where it runs under ``TRITON_INTERPRET=1`` alone.
        version: the major version that the Hub gives out.

    Raises:
        ValueError: for another backend, a version below 1, or a source whose imports cannot be made relative.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from pathlib import Path
        >>> from rlad_kernels.tools import hub
        >>> with TemporaryDirectory() as out:
        ...     variant = hub.write(Path(out))
        ...     variant.name, (variant / "_ops.py").exists()
        ('torch-cuda', True)
    """
    if backend not in BACKENDS:
        raise ValueError(f"hub: backend must be one of {BACKENDS}, got {backend!r}")
    if version < 1:
        raise ValueError(f"hub: version must be at least 1, got {version}")
    files = {path: relative(path, text) for path, text in sources().items()}
    digest = hashlib.sha256("\0".join(f"{path.as_posix()}\0{text}" for path, text in files.items()).encode())
    namespace = f"_{NAME}_{backend}_{digest.hexdigest()[:7]}"
    files = {path: renamed(text, namespace) for path, text in files.items()}
    files[Path("_ops.py")] = OPS.format(namespace=namespace)
    files[Path(NAME, "__init__.py")] = COMPATIBLE.format(namespace=namespace)
    metadata = {
        "name": "rlad-kernels", "id": namespace, "version": version, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": "cuda" if backend == "universal" else backend},
    }  # fmt: skip
    files[Path("metadata.json")] = json.dumps(metadata, indent=2) + "\n"
    variant = out / "build" / f"torch-{backend}"
    shutil.rmtree(variant, ignore_errors=True)
    for path, text in files.items():
        (variant / path).parent.mkdir(parents=True, exist_ok=True)
        (variant / path).write_text(text)
    released = files[Path("__init__.py")].split('__version__ = "')[1].split('"')[0]
    (out / "README.md").write_text(README.format(version=released, major=version))
    return variant


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlad_kernels.tools.hub", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder that becomes the Hub repository")
    parser.add_argument("--backend", choices=BACKENDS, default="cuda")
    parser.add_argument("--version", type=int, default=1, help="the major version on the Hub")
    args = parser.parse_args(argv)
    print(write(args.out, args.backend, args.version))


if __name__ == "__main__":
    main(sys.argv[1:])
