"""Large scratch memory asks for huge pages, except where a virtual machine gives free ones back to its host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")
pytestmark = pytest.mark.cpu


def flags(address: int) -> set[str]:
    """What the kernel was told of the mapping that this address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return set(rest.split())
    raise AssertionError(f"no mapping has {address:#x}")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with huge pages")
def test_huge_pages_are_asked_for_unless_free_ones_are_reported() -> None:
    x = torch.empty(64 << 20, dtype=torch.uint8)
    before = "hg" in flags(x.data_ptr() + (32 << 20))
    torch.ops.rlad.huge_pages_(x)
    reported = REPORTING.exists() and 0 <= int(REPORTING.read_text()) <= 9
    assert ("hg" in flags(x.data_ptr() + (32 << 20))) == (before or not reported)
    small = torch.zeros(3)
    torch.ops.rlad.huge_pages_(small)
    assert not small.any()
