"""linear_logp against the float64 oracle: values, gradients, heads, masks, tiles, adversarial inputs."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlad_kernels as rk
from rlad_kernels.backends import reference
from tests.oracles import budgets, within
from tests.sweeps import Problem, leaf, problem, relative, weighted_sum

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
EXTRAS = ("mean_logits", "is_top1", "log_sum_sq_probs")
HEADS = {
    "plain": {"bias": False},
    "bias": {},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.3},
    "padded": {"vocab_size": 230},
    "everything": {"softcap": 7.0, "logit_scale": 1.4, "vocab_size": 230, "temperature": 0.6},
}


def run(p: Problem, **more: object) -> tuple[torch.Tensor, ...]:
    s = rk.linear_logp(p.hidden, p.head, p.target, topk_ids=p.ids, entropy=True, tail=True, extras=EXTRAS, mask=p.mask, **more)
    assert s.entropy is not None
    assert s.topk_logp is not None
    assert s.tail_logp is not None
    return (s.logp, s.lse, s.entropy, s.topk_logp, s.tail_logp), s.extras


def backward(p: Problem, scores: tuple[torch.Tensor, ...], cotangents: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(weighted_sum(scores, cotangents), p.leaves))


def expected(p: Problem, cotangents: list[torch.Tensor]) -> list[tuple[torch.Tensor, float]]:
    """The scores, what else a forward gives and the gradients, each with its budget."""

    def formula() -> list[torch.Tensor]:
        want = p.twin()
        truth = want.expected()
        return [*truth[:6], truth.log_sum_sq_probs, *backward(want, truth[:5], cotangents)]

    return budgets(formula)


FIELDS = ("logp", "lse", "entropy", "topk_logp", "tail_logp", "mean_logits", "log_sum_sq_probs")
GRADS = ("d_hidden", "d_weight", "d_bias")


@pytest.mark.parametrize("name", HEADS)
def test_float32_is_as_good_as_plain_pytorch(name: str) -> None:
    p = problem(n=48, v=257, **HEADS[name])
    p.ids[0, 1], p.ids[1, 2], p.ids[2, 0] = p.ids[0, 0], -1, p.target[2]  # a duplicate, an empty slot, the target
    scores, extras = run(p)
    cotangents = [torch.randn_like(x) for x in scores]
    found = [*scores, *(extras[field] for field in FIELDS[5:]), *backward(p, scores, cotangents)]
    for field, actual, bounded in zip((*FIELDS, *GRADS[: len(p.leaves)]), found, expected(p, cotangents), strict=True):
        within(actual, *bounded, field)
    assert torch.equal(extras["is_top1"], p.twin().expected().is_top1)
    assert not any(x.requires_grad for x in extras.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tile", [None, (4, 17)], ids=["one_tile", "tiles"])
def test_low_precision_keeps_float32_logits(dtype: torch.dtype, tile: tuple[int, int] | None) -> None:
    p = problem(n=16, d=32, v=61 if INTERPRET else 211, dtype=dtype, sigma=2.0)
    with rk.set_tile(*(tile or (None, None))):
        scores, _ = run(p)
        cotangents = [torch.randn_like(x) for x in scores]
        grads = backward(p, scores, cotangents)
    want = p.twin()
    truth = want.expected()
    for actual, expected in zip(scores, truth[:5], strict=True):
        assert actual.dtype == torch.float32
        assert (actual.double() - expected).abs().max() <= 1e-4
    for g, e, x in zip(grads, backward(want, truth[:5], cotangents), p.leaves, strict=True):
        assert g.dtype == x.dtype
        assert relative(g, e) <= 3e-3


@pytest.mark.cpu
@pytest.mark.parametrize("tile", [None, (64, 64), (4096, 4096)], ids=["default", "64x64", "4096x4096"])
def test_acceptance_shape_bf16(tile: tuple[int, int] | None) -> None:
    p = problem(n=512, d=256, v=16384, dtype=torch.bfloat16, bias=False)
    weights = torch.randn(512)
    with rk.set_tile(*(tile or (None, None))):
        results = []
        for _ in range(2):
            s = rk.linear_logp(p.hidden, p.head, p.target)
            results.append((s.logp, *torch.autograd.grad((s.logp * weights).sum(), p.leaves)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second), "two runs differ"
    want = p.twin()
    z = want.logits()
    assert 2.5 < z.std() < 3.5
    logp = z.log_softmax(-1).gather(1, p.target[:, None])[:, 0]
    exact = torch.autograd.grad((logp * weights).sum(), want.leaves)
    assert (results[0][0].double() - logp).abs().max() <= 1e-4
    for g, e in zip(results[0][1:], exact, strict=True):
        assert relative(g, e) <= 3e-3


@pytest.mark.parametrize("tile", [(1, 1000), (3, 7), (1000, 1 if not INTERPRET else 5)], ids=str)
def test_tiles_do_not_change_the_result(tile: tuple[int, int]) -> None:
    p = problem(n=7, d=8, v=40 if INTERPRET else 101)
    scores, _ = run(p)
    with rk.set_tile(*tile):
        tiled, _ = run(p)
    for a, b in zip(scores, tiled, strict=True):
        limit = 1e-5 * (scores[1].abs() / 16).clamp_min(1)
        assert ((a - b).nan_to_num(neginf=0).abs() <= (limit if a.dim() == 1 else limit[:, None])).all()


@pytest.mark.cpu
def test_thread_count_does_not_change_the_result() -> None:
    p = problem(n=300, d=32, v=2000)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(run(p)[0])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        limit = 1e-5 * (found[0][1].abs() / 16).clamp_min(1)
        assert ((a - b).abs() <= (limit if a.dim() == 1 else limit[:, None])).all()


@pytest.mark.cpu
def test_gradcheck_float64() -> None:
    p = problem(n=4, d=5, v=11, k=3, dtype=torch.float64, softcap=4.0, logit_scale=0.8)
    p.ids[0, 1] = p.ids[0, 0]

    def f(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        head = rk.LMHead(weight, bias, **p.options)
        s = rk.linear_logp(hidden, head, p.target, topk_ids=p.ids, entropy=True, tail=True)
        return s.logp, s.lse, s.entropy, s.topk_logp, s.tail_logp

    assert torch.autograd.gradcheck(f, tuple(p.leaves))


def test_double_backward_raises() -> None:
    p = problem()
    logp = rk.linear_logp(p.hidden, p.head, p.target).logp
    (g,) = torch.autograd.grad(logp.sum(), p.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(g.sum(), p.hidden)


@pytest.mark.parametrize("compaction", [True, False], ids=["dropped", "computed"])
@pytest.mark.parametrize("as_number", [False, True], ids=["bool", "float"])
def test_masked_rows_have_no_effect_whatever_sits_there(compaction: bool, as_number: bool) -> None:
    p = problem(shape=(3, 5))
    temperature = torch.rand(3, 5) + 0.5
    mask = torch.rand(3, 5) > 0.4
    mask[0] = False
    target = p.target.clone()
    target[1, 0] = -100
    keep = mask & (target != -100)
    p.options["temperature"] = temperature
    clean = Problem(leaf(p.hidden), p.weight, p.bias, p.target, p.ids, keep, p.options)
    want, _ = run(clean)
    hidden = torch.where(keep[..., None], p.hidden.detach(), torch.nan).requires_grad_()
    bad_ids = torch.where(keep[..., None], p.ids, 10**6)
    bad_target = torch.where(mask, target, -7)
    options = {"temperature": torch.where(keep, temperature, 0.0)}
    dirty = Problem(hidden, p.weight, p.bias, bad_target, bad_ids, mask.float() if as_number else mask, options)
    with rk.set_compaction(compaction):
        scores, extras = run(dirty)
        cotangents = [torch.where(keep if x.dim() == 2 else keep[..., None], torch.randn_like(x), torch.nan) for x in scores]
        finite = [torch.where(c.isnan(), 0, c) for c in cotangents]
        grads = torch.autograd.grad(scores, dirty.leaves, finite)
    exact = torch.autograd.grad(want, clean.leaves, finite)
    for a, b in zip(scores, want, strict=True):
        assert (a[~keep] == 0).all()
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    assert all((x[~keep] == 0).all() for x in extras.values())
    assert (grads[0][~keep] == 0).all()
    for g, e in zip(grads, exact, strict=True):
        assert relative(g, e) <= 1e-6


def test_rows_without_gradient_are_dropped_from_the_backward_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    import rlad_kernels.engine.logp as sweep

    seen = []
    tiles = sweep.Tiles
    monkeypatch.setattr(sweep, "Tiles", lambda hidden, *a, **k: seen.append(hidden.shape[0]) or tiles(hidden, *a, **k))
    p = problem(n=12)
    c = torch.randn(12)
    c[::3] = 0
    logp = rk.linear_logp(p.hidden, p.head, p.target).logp
    grads = torch.autograd.grad(logp, p.leaves, c)
    assert seen == [12, 8]
    want = p.twin()
    exact = torch.autograd.grad(want.expected().logp, want.leaves, c.double())
    assert (grads[0][::3] == 0).all()
    for g, e in zip(grads, exact, strict=True):
        assert relative(g, e) <= 1e-6


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_skip_their_product(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import rlad_kernels.engine.logp as sweep

    made = []
    original = sweep.Gradients

    def spy(*a: object, **k: object) -> object:
        made.append(original(*a, **k))
        return made[-1]

    monkeypatch.setattr(sweep, "Gradients", spy)
    p = problem()
    getattr(p, frozen).requires_grad_(False)
    rk.linear_logp(p.hidden, p.head, p.target).logp.sum().backward()
    assert getattr(made[0], frozen) is None, "a frozen input must have no gradient buffer"
    assert getattr(p, frozen).grad is None
    want = p.twin()
    want.expected().logp.sum().backward()
    for name in {"hidden", "weight", "bias"} - {frozen}:
        assert relative(getattr(p, name).grad, getattr(want, name).grad) <= 2e-6


def test_per_token_temperature_and_leading_dimensions() -> None:
    p = problem(shape=(2, 3, 4), temperature=torch.rand(2, 3, 4) + 0.5)
    scores, _ = run(p)
    bounds = expected(p, [torch.ones_like(x) for x in scores])
    for field, actual, bounded in zip(FIELDS, scores, bounds, strict=False):
        within(actual, *bounded, field)


def test_strided_weight_is_not_copied_and_padding_gets_no_gradient() -> None:
    wide = torch.randn(50, 24)
    weight = leaf(torch.zeros(50, 16))
    p = problem(n=5, d=16, v=50, bias=False, vocab_size=41)
    with torch.no_grad():
        view = wide[:, :16]
    assert rk.LMHead(view).weight.data_ptr() == view.data_ptr()
    a = rk.linear_logp(p.hidden, rk.LMHead(view, vocab_size=41), p.target).logp
    b = rk.linear_logp(p.hidden, rk.LMHead(view.contiguous(), vocab_size=41), p.target).logp
    assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    rk.linear_logp(p.hidden, rk.LMHead(weight, vocab_size=41), p.target).logp.sum().backward()
    assert (weight.grad[41:] == 0).all()
    assert (weight.grad[:41] != 0).any()


@pytest.mark.parametrize("size", [150.0, -150.0], ids=["plus150", "minus150"])
def test_extreme_logits(size: float) -> None:
    weight = leaf(torch.randn(233, 4) * 0.1)
    bias = leaf(torch.full((233,), size) + torch.linspace(-3, 3, 233))
    p = Problem(leaf(torch.randn(40, 4)), weight, bias, torch.randint(0, 233, (40,)), torch.randint(0, 233, (40, 3)))
    scores, _ = run(p)
    cotangents = [torch.randn_like(x) for x in scores]
    bounds = expected(p, cotangents)
    for field, actual, bounded in zip(FIELDS, scores, bounds, strict=False):
        within(actual, *bounded, field)
    for field, actual, bounded in zip(GRADS, backward(p, scores, cotangents), bounds[len(FIELDS) :], strict=True):
        within(actual, *bounded, field)


def test_minus_infinity_columns_are_outside_the_vocabulary() -> None:
    p = problem(n=6, v=40)
    with torch.no_grad():
        p.bias[30:] = -torch.inf
    p.target.clamp_(max=29)
    p.ids[:, 0] = 35
    with rk.set_tile(4, 8):  # whole tiles of -inf, and the first tile of a row may be one
        scores, _ = run(p)
        shifted = Problem(p.hidden, leaf(p.weight.flip(0)), leaf(p.bias.flip(0)), 39 - p.target, 39 - p.ids)
        flipped, _ = run(shifted)
    short = Problem(p.hidden, leaf(p.weight[:30]), leaf(p.bias[:30]), p.target, p.ids.clamp(max=29), None)
    truth = short.twin().expected()
    for a in (scores, flipped):
        assert (a[3][:, 0] == -torch.inf).all()
        for i in (0, 1, 2):
            assert torch.allclose(a[i].double(), truth[i], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(scores[0].sum() + scores[2].sum() + scores[4].sum(), p.leaves)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][30:] == 0).all()


def test_log_probs_near_zero_and_tail_masses_keep_relative_accuracy() -> None:
    """p → 1: log p and the tail mass come from the sum of the others, not from 1 − Σ."""
    v, n = 1000, 12
    bias = torch.zeros(v)
    hidden = torch.eye(n)
    weight = torch.zeros(v, n)
    for i in range(n):
        weight[7, i] = 7.0 + 1.5 * i  # tail masses from 1e-1 down to 1e-7
    p = Problem(leaf(hidden), leaf(weight), leaf(bias), torch.full((n,), 7), torch.tensor([[7, -1]]).repeat(n, 1))
    scores, _ = run(p)
    truth = p.twin().expected()
    assert truth.tail_logp.exp().min() < 2e-7
    assert ((scores[4].double().exp() / truth.tail_logp.exp() - 1).abs() <= 1e-3).all()
    assert ((scores[0].double() / truth.logp - 1).abs() <= 1e-5).all()


def test_tail_gradient_with_the_support_covering_nearly_all_mass() -> None:
    p = problem(n=5, v=30, k=4, sigma=1.0)
    with torch.no_grad():
        p.bias[:4] += 14.0
    p.ids[:] = torch.arange(4)
    scores, _ = run(p)
    want = p.twin()
    truth = want.expected()
    assert truth.tail_logp.max() < -4
    c = torch.randn(5)
    grads = torch.autograd.grad(scores[4], p.leaves, c)
    for g, e in zip(grads, torch.autograd.grad(truth.tail_logp, want.leaves, c.double()), strict=True):
        assert relative(g, e) <= 1e-5


def test_support_covering_the_vocabulary() -> None:
    p = problem(n=4, v=9, k=9)
    p.ids[:] = torch.arange(9)
    scores, _ = run(p)
    assert (scores[4] == -torch.inf).all()
    grads = torch.autograd.grad(scores[4].exp().sum() + scores[3].sum(), p.leaves)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single_batches(n: int) -> None:
    p = problem(n=n)
    scores, _ = run(p)
    assert scores[0].shape == (n,)
    assert scores[3].shape == (n, 5)
    weighted_sum(scores, [torch.ones_like(x) for x in scores]).backward()
    assert p.weight.grad.shape == p.weight.shape
    assert n or (p.weight.grad == 0).all()


def test_all_masked() -> None:
    p = problem()
    p.mask = torch.zeros(13, dtype=torch.bool)
    scores, _ = run(p)
    assert all((x == 0).all() for x in scores)
    scores[0].sum().backward()
    assert (p.weight.grad == 0).all()
    assert (p.hidden.grad == 0).all()


SHAPES = st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(2, 40), st.integers(1, 6))


@given(SHAPES, st.integers(1, 9), st.integers(1, 45), st.integers(0, 2**31))
def test_any_shape_mask_and_tile(shape: tuple[int, int, int, int], rows: int, cols: int, seed: int) -> None:
    n, d, v, k = shape
    torch.manual_seed(seed)
    k = min(k, v)
    p = problem(n=n, d=d, v=v, k=k, sigma=1.0)
    p.ids[torch.rand(n, k) < 0.2] = -1
    p.mask = torch.rand(n) < 0.7
    with rk.set_tile(rows, cols):
        scores, _ = run(p)
        cotangents = [torch.randn_like(x) for x in scores]
        grads = backward(p, scores, cotangents)
    want = p.twin()
    truth = want.expected()
    for i, field in enumerate(reference.Scores._fields[:5]):
        a, e = scores[i].double(), truth[i]
        assert torch.equal(a.isinf(), e.isinf()), field
        assert torch.allclose(a.nan_to_num(neginf=0), e.nan_to_num(neginf=0), rtol=1e-5, atol=2e-5), field
    for g, e in zip(grads, backward(want, truth[:5], cotangents), strict=True):
        assert (g.double() - e).abs().max().nan_to_num() <= 1e-4 * e.abs().max().clamp_min(1e-3) if e.numel() else True


@pytest.mark.cpu
def test_more_rows_than_a_grid_axis() -> None:
    p = problem(n=65_600, d=2, v=5, k=1)
    assert relative(rk.linear_logp(p.hidden, p.head, p.target).logp, p.twin().expected().logp) <= 1e-6


def test_autocast_casts_both() -> None:
    p = problem(n=6)
    with torch.autocast(p.hidden.device.type, dtype=torch.bfloat16):
        logp = rk.linear_logp(p.hidden, p.head, p.target).logp
    low = rk.LMHead(p.weight.bfloat16(), p.bias.bfloat16())
    assert torch.equal(logp, rk.linear_logp(p.hidden.bfloat16(), low, p.target).logp)
    logp.sum().backward()
    assert p.weight.grad.dtype == torch.float32
