"""The ops as torch sees them: opcheck, fullgraph compile, fake CUDA tensors, no silent fallback, settings."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import rlad_kernels as rk
from rlad_kernels.backends.contract import TOKEN_OPS
from rlad_kernels.core.modes import numbers
from rlad_kernels.engine.op import SWEEP_OPS
from tests.sweeps import problem
from tests.test_fused import rlad, rlad_inputs

R = torch.ops.rlad


def sweep_args() -> tuple[object, ...]:
    p = problem(n=6, v=30)
    mask = torch.rand(6) > 0.3
    return p, mask, (torch.ones(1), 1.0, 0.0, 30, 0, "")


def cases() -> dict[str, tuple[object, ...]]:
    p, mask, call = sweep_args()
    tensors = (p.hidden, p.weight, p.bias)
    plain = tuple(x.detach() for x in tensors)
    half = tuple(x.detach().half().requires_grad_() for x in tensors)
    frozen = (p.hidden, *plain[1:])
    ones, zero = torch.ones(6), torch.zeros(6)
    saved = (*R.linear_logp(*plain, p.target, p.ids, mask, *call, True, True, False, 0.0, False, 0, "linear_logp"),)
    slots = torch.arange(18, dtype=torch.int32).view(6, 3)
    given = numbers(0.5, 0.2, 0.2, 1.0, 3.0, 0.1)
    ratio = (zero.clone().requires_grad_(), ones * 0.1, ones * 0.2, torch.randn(6), ones * 0.1, given, "k3")
    topk = torch.randn(6, 5).requires_grad_(), p.ids.int(), -torch.rand(6, 5), (-ones).requires_grad_(), -ones, "reverse", "tail"
    names = ["old_logp", "advantages", "teacher_logp", "teacher.ids", "teacher.logp"]
    taught = [-ones, torch.randn(6), -ones, p.ids.int(), -torch.rand(6, 5)]
    loss, nll = rlad(alpha=0.5), rk.losses.CrossEntropy(z_loss=0.5)
    other = [torch.randn(6, 7), torch.randn(30, 7), torch.randn(30), torch.ones(1)]
    jsd, reverse = rk.losses.JSD(0.3), rk.losses.ReverseKL()
    teachers = (other, [1.0, 5.0], torch.rand(1, 6), jsd.key, numbers(*jsd.numbers))
    return {
        "linear_logp": (*tensors, p.target, p.ids, mask, *call, True, True, True, 0.0, False, 0, "linear_logp"),
        "linear_logp sparse": (*tensors, p.target, p.ids, mask, *call, True, True, True, 0.1, False, 0, "linear_logp"),
        "linear_logp kept": (*tensors, p.target.clamp(0), p.ids, None, *call, True, True, True, 0.0, False, 4000, "linear_logp"),
        "linear_logp frozen": (*frozen, p.target, None, mask, *call, False, False, False, 0.0, True, 0, "linear_logp"),
        "linear_logp_bwd": (
            *plain, p.target, p.ids, mask, *call, *(saved[i] for i in (0, 3, 1, 8, 2, 4, 9)), *saved[11:],
            ones, zero, ones, torch.ones(6, 5), ones, True, True, True,
        ),
        "linear_logp_bwd hidden": (
            *plain, p.target, p.ids, mask, *call, *(saved[i] for i in (0, 3, 1, 8, 2, 4, 9)), *saved[11:],
            ones, zero, ones, torch.ones(6, 5), ones, True, False, False,
        ),
        "linear_topk": (*plain, p.target, mask, *call, 3, True),
        "linear_gather": (*tensors, p.ids, mask, torch.ones(1), *call[3:], "linear_gather"),
        "linear_gather_bwd": (torch.ones(6, 5), *plain, p.ids, mask, *call[3:], True, True, True),
        "linear_divergence": (*tensors, mask, *call, *teachers, False, "linear_divergence"),
        "linear_divergence frozen": (*frozen, mask, *call, *teachers[:3], reverse.key, numbers(), True, "linear_divergence"),
        "linear_divergence_bwd": (*plain, mask, *call, *teachers, torch.empty(0), ones, True, True, True),
        "linear_divergence_loss": (*tensors, mask, *call, *teachers, ones / 6, True, True, True, "linear_divergence_loss"),
        "row_slots": (p.target, torch.ones(6, 2, dtype=torch.int64), 17),
        "row_outputs": (torch.rand(6, 6), torch.randn(6, 3), slots, 18, True, True, True, True),
        "row_cotangents": (
            slots, -ones, -torch.rand(6, 2), ones, 0 * ones, ones, None, None,
            torch.randn(6, 2), ones, None, -ones,
        ),
        "dropped_mass": (torch.rand(2, 9) > 0.5, torch.randn(6, 9), torch.randn(9), ones, 1.0, 4.0, ones, 4),
        "scale_": (torch.randn(2, 3), torch.tensor(0.5)),
        "clipped_ratio": ratio,
        "topk_kl": topk,
        "linear_loss": (
            *tensors, p.target, mask, *call, ones / 6, 0.0, "linear_loss", loss.key, numbers(*loss.numbers), names, taught,
            ["ratio_mean", "entropy"], True, True, True,
        ),
        "linear_loss float16": (
            *half, p.target, mask, *call, ones / 6, 0.0, "linear_loss", nll.key, numbers(*nll.numbers), [], [], [],
            True, True, True,
        ),
        "linear_divergence_loss float16": (*half, mask, *call, *teachers, ones / 6, True, True, True, "linear_divergence_loss"),
        "checked": (ones, "binary", "GRPO: mask"),
    }  # fmt: skip


VARIANTS = ("linear_logp_bwd hidden", "linear_logp sparse", "linear_logp kept", "linear_logp frozen", "linear_divergence frozen")
HALVES = ("linear_loss float16", "linear_divergence_loss float16")
ALL = (*SWEEP_OPS, *TOKEN_OPS, "checked", *VARIANTS, *HALVES)


@pytest.mark.parametrize("name", ALL)
def test_opcheck(name: str) -> None:
    opcheck(getattr(R, name.split()[0]).default, cases()[name])


@pytest.mark.parametrize("name", ALL)
def test_fake_cuda_tensors_give_shapes_and_dtypes_without_a_gpu(name: str) -> None:
    args = cases()[name]
    op = getattr(R, name.split()[0])
    real = op(*args)
    with FakeTensorMode(allow_non_fake_inputs=True):

        def fake(x: object) -> object:
            if isinstance(x, list):
                return [fake(y) for y in x]
            return torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, torch.Tensor) else x

        out = op(*[fake(x) for x in args])
    for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x or () for x in (out, real)), strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "cuda")


@pytest.mark.slow_interpreted
def test_linear_logp_compiles_fullgraph() -> None:
    p, inputs = rlad_inputs()

    def f(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        head, teacher = rk.LMHead(weight, bias, temperature=0.8), inputs["teacher"]
        s = rk.linear_logp(hidden, head, p.target, topk_ids=teacher.ids, entropy=True, tail=True, extras=("is_top1",), mask=p.mask)
        sampled = {"old_logp": inputs["old_logp"], "advantages": inputs["advantages"], "teacher_logp": teacher.target_logp}
        ratio = rk.losses.TRRD()(s.logp, mask=p.mask, **sampled)
        kl = rk.losses.TopKKL(normalize="tail")(s, teacher=teacher, mask=p.mask)
        support = rk.linear_loss(hidden, head, p.target, rk.losses.TopKKL(), teacher=teacher, mask=p.mask)
        return ratio.loss + kl.loss + support.loss - 0.1 * s.entropy.mean()

    want = f(*p.leaves)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(*p.leaves)
    assert torch.allclose(got, want, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(got, p.leaves), torch.autograd.grad(want, p.leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow_interpreted
def test_linear_loss_compiles_fullgraph() -> None:
    p, inputs = rlad_inputs()

    def f(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> rk.LossOutput:
        return rk.linear_loss(hidden, rk.LMHead(weight, bias), p.target, rlad(teacher_clamp=2.0), mask=p.mask, **inputs)

    want = f(*p.leaves)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(*p.leaves)
    assert torch.allclose(got.loss, want.loss, rtol=1e-6)
    assert got.metrics.keys() == want.metrics.keys()
    for key, value in want.metrics.items():
        assert torch.allclose(got.metrics[key], value, rtol=1e-6), key
    for a, b in zip(torch.autograd.grad(got.loss, p.leaves), torch.autograd.grad(want.loss, p.leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.cpu
def test_inductor_compiles_a_training_step() -> None:
    p, inputs = rlad_inputs()
    loss = rlad()

    def step(hidden: torch.Tensor) -> torch.Tensor:
        return rk.linear_loss(hidden * 2, p.head, p.target, loss, mask=p.mask, **inputs).loss

    assert torch.allclose(torch.compile(step, fullgraph=True)(p.hidden), step(p.hidden), rtol=1e-5)


def test_the_contract_imports_neither_kernels_nor_triton_nor_transformers() -> None:
    code = "import sys, rlad_kernels; print([m for m in sys.modules if m in ('transformers', 'rlad_kernels.backends.triton')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.cpu
def test_a_missing_cpp_backend_raises_and_names_the_fix() -> None:
    code = (
        "import sys; sys.modules['rlad_kernels._C'] = None\n"
        "import torch, rlad_kernels as rk\n"
        "rk.linear_logp(torch.randn(2, 3), rk.LMHead(torch.randn(5, 3)), torch.tensor([0, 1]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "C++ CPU backend is not built" in found.stderr
    assert "pip install --no-build-isolation -e ." in found.stderr


def test_settings_work_as_statements_and_as_context_managers() -> None:
    from rlad_kernels.core.config import settings

    with rk.set_tile(3, 4), rk.set_checks(True), rk.set_compaction(False):
        assert (settings.tile_rows, settings.tile_cols, settings.checks, settings.compaction) == (3, 4, True, False)
    assert (settings.tile_rows, settings.tile_cols, settings.checks, settings.compaction) == (None, None, False, True)
    rk.set_tile(cols=9)
    assert settings.tile_cols == 9


def test_checks_report_non_finite_inputs() -> None:
    p = problem(n=3)
    with torch.no_grad():
        p.hidden[1, 0] = torch.nan
    assert rk.linear_logp(p.hidden, p.head, p.target).logp[1].isnan()
    with rk.set_checks(True), pytest.raises(ValueError, match="linear_logp: hidden, weight or bias gave a non-finite"):
        rk.linear_logp(p.hidden, p.head, p.target)
