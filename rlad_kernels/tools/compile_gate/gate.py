"""Compile every kernel ahead of time, without a GPU, and hold the machine code to its limits.

Run it as `python -m rlad_kernels.tools.compile_gate [--arch 80 90 100] [--kernel NAME ...] [--jobs 2]`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlad_kernels.backends.triton import KERNELS
from rlad_kernels.backends.triton._kernel import Case, Kernel
from rlad_kernels.backends.triton._launch import Launch, options

ARCHS = (80, 90, 100)
# bytes a block may have (CUDA programming guide, "maximum amount of shared memory per thread block")
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

ROUNDED = r"mul\.rn\.f32"  # a product that no later addition may be contracted with; Triton's own carry no rounding mode

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*u1",
}  # fmt: skip


CASES = {name: tuple(kernel.cases()) for name, kernel in KERNELS.items()}


@dataclass(frozen=True)
class Report:
    """What one compilation came to; `faults` is empty when it passes."""

    kernel: str
    case: str
    arch: int
    registers: int
    shared: int
    faults: tuple[str, ...]


def specialize(launch: Launch) -> tuple[dict[str, str], dict[str, object], dict[tuple[int], list]]:
    """Signature, constexprs and divisibility attributes, by the rules Triton applies to the arguments of a launch."""
    named = dict(zip([p.name for p in launch.kernel.params], launch.args, strict=False)) | launch.flags | dict(launch.config.blocks)
    signature, constants, attrs = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value = named[param.name]
        kind = "constexpr"
        aligned = False
        if param.is_constexpr or value is None:
            pass
        elif isinstance(value, torch.Tensor):
            kind = TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0  # allocations are aligned to 256 bytes
        elif isinstance(value, bool):
            kind = "u1"
        elif isinstance(value, int) and (value != 1 or param.do_not_specialize):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not param.do_not_specialize
        elif isinstance(value, float):
            kind = "fp32"
        signature[param.name] = kind
        if kind == "constexpr":
            constants[param.name] = value
        if aligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attrs


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of the one kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))


def required(spec: Kernel, case: Case) -> tuple[str, ...]:
    """What the PTX of a case must contain."""
    return (spec.wide if case.wide else ()) + ((ROUNDED,) if spec.tempers else ())


def inspect(launch: Launch, arch: int, max_registers: int, wide: tuple[str, ...] = ()) -> tuple[int, int, tuple[str, ...]]:
    """Compile one launch for one architecture: (registers, bytes of shared memory, faults)."""
    signature, constants, attrs = specialize(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options(launch.config))
    except Exception as error:  # a fault like any other: the table names every case that does not compile
        reasons = [str(error)]
        while error := error.__cause__:
            reasons.append(str(error))
        return 0, 0, ("does not compile: " + "\n".join(reasons),)
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, stack = resource_usage(compiled.asm["cubin"])
    rules = {
        f"{stack} bytes of stack": stack > 0,
        f"{registers} registers, ceiling {max_registers}": registers > max_registers,
        f"{shared} bytes of shared memory, the chip has {MAX_SHARED[arch]}": shared > MAX_SHARED[arch],
        "tf32 in the PTX": "tf32" in ptx,
        "local memory in the PTX": ".local" in ptx,
        **{f"no {pattern} in the PTX": not re.search(pattern, ptx) for pattern in wide},
    }
    return registers, shared, tuple(fault for fault, found in rules.items() if found)


def check(kernel: str, index: int, arch: int) -> Report:
    """Compile one case of a kernel for one architecture."""
    spec, case = KERNELS[kernel], CASES[kernel][index]
    return Report(kernel, case.label, arch, *inspect(case.launch(), arch, spec.max_registers, required(spec, case)))


def run(archs: tuple[int, ...] = ARCHS, kernels: list[str] | None = None, jobs: int = 2) -> list[Report]:
    """Every case of every kernel for every architecture."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("compile_gate: TRITON_INTERPRET=1 replaces the compiler; unset it")
    work = [(k, i, arch) for k in kernels or KERNELS for i in range(len(CASES[k])) for arch in archs]
    reports = []
    with ProcessPoolExecutor(jobs) as pool:
        for report in pool.map(check, *zip(*work, strict=True), chunksize=4):
            reports.append(report)
            if sys.stderr.isatty():
                print(f"\r{len(reports)} of {len(work)} cases", end="\n" * (len(reports) == len(work)), file=sys.stderr, flush=True)
    return reports


def table(reports: list[Report]) -> str:
    """Largest register and shared-memory use per kernel and architecture, then every fault."""
    groups = defaultdict(list)
    for report in reports:
        groups[report.kernel, report.arch].append(report)
    lines = [f"{'kernel':24} {'sm':>4} {'cases':>6} {'registers':>10} {'shared':>7}"]
    for (kernel, arch), group in sorted(groups.items()):
        registers, shared = max(r.registers for r in group), max(r.shared for r in group)
        lines.append(f"{kernel:24} {arch:>4} {len(group):>6} {registers:>10} {shared:>7}")
    lines += [f"FAULT {r.kernel} sm_{r.arch} [{r.case}]: {'; '.join(r.faults)}" for r in reports if r.faults]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--kernel", nargs="+", default=None, choices=sorted(KERNELS))
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    reports = run(tuple(args.arch), args.kernel, args.jobs)
    print(table(reports))
    return int(any(r.faults for r in reports))
