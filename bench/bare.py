"""The unit of time: the three bare products of a loss, by torch.mm, in row chunks of at most 1 GiB."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.inputs import Inputs


def bare_products(x: Inputs) -> list[Callable[[], None]]:
    """h @ W.T, g @ W and g.T @ h into buffers that exist before the clock starts."""
    h, w = x.hidden.detach(), x.weight.detach()
    (n, _), v = h.shape, w.shape[0]
    rows = min(n, max(1, (1 << 30) // (v * h.element_size())))
    g, dh, dw = h.new_zeros(rows, v), torch.zeros_like(h), torch.zeros_like(w)
    chunks = [slice(r, min(r + rows, n)) for r in range(0, n, rows)]

    def forward() -> None:
        for c in chunks:
            torch.mm(h[c], w.T, out=g[: c.stop - c.start])

    def to_hidden() -> None:
        for c in chunks:
            torch.mm(g[: c.stop - c.start], w, out=dh[c])

    def to_weight() -> None:
        for c in chunks:
            torch.mm(g[: c.stop - c.start].T, h[c], out=dw)

    return [forward, to_hidden, to_weight]
