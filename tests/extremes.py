"""Log-probs up to 200 nats apart, and how losses of them are held to float64.

e^200 is beyond float32: where the formula's own value or gradient is, ours is inf.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

GAPS = (-200.0, -50.0, 0.0, 50.0, 200.0)
SIGNS = (-1.5, 0.0, 2.0)
S = -256.0  # sums and differences of these are exact in float32


def hold(got: Tensor, want: Tensor, scale: float | Tensor = 1.0) -> None:
    """float32 against float64, elementwise: e^x for |x| ≤ 500 and a handful of products, relative; inf where float32 ends.

    ``scale``: the terms that a value is the sum of, where they are larger than it.
    """
    assert not got.isnan().any()
    got, want = got.detach().cpu().double().flatten(), want.detach().cpu().flatten()
    largest = torch.finfo(torch.float32).max
    beyond = want.abs() > largest
    assert torch.equal(got[beyond], want[beyond].sign() * torch.inf)
    error = (got - want)[~beyond].abs()
    bound = torch.finfo(torch.float32).eps * (512 * want.abs() + 8 * torch.as_tensor(scale, device="cpu").flatten())[~beyond]
    assert (error <= bound).all(), f"{got[~beyond][error > bound]} for {want[~beyond][error > bound]}"


def exact(loss: Callable[[Tensor, int], Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of each token's ``loss(log-prob (1, 1), its number)``, alone and in float64."""
    found = []
    for i, x in enumerate(s.detach().double().cpu()):
        leaf = x[None].requires_grad_()
        with torch.device("cpu"):
            value = loss(leaf, i)
        found.append((value.detach(), torch.autograd.grad(value, leaf)[0].squeeze()))
    values, slopes = zip(*found, strict=True)
    return torch.stack(values), torch.stack(slopes)


def tokens(*choices: tuple[float, ...]) -> tuple[Tensor, list[Tensor]]:
    """Log-probs that want a gradient, and every combination of the choices, each a sequence ``(1,)`` of its own."""
    columns = torch.tensor(list(itertools.product(*choices))).unsqueeze(2)
    return torch.full_like(columns[:, 0], S).requires_grad_(), list(columns.unbind(1))
