"""from_logprobs: every shape in which servers write log-probs gives the teacher's own top-K, and bad ones are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.integrations.served import from_logprobs

T, V, K = 6, 40, 5
INF = math.inf


@dataclass
class Logprob:
    """vLLM's, as its offline engine returns it."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class World:
    """A teacher's whole distribution, float64, and sampled tokens, at positions 2, 4 and 5 outside the top K."""

    def __init__(self) -> None:
        logits = torch.randn(T, V, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(1)) * 2
        self.logp = logits.log_softmax(-1)
        self.top = self.logp.topk(K)
        order = self.logp.argsort(descending=True)
        self.target = torch.stack([order[t, r] for t, r in enumerate((0, 1, K + 4, 2, K, 39))])
        self.target_logp = self.logp.gather(1, self.target[:, None])[:, 0]

    def entries(self, t: int, sampled: bool = True) -> list[tuple[int, float]]:
        """(id, log-prob), the sampled token first as vLLM has it, and then the top ones without it."""
        top = [(int(i), float(x)) for i, x in zip(self.top.indices[t], self.top.values[t], strict=True)]
        token = (int(self.target[t]), float(self.target_logp[t]))
        return [token, *(e for e in top if e != token)] if sampled else top

    def prompt_logprobs(self) -> list[Any]:
        """vLLM's JSON."""
        rows = [{str(i): {"logprob": x, "rank": 1, "decoded_token": "a"} for i, x in self.entries(t)} for t in range(T)]
        return json.loads(json.dumps(rows))


@pytest.fixture
def world() -> Iterator[World]:
    """What servers say arrives on the CPU, whatever the device under test."""
    with torch.device("cpu"):
        yield World()


def check(got: rk.TopK, world: World, rows: slice = slice(None), target: bool = True) -> None:
    assert got.ids.dtype == torch.int32 and got.logp.dtype == torch.float32
    assert torch.equal(got.ids.cpu().long(), world.top.indices[rows])
    torch.testing.assert_close(got.logp.cpu().double(), world.top.values[rows], rtol=1e-6, atol=0)
    want = torch.log1p(-world.top.values.exp().sum(-1))[rows]
    torch.testing.assert_close(got.tail_logp.cpu().double(), want, rtol=1e-5, atol=0)
    if target:
        torch.testing.assert_close(got.target_logp.cpu().double(), world.target_logp[rows], rtol=1e-6, atol=0)


def chat(world: World, t: int) -> dict[str, Any]:
    top = [{"token": f"token_id:{i}", "logprob": x, "bytes": None} for i, x in world.entries(t, False)]
    return {"token": f"token_id:{int(world.target[t])}", "logprob": float(world.target_logp[t]), "top_logprobs": top}


FORMATS = {
    "vllm_json": World.prompt_logprobs,
    "vllm_objects": lambda w: [{i: Logprob(x, 1, "a") for i, x in w.entries(t)} for t in range(T)],
    "vllm_top_logprobs": lambda w: [{f"token_id:{i}": x for i, x in w.entries(t)} for t in range(T)],
    "vllm_chat": lambda w: [chat(w, t) for t in range(T)],
    "unsorted": lambda w: [dict(sorted(w.entries(t))) for t in range(T)],
    "tinker": lambda w: [[(i, x) for i, x in w.entries(t)] for t in range(T)],
    "tinker_json": lambda w: json.loads(json.dumps([w.entries(t) for t in range(T)])),
    "sampled_twice": lambda w: [[[x, i, None] for i, x in [w.entries(t)[0], *w.entries(t)]] for t in range(T)],
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_with_the_sampled_token_among_them(name: str, world: World) -> None:
    check(from_logprobs(FORMATS[name](world), world.target, k=K, vocab_size=V), world)


def test_sglang_gives_the_sampled_token_apart(world: World) -> None:
    top = [None, *[[[x, i, None] for i, x in world.entries(t, False)] for t in range(1, T)]]
    tokens = [[None, int(world.target[0]), None]]
    tokens += [[float(x), int(i), "b"] for x, i in zip(world.target_logp[1:], world.target[1:], strict=True)]
    got = from_logprobs(top, world.target, token_logprobs=tokens)
    check(got[1:], world, slice(1, None))
    assert got.ids[0].eq(-1).all() and got.logp[0].eq(-INF).all() and got.tail_logp[0] == 0 and got.target_logp[0].isnan()


def test_without_the_sampled_token_its_log_prob_is_unknown(world: World) -> None:
    got = from_logprobs([[[x, i] for i, x in world.entries(t, False)] for t in range(T)], world.target)
    check(got, world, target=False)
    assert got.target_logp.isnan().tolist() == [False, False, True, False, True, True]
    assert from_logprobs(world.prompt_logprobs()).target_logp is None


def test_all_that_came_is_kept_without_k(world: World) -> None:
    got = from_logprobs(world.prompt_logprobs(), world.target)
    assert got.ids.shape == (T, K + 1)
    assert (got.ids >= 0).sum(-1).tolist() == [K, K, K + 1, K, K + 1, K + 1]
    assert ((got.ids == world.target[:, None].to(got.ids)).sum(-1) == 1).all()
    want = torch.log1p(-torch.stack([torch.tensor([x for _, x in world.entries(t)]).exp().sum() for t in range(T)]))
    torch.testing.assert_close(got.tail_logp, want.to(got.tail_logp), rtol=1e-4, atol=0)


def test_tensors_of_k_plus_one_columns_with_fill(world: World) -> None:
    """TRL's server and vLLM's tensors: the sampled token first and perhaps again, −inf and id 0 where there is nothing."""
    ids = torch.cat([world.target[:, None], world.top.indices, torch.zeros(T, 2, dtype=torch.int64)], 1)
    logp = torch.cat([world.target_logp[:, None], world.top.values, torch.full((T, 2), -INF, dtype=torch.float64)], 1)
    shuffle = torch.randperm(K + 3, generator=torch.Generator("cpu").manual_seed(2))
    got = from_logprobs((ids[:, shuffle].int(), logp[:, shuffle].float()), world.target, k=K)
    check(got, world)
    check(from_logprobs((ids.numpy(), logp.numpy()), world.target.numpy(), k=K), world)
    batch = from_logprobs((ids.view(2, 3, -1), logp.view(2, 3, -1)), world.target.view(2, 3), k=K)
    check(rk.TopK._make(None if x is None else x.flatten(0, 1) for x in batch), world)


def test_nested_lists_and_tinkers_arrays(world: World) -> None:
    ids, logp = world.top.indices.tolist(), world.top.values.tolist()
    check(from_logprobs((ids, logp), vocab_size=V), world, target=False)
    batch = from_logprobs(([ids, ids], [logp, logp]))
    assert batch.ids.shape == (2, T, K)
    check(rk.TopK._make(None if x is None else x[1] for x in batch), world, target=False)
    fill = torch.zeros(T, 2, dtype=torch.int32), torch.full((T, 2), -99_999.0)  # of its dense matrices
    dense = [torch.cat([x.to(y.dtype), y], 1).numpy() for x, y in zip((world.top.indices, world.top.values), fill, strict=True)]
    got = from_logprobs((dense[0], dense[1]), k=K)
    assert torch.equal(got.ids.cpu().long(), world.top.indices)
    whole = from_logprobs([[(0, 0), (7, None)], [(0, 7)], [(3, -2)], [(-2, 3)]])  # of whole numbers the log-prob is not positive
    assert whole.ids.tolist() == [[0, -1], [7, -1], [3, -1], [3, -1]] and whole.logp[:, 0].tolist() == [0, 0, -2, -2]


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("batch", [False, True])
def test_an_answer_shifted_by_a_position_is_refused(world: World, shift: int, batch: bool) -> None:
    answer = world.prompt_logprobs()
    moved = [None, *answer[:-1]] if shift == 1 else [*answer[1:], None]
    served, target = ([moved, moved], torch.stack([world.target] * 2)) if batch else (moved, world.target)
    beside = "before" if shift == 1 else "after"
    with pytest.raises(
        ValueError, match=rf"from_logprobs: served is shifted by one .* hold the token {beside} their own.*cut both"
    ):
        from_logprobs(served, target)
    from_logprobs(moved)  # without a target nobody can tell
    repeated = torch.full((T,), 3)
    same = [{3: -0.1, 5: -3.0}] * T
    assert from_logprobs(same, repeated).target_logp is not None  # beside their own and their own


def test_a_whole_vocabulary_can_be_tempered(world: World) -> None:
    whole = [dict(enumerate(row)) for row in world.logp.tolist()]
    got = from_logprobs([None, *whole], [-100, *world.target.tolist()], k=K, vocab_size=V, at_temperature=0.5)
    want = (world.logp / 0.5).log_softmax(-1)
    torch.testing.assert_close(got.logp[1:].double(), want.topk(K).values, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.target_logp[1:].double(), want.gather(1, world.target[:, None])[:, 0], rtol=1e-6, atol=0)
    assert got.ids[0].eq(-1).all()
    for options, told in (({"vocab_size": V}, "got 5 of 40 tokens at"), ({}, "got vocab_size=None")):
        with pytest.raises(ValueError, match=rf"at_temperature needs each position's whole vocabulary.*{told}.*temperature 1"):
            from_logprobs(world.prompt_logprobs(), at_temperature=0.5, **options)
    with pytest.raises(ValueError, match="at_temperature must be positive and finite, or None, got 0"):
        from_logprobs(whole, vocab_size=V, at_temperature=0)


def test_a_bfloat16_cache_is_told_of_tolerance(world: World) -> None:
    kept = world.logp.topk(V).values.bfloat16()
    kept[:, 0] += 0.01
    served = (world.logp.topk(V).indices, kept)
    with pytest.raises(
        ValueError, match=r"more than 1 \+ tolerance 0.001; log-probs that were kept in bfloat16 want tolerance=0.02"
    ):
        from_logprobs(served)
    assert from_logprobs(served, tolerance=0.1).ids.shape == (T, V)


def test_real_id_0_survives_id_0_padding() -> None:
    ids, logp = torch.tensor([[3, 0, 0, 0]]), torch.tensor([[0.5, 0.25, 0, 0]]).log()
    got = from_logprobs((ids, logp), torch.tensor([0]))
    assert got.ids.tolist() == [[3, 0, -1, -1]]
    torch.testing.assert_close(got.target_logp, torch.tensor([0.25]).log())


def test_ragged_batch(world: World) -> None:
    rows = world.prompt_logprobs()
    served, want = [rows[:2], rows[2:6], [None]], [world.target[:2].tolist(), world.target[2:6].tolist(), [7]]
    got = from_logprobs(served, want, k=K)
    assert got.ids.shape == (3, 4, K)
    check(got[0, :2], world, slice(0, 2))
    check(got[1], world, slice(2, 6))
    ended = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert got.ids[ended].eq(-1).all() and got.tail_logp[ended].eq(0).all() and got.target_logp[ended].isnan().all()
    padded = torch.full((3, 5), -100)
    for b, x in enumerate(want):
        padded[b, : len(x)] = torch.tensor(x)
    wide = from_logprobs(served, padded, k=K)
    assert wide.ids.shape == (3, 5, K) and torch.equal(wide.ids[:, :4], got.ids) and wide.ids[:, 4].eq(-1).all()


@pytest.mark.parametrize("form", ("vllm_json", "vllm_chat", "sampled_twice"))
def test_a_batch_is_told_from_a_sequence(form: str, world: World) -> None:
    rows = FORMATS[form](world)
    got = from_logprobs([rows, rows], [world.target, world.target], k=K)
    assert got.ids.shape == (2, T, K)
    check(got[1], world)


def test_offset_ids(world: World) -> None:
    shifted = [{int(i) + 3: x for i, x in row.items()} for row in world.prompt_logprobs()]
    check(from_logprobs(shifted, world.target, k=K, offset=3, vocab_size=V), world)
    special = [{1: -0.5, 4: -1.0}]  # token 1 is the teacher's own
    with pytest.raises(ValueError, match=r"id 1 at \(0, 0\) less offset 3 is not in \[0, vocab_size=40\)"):
        from_logprobs(special, offset=3, vocab_size=V)
    got = from_logprobs(special, offset=3, vocab_size=V, out_of_range="tail")
    assert got.ids.tolist() == [[1, -1]]
    torch.testing.assert_close(got.tail_logp.exp(), torch.tensor([1 - math.exp(-1.0)]))


def test_clamped_and_absent_values() -> None:
    got = from_logprobs([{5: -9999.0, 2: -0.1, 9: None}], [5])
    assert got.ids.tolist() == [[2, -1, -1]] and got.target_logp.tolist() == [-INF]


def test_equal_log_probs_keep_the_lower_id() -> None:
    assert from_logprobs([{9: -1.5, 2: -1.5, 4: -1.5}], k=2).ids.tolist() == [[2, 4]]


def test_tail_where_the_mass_reaches_one() -> None:
    even = {i: -math.log(4) for i in range(4)}
    floor = from_logprobs([even, {0: 1e-7}, {0: -1e-30}])
    torch.testing.assert_close(floor.tail_logp, torch.full((3,), -23 * math.log(2)))
    assert floor.logp.max() <= 0
    assert from_logprobs([even], vocab_size=4).tail_logp.tolist() == [-INF]
    assert from_logprobs([{3: -1e-6}]).tail_logp.item() == pytest.approx(math.log(1e-6), rel=1e-6)


@pytest.mark.parametrize(
    "served, target, options, message",
    [
        ([{1: 0.3}], None, {}, r"log-prob 0.3 at \(0, 0\), wanted at most 0"),
        ([{1: math.nan}], None, {}, r"log-prob nan at \(0, 0\)"),
        ([{1: -0.1, 2: -0.1}], None, {}, r"probabilities at \(0,\) sum to 1.80967, more than 1"),
        ([[[-1.0, 7], [-2.0, 7]]], None, {}, r"id 7 at \(0,\) has log-probs -1 and -2"),
        ((torch.tensor([[4, 0, 0]]), torch.tensor([[-1.0, -2.0, 0.0]])), None, {}, "id 0 at .* padding must be −inf"),
        ([{50: -1.0}], None, {"vocab_size": 40}, r"id 50 at \(0, 0\).* is not in \[0, vocab_size=40\)"),
        ([{-7: -1.0}], None, {}, "id -7 at"),
        ([{"hello": -1.0}], None, {}, "key 'hello' can be a token's text.*return_tokens_as_token_ids"),
        ([{"7": -1.0}], None, {}, "key '7' can be a token's text"),
        ([{1: -1.0}], [1, 2], {}, r"target has shape \(2,\), served positions \(1,\)"),
        ([[{1: -1.0}], [{1: -1.0}, {1: -1.0}]], [[1], [1]], {}, r"served sequences have lengths \[1, 2\], target \[1, 1\]"),
        ([[{1: -1.0}], [None, None]], torch.tensor([[1, 2], [1, 2]]), {}, "served sequence 0 has 1 positions, target 2"),
        ({"prompt_logprobs": []}, None, {}, r"wanted a list with an element a position \(choice\['prompt_logprobs'\]"),
        ([3.5], None, {}, "a position must be None, a dict of ids or a list of entries, got 3.5"),
        ([{1: -1.0}], None, {"k": 0}, "k must be a positive int"),
        ([{1: -1.0}], None, {"out_of_range": "drop"}, "out_of_range must be one of"),
        ([{1: -1.0}], None, {"token_logprobs": [-1.0]}, "token_logprobs needs target"),
        ([{1: -1.0}], [1], {"token_logprobs": [[-1.0, 4, None]]}, r"token_logprobs scores id 4 at \(0, 0\), target is 1"),
        ([{1: -1.0}], [1], {"token_logprobs": [-2.0]}, r"has -2 in token_logprobs and -1 among the top ones"),
        ([{1: -1.0}], [1], {"token_logprobs": [-2.0, -1.0]}, r"token_logprobs has lengths \[2\], wanted \[1\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), None, {}, "ids must be integers"),
        (([[1, 2], [3]], [[-1.0, -2.0], [-1.0]]), None, {}, r"\(ids, logprobs\) as lists must be as long everywhere"),
        ((torch.zeros(2, 3).long(), torch.zeros(2, 4)), None, {}, r"ids have shape \(2, 3\), logprobs \(2, 4\)"),
    ],
)  # fmt: skip
def test_bad_ones_are_refused(served: Any, target: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"from_logprobs: .*{message}"):
        from_logprobs(served, target, **options)


def test_a_served_teacher_trains_as_a_local_one_does() -> None:
    """The same loss and gradient as with linear_topk of the same teacher; the token that the server left out counts as invalid."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(V, 8)
    head, target = rk.LMHead(weight), torch.randint(V, (4,))
    local = rk.linear_topk(torch.randn(4, 8), head, K, target=target)
    rows = zip(local.ids.tolist(), local.logp.tolist(), target.tolist(), local.target_logp.tolist(), strict=True)
    served = [{**dict(zip(i, x, strict=True)), token: y} for i, x, token, y in rows]
    del served[3][int(target[3])]
    teacher = from_logprobs(served, target, k=K, device=hidden.device)
    known = ~teacher.target_logp.isnan()
    assert known.tolist() == [True, True, True, False]
    if int(target[3]) not in local.ids[3].tolist():
        assert torch.equal(teacher.ids, local.ids)
    rlad = rk.losses.RLAD(topk=rk.losses.TopKKL(normalize="tail"), topk_coef=0.5, reduction="token-mean")
    given = {"old_logp": torch.randn(4) - 3, "advantages": torch.randn(4)}
    losses = [rk.linear_loss(hidden, head, target, rlad, mask=known, teacher=x, **given).loss for x in (local, teacher)]
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    whole = rk.linear_loss(hidden, head, target, rlad, teacher=teacher, **given)
    assert whole.loss.isfinite() and whole.metrics["invalid_teacher"].item() == pytest.approx(0.25)


def test_two_positions_in_a_tuple_are_no_pair_of_ids_and_log_probs() -> None:
    for pair in (({3: -0.5}, {4: -1.0}), ({3: -0.5}, []), ([], {3: -0.5}), (None, {3: -0.5})):
        found, want = (from_logprobs(kind(pair), [3, 4]) for kind in (tuple, list))
        assert torch.equal(found.ids, want.ids) and torch.equal(found.logp, want.logp)
