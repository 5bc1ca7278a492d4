"""The kernels' own arithmetic against float64, in units of the last place of float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.conftest import DEVICE, INTERPRET

triton = pytest.importorskip("triton")
tl = triton.language
if not INTERPRET and DEVICE == "cpu":
    pytest.skip("Triton on the CPU needs TRITON_INTERPRET=1", allow_module_level=True)

from rlad_kernels.backends.triton import _math  # noqa: E402

ULP = 2.0**-23


@triton.jit
def _evaluate(out, x, n, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    """out = the function WHICH of x."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o, mask=o < n, other=0.0)
    if WHICH == "exp_ulp":
        b_y = _math.exp_ulp(b_x)
    elif WHICH == "e":
        b_y = _math.exp_and_expm1(b_x)[0]
    elif WHICH == "below":
        b_y = _math.exp_and_expm1(b_x)[1]
    elif WHICH == "excess":
        b_y = _math.excess(b_x)
    elif WHICH == "expm1":
        b_y = _math.expm1(b_x)
    else:
        b_y = _math.log1p(b_x)
    tl.store(out + o, b_y, mask=o < n)


def _excess(x: torch.Tensor) -> torch.Tensor:
    """e^x − 1 − x, whose difference cancels near 0."""
    small, total = x.clamp(-1, 1), torch.zeros_like(x)
    for k in range(30, 1, -1):
        total = (total + 1) * small / k
    return torch.where(x.abs() < 1, total * small, x.expm1() - x)


# the function, its float64, where, and the ulps its few operations may cost
FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[float, float], float]] = {
    "exp_ulp": (torch.exp, (-86, 86), 1.5),
    "e": (torch.exp, (-86, 0), 1.5),
    "below": (torch.expm1, (-86, 0), 2),
    "excess": (_excess, (-1, 1), 3),
    "expm1": (torch.expm1, (-1, 1), 3),
    "log1p": (torch.log1p, (-0.5, 0.5), 3),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("which", FUNCTIONS)
def test_functions_keep_their_relative_accuracy(which: str) -> None:
    exact, (low, high), ulps = FUNCTIONS[which]
    ends = torch.tensor([low, high]).abs().max().log2()
    size = torch.cat([2.0 ** torch.linspace(-30, float(ends), 20_000), torch.linspace(0, 1, 20_000) * max(-low, high)])
    x = torch.cat([-size, size]).clamp(low, high)
    x = torch.cat([x, torch.zeros(1)])
    out = torch.empty_like(x)
    _evaluate[(triton.cdiv(len(x), 4096),)](out, x, len(x), WHICH=which, BLOCK=4096)
    want = exact(x.double())
    assert ((out.double() - want).abs() <= ulps * ULP * want.abs()).all()
    assert out[-1] == exact(x[-1:].double())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_ends_of_exponentials() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, -200.0, -0.0, nan])
    for which, want in (("e", [0.0, 0.0, 1.0, nan]), ("below", [-1.0, -1.0, 0.0, nan]), ("exp_ulp", [0.0, 0.0, 1.0, nan])):
        out = torch.empty(4)
        _evaluate[(1,)](out, x, 4, WHICH=which, BLOCK=4)
        assert torch.equal(out.nan_to_num(nan=7.0), torch.tensor(want).nan_to_num(nan=7.0)), which
