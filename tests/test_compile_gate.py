"""The compile gate: nothing of the Triton backend escapes it, it catches what it is for, and everything passes it."""

import ast
from pathlib import Path

import pytest
import torch

from tests.conftest import DEVICE, INTERPRET

triton = pytest.importorskip("triton")
tl = triton.language
if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)
if DEVICE != "cpu":
    pytest.skip("compiles on the CPU, for minutes: `make gate` is that run", allow_module_level=True)

from rlad_kernels.backends import triton as kernels  # noqa: E402
from rlad_kernels.backends.contract import ROW_OPS, TOKEN_OPS  # noqa: E402
from rlad_kernels.backends.triton._kernel import KERNELS, WIDE_LOAD  # noqa: E402
from rlad_kernels.backends.triton._launch import Config, Launch  # noqa: E402
from rlad_kernels.backends.triton._math import product  # noqa: E402
from rlad_kernels.backends.triton.clipped_ratio import ESTIMATORS  # noqa: E402
from rlad_kernels.backends.triton.divergence import FAMILIES  # noqa: E402
from rlad_kernels.backends.triton.topk_kl import NORMALIZATIONS  # noqa: E402
from rlad_kernels.tools.compile_gate import gate as compile_gate  # noqa: E402
from rlad_kernels.tools.compile_gate.gate import CASES  # noqa: E402

HALVES = {torch.float32, torch.bfloat16, torch.float16}
FLOAT32_OUT = {"gather_dot_kernel", "column_stats_kernel", "dropped_mass_kernel"}
# the constants that are not booleans
CHOICES = {"ESTIMATOR": {"none", *ESTIMATORS}, "NORMALIZE": set(NORMALIZATIONS), "FAMILY": set(FAMILIES)}


def jitted_kernels() -> set[str]:
    """Names of the functions *_kernel under @triton.jit in the package's sources."""
    found = set()
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                found |= {node.name} if node.name.endswith("_kernel") else set()
    return found


def test_every_kernel_is_known_and_compiled():
    assert jitted_kernels() == set(KERNELS) == {name for name, cases in CASES.items() if cases}
    assert set(kernels.LAUNCHERS) == {*ROW_OPS, *TOKEN_OPS}


@pytest.mark.parametrize("name", KERNELS)
def test_cases_reach_every_config_row_dtype_flag_and_optional_argument(name):
    launches = [case.launch() for case in CASES[name]]
    assert {launch.kernel for launch in launches} == {KERNELS[name].fn}
    assert {launch.config for launch in launches} == set(KERNELS[name].table)
    parameters = [p.name for p in KERNELS[name].fn.params]
    seen = [dict(zip(parameters, launch.args, strict=False)) | launch.flags for launch in launches]
    for flag in launches[0].flags:
        assert {values[flag] for values in seen} == CHOICES.get(flag, {False, True}), flag
    for optional in {"bias", "teacher_bias", "softcap", "teacher_softcap", "ref_logp", "tail_logp"} & set(parameters):
        assert {values[optional] is None for values in seen} == {False, True}, optional
    for tensor in {"out", "weight", "hidden", "d_weight"} & set(parameters) - ({"out"} if name in FLOAT32_OUT else set()):
        given = [values[tensor] for values in seen if values[tensor] is not None]
        assert {x.dtype for x in given} == HALVES, tensor


@pytest.fixture(scope="module")
def reports():
    return compile_gate.run()


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_passes(reports, name):
    own = [report for report in reports if report.kernel == name]
    assert len(own) == len(CASES[name]) * len(compile_gate.ARCHS)
    assert not any(report.faults for report in own), compile_gate.table(own)


@triton.jit
def _tensor_core(x, out, PRECISION: tl.constexpr):
    """x·x of a 64×64 matrix."""
    o = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    a = tl.load(x + o)
    tl.store(out + o, tl.dot(a, a, input_precision=PRECISION))


@triton.jit
def _copy(x, out, BLOCK: tl.constexpr):
    """out = x."""
    o = tl.arange(0, BLOCK)
    tl.store(out + o, tl.load(x + o))


@triton.jit
def _gap(x, out, BLOCK: tl.constexpr, ROUNDED: tl.constexpr):
    """out = x·x − x, which a fused multiply-add rounds once."""
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o)
    tl.store(out + o, (product(b_x, b_x) if ROUNDED else b_x * b_x) - b_x)


def test_logits_are_rounded_before_they_are_used():
    x = torch.empty(1 << 16, device="meta")
    assert "no mul" in faults(_gap, x, BLOCK=1024, ROUNDED=False, wide=(compile_gate.ROUNDED,))
    assert "no mul" not in faults(_gap, x, BLOCK=1024, ROUNDED=True, wide=(compile_gate.ROUNDED,))
    assert "no fma" not in faults(_gap, x, BLOCK=1024, ROUNDED=False, wide=(r"fma\.rn\.f32",))
    assert "no fma" in faults(_gap, x, BLOCK=1024, ROUNDED=True, wide=(r"fma\.rn\.f32",))
    makers = {name for name, spec in KERNELS.items() if spec.tempers}
    assert makers == {name for name, spec in KERNELS.items() if {"tempered", "load_z"} & set(spec.fn.fn.__globals__)}


def faults(kernel, x, num_warps=4, max_registers=255, wide=(), **flags) -> str:
    launch = Launch(kernel, Config(0, num_warps, ()), (x, torch.empty_like(x)), flags)
    return "; ".join(compile_gate.inspect(launch, 90, max_registers, wide)[2])


def test_the_gate_catches_what_it_is_for():
    x = torch.empty(1 << 16, device="meta")
    assert "tf32" not in faults(_tensor_core, x, PRECISION="ieee")
    assert "tf32" in faults(_tensor_core, x, PRECISION="tf32")
    assert faults(_copy, x, BLOCK=1024, wide=(WIDE_LOAD,)) == ""
    assert "v4" in faults(_copy, x[1:], BLOCK=1024, wide=(WIDE_LOAD,))  # a pointer off its 16 bytes
    assert "registers, ceiling 8" in faults(_copy, x, BLOCK=1024, max_registers=8)
    assert "stack" in faults(_copy, x, num_warps=1, BLOCK=1 << 14)  # 512 values a thread
    assert "does not compile" in faults(_copy, x, BLOCK=1000)


def test_specialisation_follows_the_launch():
    args = (torch.empty(64, device="meta")[4:], torch.empty(64, device="meta", dtype=torch.int32))
    signature, constants, attrs = compile_gate.specialize(Launch(_copy, Config(0, 4, (("BLOCK", 32),)), args, {}))
    assert signature == {"x": "*fp32", "out": "*i32", "BLOCK": "constexpr"}
    assert constants == {"BLOCK": 32}
    assert set(attrs) == {(0,), (1,)}
