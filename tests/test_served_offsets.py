"""from_logprobs with ids that are off by a constant: student id = served id − offset, and −1 is an empty slot before that."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.integrations.served import from_logprobs

V = 40
OFFSETS = (-2, 0, 1, 3)


def served(offset: int, *rows: list[tuple[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors of student ids as a server has them; −1 stays −1."""
    ids = torch.tensor([[i + offset if i >= 0 else -1 for i, _ in row] for row in rows])
    return ids, torch.tensor([[x for _, x in row] for row in rows])


def probabilities(got: rk.TopK) -> list[dict[int, float]]:
    rows = zip(got.ids.tolist(), got.logp.tolist(), strict=True)
    return [{i: pytest.approx(x, abs=1e-6) for i, x in zip(*row, strict=True) if i >= 0} for row in rows]


@pytest.mark.parametrize("fill", [0.0, -1.0, -math.inf, -9999.0, math.nan, 3.0])
@pytest.mark.parametrize("offset", OFFSETS)
def test_an_empty_slot_is_minus_one_as_served_whatever_its_value(offset: int, fill: float) -> None:
    pair = served(offset, [(5, -0.7), (-1, fill), (9, -1.5)], [(-1, fill), (-1, fill), (0, -0.2)])
    for vocab_size in (None, V):
        got = from_logprobs(pair, [5, 1], offset=offset, vocab_size=vocab_size)
        assert probabilities(got) == [{5: -0.7, 9: -1.5}, {0: -0.2}]
        assert got.ids[:, -1].tolist() == [-1, -1] and got.logp[:, -1].tolist() == [-math.inf] * 2
        want = [math.log(1 - math.exp(-0.7) - math.exp(-1.5)), math.log(1 - math.exp(-0.2))]
        assert got.tail_logp.tolist() == pytest.approx(want, rel=1e-5)
        assert got.target_logp[0].item() == pytest.approx(-0.7, rel=1e-6) and got.target_logp[1].isnan()


@pytest.mark.parametrize("offset", OFFSETS[2:])
def test_the_teachers_own_token_below_the_offset_is_no_empty_slot(offset: int) -> None:
    """It is the one that would be −1 after the subtraction."""
    own = (torch.tensor([[offset - 1, offset + 4]]), torch.tensor([[-0.5, -1.0]]))
    with pytest.raises(ValueError, match=rf"id {offset - 1} at \(0, 0\) less offset {offset} is not in \[0, vocab_size=40\)"):
        from_logprobs(own, offset=offset, vocab_size=V)
    got = from_logprobs(own, offset=offset, vocab_size=V, out_of_range="tail")
    assert probabilities(got) == [{4: -1.0}]
    assert got.tail_logp.item() == pytest.approx(math.log(1 - math.exp(-1)), rel=1e-5)


@pytest.mark.parametrize("offset", OFFSETS)
def test_ids_beyond_either_end_of_the_vocabulary_go_to_the_tail(offset: int) -> None:
    ids, logp = torch.tensor([[offset - 3, offset + V, offset + V - 1, -1]]), torch.tensor([[-1.0, -2.0, -1.5, 0.0]])
    ids = torch.where(ids == -1, torch.tensor([[-1, 7 + V, -1, -1]]), ids)  # an id of the teacher's own that is −1 itself
    got = from_logprobs((ids, logp), [V - 1], offset=offset, vocab_size=V, out_of_range="tail")
    assert probabilities(got) == [{V - 1: -1.5}]
    assert got.tail_logp.item() == pytest.approx(math.log(1 - math.exp(-1.5)), rel=1e-5)
    assert got.target_logp.item() == pytest.approx(-1.5)


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_targets_log_prob_is_looked_up_by_the_students_id(offset: int) -> None:
    """Also outside the K that are kept, ruled out by the server, or unknown: an empty slot rules nothing out."""
    rows = [[(3, -0.5), (8, -1.5), (2, -3.0), (-1, -math.inf)]] * 4
    rows[2] = [(3, -0.5), (8, -1.5), (6, -9999.0), (-1, -math.inf)]
    unknown = max(-1 - offset, 12)  # with a negative offset the id that an empty slot would have after the subtraction
    pair = served(offset, *rows)
    got = from_logprobs(pair, [8, 2, 6, unknown], offset=offset, vocab_size=V, k=1)
    assert got.ids.tolist() == [[3]] * 4
    assert got.target_logp[:3].tolist() == [pytest.approx(-1.5), pytest.approx(-3.0), -math.inf]
    assert got.target_logp[3].isnan()


@pytest.mark.parametrize("offset", [-13, -2, -1])
def test_an_empty_slot_rules_no_target_out(offset: int) -> None:
    """Short rows are padded with id −1 at −∞: with a negative offset that must not become a student's id."""
    target = -1 - offset
    got = from_logprobs([{20 + offset: -0.5}, {21 + offset: -0.5, 22 + offset: -2.0}], [target, target], offset=offset)
    assert got.target_logp.isnan().all()
    assert got.ids.tolist() == [[20, -1], [21, 22]]


@pytest.mark.parametrize("offset", OFFSETS)
def test_every_other_argument_with_an_offset(offset: int) -> None:
    sampled = [[-1.5, 8 + offset, None], [None, 3 + offset, None], [-4.0, 30 + offset, "x"]]
    rows = [[[-0.5, 3 + offset], [-1.5, 8 + offset], [-1.5, 8 + offset]], None, [[-0.5, 3 + offset], [-1.0, 4 + offset]]]
    got = from_logprobs(rows, [8, 3, 30], token_logprobs=sampled, offset=offset, vocab_size=V, k=3)
    assert probabilities(got) == [{3: -0.5, 8: -1.5}, {}, {3: -0.5, 4: -1.0}]
    assert got.target_logp[[0, 2]].tolist() == pytest.approx([-1.5, -4.0]) and got.target_logp[1].isnan()
    for other in (7, 9):
        wanted = rf"token_logprobs scores id {8 + offset} at \(0, 0\), target is {other} \+ offset {offset}"
        with pytest.raises(ValueError, match=wanted):
            from_logprobs(rows, [other, 3, 30], token_logprobs=sampled, offset=offset)
    whole = {i + offset: -math.log(4) for i in range(4)}
    if offset >= 0:  # a mapping cannot name −1, which is an empty slot
        assert from_logprobs([whole], offset=offset, vocab_size=4).tail_logp.item() == -math.inf
    equal = from_logprobs([{9 + offset: -1.5, 2 + offset: -1.5, 4 + offset: -1.5}], offset=offset, k=2)
    assert equal.ids.tolist() == [[2, 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive int or None, got 0"),
        ({"k": 2.0}, "k must be a positive int or None, got 2.0"),
        ({"offset": 0.5}, "offset must be an int, got 0.5"),
        ({"tolerance": -1e-3}, "tolerance must be at least 0, got -0.001"),
        ({"target": [1.5]}, "target must be integers, got torch.float32"),
        ({"target": torch.tensor([True])}, "target must be integers, got torch.bool"),
    ],
)
def test_options_and_targets_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^from_logprobs: {message}"):
        from_logprobs([{1: -1.0}], **options)
    with pytest.raises(ValueError, match=r"^from_logprobs: target must be integers"):
        from_logprobs([[{1: -1.0}], [{1: -1.0}]], [[1], [1.5]])
