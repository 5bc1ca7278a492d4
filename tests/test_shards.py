"""Heads whose rows lie on several ranks: every op and method equals one rank's, and says no more than docs/scale.md allows."""

from __future__ import annotations

import time

import pytest
import torch

from tests.conftest import DEVICE
from tests.ranks import SECONDS, on_ranks
from tests.sharded import CUTS, killed, work


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("world", CUTS)
def test_ranks_together_are_one(world: int) -> None:
    on_ranks(work, world)


@pytest.mark.parametrize("world", CUTS)
def test_gpus_together_are_one(world: int) -> None:
    if DEVICE == "cpu" or torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    on_ranks(work, world, "nccl")


@pytest.mark.cpu
def test_a_rank_that_dies_is_an_error_on_the_others() -> None:
    began = time.monotonic()
    on_ranks(killed, 3)
    assert time.monotonic() - began < SECONDS
