"""bfloat16's d_weight by one product over all rows' dlogits, or added up chunk by chunk: right on both roads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.engine import tiles
from rlad_kernels.engine.chunks import Chunks
from rlad_kernels.engine.waiting import Waiting, summed_in_float32
from tests.conftest import DEVICE, INTERPRET
from tests.methods.divergence import DIVERGENCES, VALUES
from tests.sweeps import Own, Problem, problem, relative

N, D, V = 23, 24, 97
NARROW = INTERPRET or DEVICE != "cpu" or torch.ops.rlad.has_bf16_mm()  # else operands are widened, dlogits float32
LOSSES = ("cross_entropy", "smoothed", "dead_rows", "masked", "no_rows", "jsd", "two_teachers", "own_divergence")


class Squares(rk.losses.Divergence):
    """½·Σ(q − p)², by autograd."""

    def values(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return (student_logp.exp() - teacher_logp.exp()).square().sum(-1) / 2


def sent(kind: str) -> Tensor:
    """What each token's −log p is weighed with."""
    if kind == "dead_rows":  # every second one, and all of the first chunks
        return torch.linspace(-1, 2, N) * (torch.arange(N) % 2) * (torch.arange(N) >= 16)
    return (torch.arange(N) % 3 > 0).float() if kind == "masked" else torch.full((N,), float(kind != "no_rows"))


def loss_of(kind: str, p: Problem, others: list[Problem]) -> Tensor:
    if others:
        states, teachers = [o.hidden.detach() for o in others], [o.head for o in others]
        divergence = Squares() if kind == "own_divergence" else DIVERGENCES["gkd_jsd"]
        weights = [0.7] * len(others)
        return rk.linear_divergence_loss(p.hidden, p.head, states, teachers, divergence, teacher_weights=weights).loss
    if kind == "dead_rows":
        return rk.linear_loss(p.hidden, p.head, p.target, Own(lambda scores: -scores.logp), w=sent(kind)).loss
    loss = rk.losses.CrossEntropy(label_smoothing=0.2 if kind == "smoothed" else 0.0)
    return rk.linear_loss(p.hidden, p.head, p.target, loss, mask=sent(kind) != 0).loss


def formula(kind: str, p: Problem, others: list[Problem]) -> Tensor:
    """The same in plain PyTorch."""
    lq = p.logits().log_softmax(-1)
    if others:
        value = Squares().values if kind == "own_divergence" else VALUES["gkd_jsd"]
        return 0.7 * torch.stack([value(lq, o.logits().detach().log_softmax(-1)) for o in others]).sum(0).mean()
    w, nll = sent(kind).double(), -lq.gather(1, p.target[:, None])[:, 0]
    nll = 0.8 * nll - 0.2 * lq.mean(1) if kind == "smoothed" else nll
    return (w * nll).sum() / (N if kind == "dead_rows" else w.sum().clamp_min(1))


@pytest.mark.parametrize("way", ("chunks", "slabs", pytest.param("at_once", marks=pytest.mark.skipif(INTERPRET, reason="widened"))))
@pytest.mark.parametrize("kind", LOSSES)
def test_gradients(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight has a row that is no token's, and tiles do not divide anything."""
    made: list[Waiting] = []
    start = Waiting.__init__
    monkeypatch.setattr(Waiting, "__init__", lambda self, tiles: (made.append(self), start(self, tiles))[1])
    if way == "chunks":
        monkeypatch.setattr(tiles, "dlogits_wait", lambda *_: False)
    monkeypatch.setattr(tiles.Tiles, "rounds_once", property(lambda _: way == "at_once", lambda *_: None), raising=False)
    teachers = {"jsd": 1, "own_divergence": 1, "two_teachers": 2}.get(kind, 0)
    p, *others = (problem(N, D, V + 1, dtype=torch.bfloat16, sigma=2.0, vocab_size=V) for _ in range(1 + teachers))
    with rk.set_tile(8, 40):
        got = torch.autograd.grad(loss_of(kind, p, others), p.leaves)
    exact = p.twin()
    want = torch.autograd.grad(formula(kind, exact, [o.twin() for o in others]), exact.leaves)
    for name, g, e in zip(("d_hidden", "d_weight", "d_bias"), got, want, strict=True):
        assert g.dtype == torch.bfloat16
        assert relative(g, e) <= 3e-3, name
    assert not got[1][V:].any()
    assert len(made) == (way != "chunks" and NARROW)


@pytest.mark.skipif(not NARROW, reason="dlogits are float32")
@pytest.mark.parametrize("kind, width, lent", [("cross_entropy", 40, 1), ("jsd", 40, 1), ("jsd", 80, 2), ("two_teachers", 120, 3)])
def test_d_weights_memory_holds_logits_until_its_product(kind: str, width: int, lent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chunk of 16 rows and 64 columns, 4 KiB a model; and as much for the sum of two teachers' dlogits."""
    spaces: list[Tensor] = []
    start = Chunks.__init__

    def recorded(self: Chunks, *args: Any, **given: Any) -> None:
        start(self, *args, **given)
        spaces.append(self.shared)

    monkeypatch.setattr(Chunks, "__init__", recorded)
    teachers = {"jsd": 1, "two_teachers": 2}.get(kind, 0)
    p, *others = (problem(N, width, 64, dtype=torch.bfloat16) for _ in range(1 + teachers))
    with rk.set_tile(16, 64):
        d_weight = torch.autograd.grad(loss_of(kind, p, others), p.weight)[0]
    exact = p.twin()
    (want,) = torch.autograd.grad(formula(kind, exact, [o.twin() for o in others]), exact.weight)
    assert relative(d_weight, want) <= 3e-3
    within = [0 <= x.data_ptr() - d_weight.data_ptr() <= d_weight.nbytes - x.nbytes for x in spaces]
    fit = d_weight.nbytes // spaces[0].nbytes  # on CUDA the chunk has all 23 rows
    assert within == [min(i, 1) < fit for i in range(1 + teachers)]
    assert fit == lent or DEVICE != "cpu"


@pytest.mark.parametrize("device, keep_logits, rows", [("cpu", 1, 511), ("cpu", 2, 512), ("cuda", 1, 1920), ("cuda", 2, 1792)])
def test_chunks_fit_into_what_is_lent(device: str, keep_logits: int, rows: int) -> None:
    """A vocabulary that is no multiple of 64 loses a row or, on CUDA, 128; too few rows are not worth it."""
    lent = {"cpu": 2048, "cuda": 8192}[device] if keep_logits == 1 else 1000
    found, _ = tiles.tile_sizes(device, 1 << 20, 151_655, keep_logits=keep_logits, lent=lent)
    assert found == rows
    if keep_logits == 1:
        assert tiles.scratch_size(rows, 151_655) * 4 <= lent * 151_655


@pytest.mark.parametrize("given", [(True, True), (False, True), (False, False)], ids=str)
def test_cublas_is_told_to_sum_in_float32_and_then_what_it_was_told_before(given: tuple[bool, bool]) -> None:
    def told() -> tuple[bool, bool]:
        return settings.allow_bf16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction_split_k

    settings: Any = torch.backends.cuda.matmul
    before = told()
    try:
        settings.allow_bf16_reduced_precision_reduction = given
        with summed_in_float32():
            assert not settings.allow_bf16_reduced_precision_reduction
        assert told() == given
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


def test_they_wait_where_that_takes_no_more_memory() -> None:
    """2 bytes a token and column against 4 bytes a column and hidden dimension."""
    wait = tiles.dlogits_wait
    assert wait(2 * D, D, torch.bfloat16) and not wait(2 * D + 1, D, torch.bfloat16)
    assert not wait(1, D, torch.float16) and not wait(1, D, torch.float32)
