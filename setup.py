"""Builds ``rlad_kernels._C``, the CPU backend. All other metadata is in pyproject.toml.

``RLAD_SKIP_CPP=1`` installs without it; CPU calls then raise. ``RLAD_SANITIZE=1`` builds it with AddressSanitizer and
UndefinedBehaviorSanitizer, for `make sanitize`.
"""

import os
import shlex
import shutil
from pathlib import Path

from setuptools import setup

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if os.environ.get("RLAD_SANITIZE") == "1" else []
SKIP = os.environ.get("RLAD_SKIP_CPP") == "1"
ROOT = Path(__file__).parent
WITHOUT = "or set RLAD_SKIP_CPP=1 to install without the CPU backend"


def extension() -> dict:
    """The ``setup`` arguments that build the extension, against the LibTorch stable ABI and the limited Python API."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
    except ImportError as error:
        raise SystemExit(
            f"rlad_kernels: building the CPU backend needs torch ({error}); install torch, then run "
            f"`pip install --no-build-isolation .`, {WITHOUT}"
        ) from error

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            compiler = shlex.split(get_cxx_compiler())[0]
            if shutil.which(compiler) is None:
                raise SystemExit(
                    f"rlad_kernels: no C++ compiler: '{compiler}' is not on PATH; install g++ (or name one in CXX), {WITHOUT}"
                )
            super().build_extensions()

    return {
        "ext_modules": [
            CppExtension(
                "rlad_kernels._C",
                sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")),
                depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
                extra_compile_args=[
                    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # one file for torch 2.11 and later
                    *(["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZE] if SANITIZE else ["-O3", "-g0"]),
                    "-fvisibility=hidden",
                    "-fno-math-errno",  # with the next: lets selects become vector blends; inf and NaN stay exact
                    "-fno-trapping-math",
                ],
                extra_link_args=SANITIZE,
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**({} if SKIP else extension()))
