"""What from_model finds by asking a model: maps that a head can have, and models that have none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlad_kernels import LMHead
from tests.toy import D, Map, Toy, V, agrees, capped

CAN: dict[str, tuple[dict[str, Map], tuple[float, float | None, int]]] = {  # what it does, and (scale, softcap, columns)
    "nothing": ({}, (1.0, None, V)),
    "scale": ({"after": lambda z: z * 0.3}, (0.3, None, V)),
    "divide": ({"after": lambda z: z / 8}, (0.125, None, V)),
    "in_place": ({"after": lambda z: z.mul_(4)}, (4.0, None, V)),
    "negative": ({"after": lambda z: -z}, (-1.0, None, V)),
    "cap": ({"after": capped(30.0)}, (1.0, 30.0, V)),
    "small_cap": ({"after": capped(0.7)}, (1.0, 0.7, V)),
    "large_cap": ({"after": capped(5000.0)}, (1.0, 5000.0, V)),
    "cap_and_scale": ({"after": capped(15.0, 0.2)}, (0.2, 15.0, V)),
    "cap_and_negative_scale": ({"after": capped(15.0, -3.0)}, (-3.0, 15.0, V)),
    "in_place_cap": ({"after": lambda z: z.div_(3).tanh_().mul_(3)}, (1.0, 3.0, V)),
    "factor": ({"before": lambda h: h / 24}, (1 / 24, None, V)),
    "factor_in_place": ({"before": lambda h: h.mul_(2)}, (2.0, None, V)),
    "factor_scale_and_cap": ({"before": lambda h: h * 2, "after": capped(15.0, 0.2)}, (0.4, 15.0, V)),
    "cut": ({"after": lambda z: z[..., :50]}, (1.0, None, 50)),
    "cut_and_cap": ({"after": lambda z: capped(9.0)(z[..., :50].float())}, (1.0, 9.0, 50)),
}


@pytest.mark.parametrize("case", CAN)
def test_a_map_that_a_head_can_have_is_found(case: str):
    does, (scale, softcap, columns) = CAN[case]
    model = Toy(**does).eval()
    head = LMHead.from_model(model)
    assert head.logit_scale == pytest.approx(scale, rel=1e-7)
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=2e-5 if softcap > 1000 else 1e-7))
    assert head.vocab_size == columns
    assert head.weight is model.head.weight
    agrees(model, head)


def at(column: int, change: Map) -> Map:
    return lambda z: torch.cat([z[..., :column], change(z[..., column : column + 1]), z[..., column + 1 :]], -1)


def swapped(z: Tensor) -> Tensor:
    order = torch.arange(z.shape[-1], device=z.device)
    order[[7, 8]] = order[[8, 7]]
    return z[..., order]


AFTER: dict[str, Map] = {
    "one_id_never": at(11, lambda z: z * 0 + torch.finfo(z.dtype).min),
    "one_id_minus_infinity": at(0, lambda z: z - torch.inf),
    "one_id_shifted": at(60, lambda z: z + 0.01),
    "two_ids_swapped": swapped,
    "reversed": lambda z: z.flip(-1),
    "clamped": lambda z: z.clamp(-900, 900),
    "relu": torch.relu,
    "another_cap": lambda z: 30 * z / (30 + z.abs()),
    "normalised": lambda z: z.log_softmax(-1),
    "constant": lambda z: z * 0,
    "not_a_number": lambda z: z * torch.nan,
    "more_ids": lambda z: torch.cat([z, z], -1),
    "the_last_token_only": lambda z: z[:, -1:],
    "a_layer": lambda z: z.cumsum(-1),
}
BEFORE: dict[str, Map] = {
    "norm": lambda h: F.rms_norm(h, (D,)),
    "bias": lambda h: h + 0.01,
    "permutation": lambda h: h.flip(-1),
    "cap": lambda h: 10 * torch.tanh(h / 10),
    "the_token_before": lambda h: h.roll(1, 1),
    "nothing_left": lambda h: h * 0,
    "one_token": lambda h: h[:, -1:],
}


@pytest.mark.parametrize("case", AFTER)
def test_logits_that_no_head_makes_are_refused(case: str):
    with pytest.raises(ValueError, match=r"^LMHead.from_model: Toy makes .* by hand, LMHead\(weight, bias, .*docs/wiring.md"):
        LMHead.from_model(Toy(after=AFTER[case]))


@pytest.mark.parametrize("case", BEFORE)
def test_hidden_states_that_are_not_the_heads_are_refused(case: str):
    with pytest.raises(ValueError, match=r"^LMHead.from_model: Toy (has a layer between|gives its head other).*docs/wiring.md"):
        LMHead.from_model(Toy(before=BEFORE[case]))


class Twice(Toy):
    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids) if self.head(torch.ones(4, D)) is not None else None


class Functional(Toy):
    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=F.linear(self.base_model(input_ids).last_hidden_state, self.head.weight))


class Pixels(Toy):
    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Any:
        return super().forward(input_ids)


class Nothing(Toy):
    def forward(self, input_ids: Tensor) -> Any:
        super().forward(input_ids)


class Other(Toy):
    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.base_model.embedding(input_ids)))


@pytest.mark.parametrize(
    "kind, why",
    [
        (Twice, "its head more than once"), (Functional, "does not call its head"), (Pixels, "TypeError.*pixel_values"),
        (Nothing, "does not call its head .* for its logits"), (Other, "the last hidden state of its backbone"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_asked_is_refused(kind: type[Toy], why: str):
    with pytest.raises(ValueError, match=f"^LMHead.from_model: {kind.__name__} .*{why}.*docs/wiring.md"):
        LMHead.from_model(kind())


def test_a_tuple_and_a_bare_tensor_are_logits_too():
    class Tuple(Toy):
        def forward(self, input_ids: Tensor) -> Any:
            return (super().forward(input_ids).logits, None)

    class Bare(Toy):
        def forward(self, input_ids: Tensor) -> Any:
            return super().forward(input_ids).logits

    for kind in (Tuple, Bare):
        assert LMHead.from_model(kind(after=capped(3.0))).softcap == 3.0
