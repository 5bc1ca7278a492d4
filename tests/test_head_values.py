"""What a head may hold: weights and no codes, one dtype or autocast, temperatures that are positive and finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.backends import reference
from tests.sweeps import Own

N, D, V, K = 5, 8, 16, 3
CODES = [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.complex64]
Call = Callable[[Tensor, rk.LMHead], Any]
TRRD, KL, KL_WITH_TAIL = rk.losses.TRRD(reduction="token-mean"), rk.losses.TopKKL(), rk.losses.TopKKL(normalize="tail")
GSPO, CE, DIVERGENCE = rk.losses.GSPO(reduction="token-mean"), rk.losses.CrossEntropy(), rk.losses.ForwardKL()


def sweeps() -> dict[str, Call]:
    """Every public call that reads a head, of hidden states ``(N, D)``."""
    target, ids, (s, o, a) = torch.randint(V, (N,)), torch.randint(V, (N, K)), torch.randn(3, N)
    teacher = rk.TopK(ids, torch.randn(N, K).log_softmax(1), tail_logp=-torch.ones(N))
    states, head = torch.randn(N, D), rk.LMHead(torch.randn(V, D))
    return {
        "linear_logp": lambda h, w: rk.linear_logp(h, w, target),
        "linear_logp sparse": lambda h, w: rk.linear_logp(h, w, target, filter_eps=0.01),
        "linear_topk": lambda h, w: rk.linear_topk(h, w, K),
        "linear_gather": lambda h, w: rk.linear_gather(h, w, ids),
        "linear_support": lambda h, w: rk.linear_support(h, w, ids),
        "linear_loss": lambda h, w: rk.linear_loss(h, w, target, CE),
        "linear_loss own": lambda h, w: rk.linear_loss(h, w, target, Own(lambda scores: -scores.logp)),
        "linear_loss sparse": lambda h, w: rk.linear_loss(h, w, target, CE, filter_eps=0.01),
        "linear_loss trrd": lambda h, w: rk.linear_loss(h, w, target, TRRD, old_logp=o, advantages=a, teacher_logp=s),
        "linear_loss of sequences": lambda h, w: rk.linear_loss(
            h, w, target, GSPO, old_logp=o, advantages=a, reduction=rk.Reduction(seq_ids=torch.zeros(N).long())
        ),
        "linear_loss support": lambda h, w: rk.linear_loss(h, w, target, KL, teacher=teacher),
        "linear_loss tail": lambda h, w: rk.linear_loss(h, w, target, KL_WITH_TAIL, teacher=teacher),
        "linear_divergence": lambda h, w: rk.linear_divergence(h, w, states, head, DIVERGENCE),
        "linear_divergence teacher": lambda h, w: rk.linear_divergence(states, head, h, w, DIVERGENCE),
        "linear_divergence_loss": lambda h, w: rk.linear_divergence_loss(h, w, states, head, DIVERGENCE),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("autocast", [False, True])
def test_codes_are_no_weights(dtype: torch.dtype, part: str, autocast: bool) -> None:
    """Under autocast the codes of a quantised head were cast, and taken for its weights: off by hundreds of nats."""
    codes = {"weight": torch.randn(V, D), "bias": torch.randn(V)}
    codes[part] = codes[part].to(dtype)
    device = codes[part].device.type
    with (
        pytest.raises(ValueError, match=rf"LMHead: {part} must be float32, .* got {dtype}; .*dequantise"),
        torch.autocast(device, torch.bfloat16, enabled=autocast),
    ):
        rk.LMHead(**codes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("name", sweeps())
def test_codes_are_no_hidden_states(name: str, dtype: torch.dtype) -> None:
    call, hidden, head = sweeps()[name], torch.randn(N, D).to(dtype), rk.LMHead(torch.randn(V, D))
    with (
        pytest.raises(ValueError, match=rf"^{name.split()[0]}.*: hidden must be float32, .* got {dtype}$"),
        torch.autocast(hidden.device.type, torch.bfloat16),
    ):
        call(hidden, head)


@pytest.mark.parametrize("bias", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", sweeps())
def test_a_bias_of_another_dtype(name: str, bias: torch.dtype) -> None:
    """Under autocast it is cast as the weight is, and its gradient comes back in its own dtype; elsewhere it is refused."""
    call, hidden = sweeps()[name], torch.randn(N, D, dtype=torch.bfloat16)
    leaves = torch.randn(V, D, dtype=torch.bfloat16), torch.randn(V).to(bias)
    heads = [rk.LMHead(weight.requires_grad_(), b.requires_grad_()) for weight, b in (leaves, (leaves[0], leaves[1].bfloat16()))]
    with pytest.raises(ValueError, match=rf"^{name.split()[0]}.*: bias has dtype {bias}, weight torch.bfloat16; .*autocast"):
        call(hidden, heads[0])
    with torch.autocast(hidden.device.type, torch.bfloat16):
        got, want = (call(hidden, head) for head in heads)
    for x, y in zip(_floats(got), _floats(want), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
        if x.requires_grad:
            (d_bias,) = torch.autograd.grad(x.sum(), heads[0].bias, retain_graph=True)
            assert d_bias.dtype == bias


def test_a_float32_bias_under_autocast_is_right() -> None:
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D, dtype=torch.bfloat16), torch.randn(V)
    target = torch.arange(N)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        logp = rk.linear_logp(hidden, rk.LMHead(weight, bias), target).logp
    z = reference.logits(hidden.bfloat16().double(), weight.double(), bias.bfloat16().double())
    torch.testing.assert_close(logp.double(), reference.token_scores(z, target).logp, rtol=0, atol=1e-5)


WRONG = [0.0, -1.0, torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("shape", [(), (N,)], ids=["one", "each"])
@pytest.mark.parametrize("name", sweeps())
def test_temperatures_are_positive_and_finite(name: str, shape: tuple[int, ...], value: float) -> None:
    temperature = torch.full(shape, 0.7)
    temperature.view(-1)[-1] = value
    head = rk.LMHead(torch.randn(V, D, requires_grad=True), temperature=temperature)
    match = rf"^{name.split()[0]}.*: temperature must be positive and finite, got {value}$"
    with pytest.raises(ValueError, match=match), rk.set_checks(True):
        sweeps()[name](torch.randn(N, D), head)


@pytest.mark.parametrize("value", WRONG)
def test_temperatures_of_masked_tokens_do_not_matter(value: float) -> None:
    mask, good = torch.arange(N) != 2, torch.full((N,), 0.7)
    bad = torch.where(mask, good, value)
    hidden, weight, ids = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N, K))
    teacher = rk.TopK(ids, torch.randn(N, K).log_softmax(1))
    found = []
    for temperature in (bad, good):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        head = rk.LMHead(w, temperature=temperature)
        outs = (
            rk.linear_gather(h, head, ids, mask=mask).sum(),
            rk.linear_loss(h, head, ids[:, 0], KL, teacher=teacher, mask=mask).loss,
            rk.linear_logp(h, head, ids[:, 0], mask=mask).logp.sum(), rk.linear_loss(h, head, ids[:, 0], CE, mask=mask).loss,
            rk.linear_divergence(h, head, hidden, head, DIVERGENCE, mask=mask).sum(),
        )  # fmt: skip
        found.append([*outs, *(g for x in outs for g in torch.autograd.grad(x, (h, w), allow_unused=True) if g is not None)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear_gather", "linear_loss support", "linear_logp", "linear_loss", "linear_loss of sequences"])
def test_compiled_calls_check_temperatures(name: str) -> None:
    call, weight = sweeps()[name], torch.randn(V, D)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden: Tensor, temperature: Tensor) -> Any:
        return call(hidden, rk.LMHead(weight, temperature=temperature))

    hidden = torch.randn(N, D)
    step(hidden, torch.full((N,), 0.7))
    with (
        pytest.raises(ValueError, match=rf"^{name.split()[0]}: temperature must be positive and finite, got nan$"),
        rk.set_checks(True),
    ):
        step(hidden, torch.full((N,), torch.nan))


def _floats(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x] if x.is_floating_point() else []
    parts = list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, tuple) else []
    return [t for part in parts for t in _floats(part)]
