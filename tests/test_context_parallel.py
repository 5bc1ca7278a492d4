"""Slices of sequences on several ranks equal one process: labels across the cut, reductions, losses that read whole sequences."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import rlad_kernels as rk
from tests.context_parallel import work
from tests.ranks import on_ranks

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("world", [3, 4])  # four: two for the data times two for the context
def test_ranks_with_slices_are_one_process(world: int) -> None:
    on_ranks(work, world)


def test_what_is_no_context_is_refused() -> None:
    logp, ids = torch.zeros(2, 3), torch.zeros(2, 3).long()
    given = {"old_logp": logp, "advantages": logp}
    with pytest.raises(ValueError, match=r"context must be a torch.distributed.ProcessGroup, for tokens \(B, T\), got str"):
        rk.losses.GRPO()(logp, reduction=rk.Reduction(context="cp"), **given)  # type: ignore[arg-type]
    group = dist.ProcessGroup(0, 1)
    with pytest.raises(ValueError, match=r"context must be .* for tokens \(B, T\), got packed tokens"):
        rk.losses.GRPO()(logp, reduction=rk.Reduction(seq_ids=ids, context=group), **given)
