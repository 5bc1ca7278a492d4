"""Data parallelism with a reduction over all ranks equals one process on the whole batch, also where a rank has no token."""

from __future__ import annotations

import pytest

from tests.data_parallel import work
from tests.ranks import on_ranks


@pytest.mark.cpu
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_average_to_one_process(world: int) -> None:
    on_ranks(work, world)
