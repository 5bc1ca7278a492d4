"""A small causal LM with anything before its head and after it, for the tests of what from_model finds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlad_kernels import LMHead

V, D = 70, 24
Map = Callable[[Tensor], Tensor]


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.dropout = nn.Embedding(V, D), nn.Linear(D, D), nn.Dropout(0.5)
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.cache, self.length = self.cache + 1, input_ids.shape[1]  # what some forwards keep
        return SimpleNamespace(last_hidden_state=self.layer(self.dropout(self.embedding(input_ids))))


class Toy(nn.Module):
    """A causal LM with something before its head and something after it."""

    def __init__(self, before: Map = lambda h: h, after: Map = lambda z: z, *, head: nn.Module | None = None) -> None:
        super().__init__()
        self.base_model, self.head = Backbone(), nn.Linear(D, V, bias=False) if head is None else head
        self.before, self.after, self.asked = before, after, [0]
        self.config = SimpleNamespace(cap=1.0, pad_token_id=3)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Any:
        self.asked[0] += not self.training
        return SimpleNamespace(logits=self.after(self.head(self.before(self.base_model(input_ids).last_hidden_state))))


def capped(cap: float, scale: float = 1.0) -> Map:
    return lambda z: cap * torch.tanh(scale * z / cap)


def logits_of(head: LMHead, hidden: Tensor) -> Tensor:
    z = head.logit_scale * F.linear(hidden, head.weight, head.bias)
    return (z if head.softcap is None else capped(head.softcap)(z))[..., : head.vocab_size]


def agrees(model: Any, head: LMHead, tolerance: float = 4e-6) -> None:
    """Logits of large hidden states, as the model makes them and as the head does."""
    ids = torch.arange(V).unsqueeze(0)
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state * 40
        model.base_model.forward, was = (
            lambda input_ids: SimpleNamespace(last_hidden_state=hidden.clone()),
            model.base_model.forward,
        )
        want, found = model(ids).logits, logits_of(head, hidden)
        model.base_model.forward = was
    assert want.shape == found.shape
    assert (found - want).abs().max() <= tolerance * want.abs().max()
