"""Heads whose rows lie on several ranks: every op and method equals one rank's, and says no more than docs/scale.md allows."""

from __future__ import annotations

import pytest

from tests.ranks import on_ranks
from tests.sharded import CUTS, work


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("world", CUTS)
def test_ranks_together_are_one(world: int) -> None:
    on_ranks(work, world)
