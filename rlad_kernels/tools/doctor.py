"""The doctor: says what is here, what is missing and the command that fixes it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from rlad_kernels.backends import contract as ops
from rlad_kernels.core.head import LMHead
from rlad_kernels.linear.logp import linear_logp

PACKAGES = ("torch", "triton", "transformers", "numpy")
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return [flag for flag in ISA_FLAGS if flag in words]


def _cpu_backend() -> tuple[str, str | None]:
    if ops.INTERPRET:
        return "Triton interpreter (TRITON_INTERPRET=1): right but slow", None
    if not ops.has_cpp():
        return "missing", "pip install --no-build-isolation -e .   (needs g++; RLAD_SKIP_CPP must not be 1)"
    probe = torch.zeros(1, 2)
    head = LMHead(torch.zeros(3, 2))
    worked = linear_logp(probe, head, torch.zeros(1, dtype=torch.int64)).logp.isfinite().all()
    products = "bfloat16 products native" if ops.has_bf16_mm() else "bfloat16 products widened to float32"
    return f"C++, instruction set {torch.ops.rlad.cpu_isa()}, {products}, {'works' if worked else 'BROKEN'}", None


def _cuda_backend() -> tuple[str, str | None]:
    if not torch.cuda.is_available():
        return "no CUDA device visible to torch", None
    name = torch.cuda.get_device_name()
    if _version("triton") is None:
        return f"{name}, but Triton is missing", "pip install 'triton>=3.6'"
    return f"Triton on {name}, sm_{''.join(map(str, torch.cuda.get_device_capability()))}", None


def main() -> int:
    """Print the report; the exit status is 1 if something needs fixing.

    Example:
        >>> from rlad_kernels.tools import doctor
        >>> doctor.main() in (0, 1)  # doctest: +ELLIPSIS
        rlad_kernels ...
        True
    """
    print(f"rlad_kernels {_version('rlad_kernels') or 'from source'} on Python {platform.python_version()}, {platform.machine()}")
    for package in PACKAGES:
        print(f"  {package:<13} {_version(package) or 'not installed'}")
    forced = os.environ.get("RLAD_CPU_ISA")
    print(
        f"  CPU           {', '.join(_cpu_flags()) or 'no vector flags found'}; {torch.get_num_threads()} threads"
        + (f"; RLAD_CPU_ISA={forced}" if forced else "")
    )
    fixes = []
    for label, (state, fix) in (("CPU tensors", _cpu_backend()), ("CUDA tensors", _cuda_backend())):
        print(f"  {label:<13} {state}")
        fixes += [fix] if fix else []
    major, minor = (int(x) for x in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 11):
        fixes.append("pip install 'torch>=2.11'")
    for fix in fixes:
        print(f"  fix: {fix}")
    return 1 if fixes else 0
