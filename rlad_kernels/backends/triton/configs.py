"""Launch configurations: one frozen table per kernel, looked up by the size that decides. Nothing is tuned at run time."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from types import MappingProxyType


@dataclass(frozen=True)
class Config:
    """One row of a table: it serves sizes up to `limit`."""

    limit: float
    num_warps: int
    num_stages: int
    blocks: tuple[tuple[str, int], ...]


def _row(limit: float, num_warps: int, num_stages: int = 1, **blocks: int) -> Config:
    return Config(limit, num_warps, num_stages, tuple(blocks.items()))


ROW_BLOCK = 128  # rows that share a column maximum

# num_stages is 1 but for score_kernel: no other kernel feeds a dot, so there is nothing for the software pipeliner to
# overlap; enough programs per SM are resident to hide the latency instead.
TABLES = MappingProxyType(
    {
        # size: columns of the tile. Up to five running values a lane: with 4 lanes a thread (one 16-byte load) every flag
        # combination stays under 64 registers, so that four or more programs an SM cover the latency of HBM; with 8, the
        # richest ones sit on ptxas's occupancy steps (64, 80) and spill on one architecture or another.
        "fold_kernel": (
            _row(512, 4, BLOCK=512, BLOCK_J=128),  # small vocabularies: half the threads idle in a wider block
            _row(inf, 8, BLOCK=1024, BLOCK_J=256),
        ),
        # size: K. A block is BLOCK_K lanes of state and BLOCK − BLOCK_K columns, 8 lanes a thread: they stay in registers
        # during the search for the threshold. Each step of the search is a barrier, cheap among 4 warps; four programs an
        # SM overlap theirs.
        "fold_topk_kernel": (
            _row(32, 4, BLOCK=1024, BLOCK_K=32),  # answers of servers: K ≤ 20
            _row(128, 4, BLOCK=1024, BLOCK_K=128),  # distillation supports
            _row(1024, 16, BLOCK=4096, BLOCK_K=1024),
        ),
        # size: columns. No running values, so 16 columns a thread: four loads in flight and 16-byte stores of bf16. With 8,
        # ptxas for sm_100 spills two values to stay within 32 registers; in 8 warps, the one for sm_80 to stay within 64.
        "dlogits_kernel": (
            _row(1024, 2, BLOCK=1024, BLOCK_J=64),
            _row(inf, 4, BLOCK=2048, BLOCK_J=128),
        ),
        # size: columns. 4 columns a thread: the mixtures' and the αβ family's temporaries then fit into 66 to 84 registers; in
        # 8 warps ptxas stops at 64 and spills. Five or more programs an SM cover the latency.
        "divergence_kernel": (_row(inf, 4, BLOCK=512),),
        # size: columns. A program walks down a block of rows; the sums of 2 columns a thread are all it keeps, and each row's
        # loads are independent of the last's, so short blocks of columns give the chip enough programs.
        "column_stats_kernel": (_row(inf, 4, BLOCK=512),),
        # size: D. Rows of W are far apart, so a program keeps BLOCK_K of them in flight; 512 columns of bf16 are one
        # 16-byte load for each of 2 warps' lanes.
        "gather_dot_kernel": (
            _row(512, 4, BLOCK_K=8, BLOCK_D=256),
            _row(inf, 4, BLOCK_K=4, BLOCK_D=1024),
        ),
        "gather_dhidden_kernel": (
            _row(512, 4, BLOCK_K=8, BLOCK_D=256),
            _row(inf, 4, BLOCK_K=8, BLOCK_D=512),
        ),
        # Most programs leave at once (they do not start a run), so wide D blocks: fewer programs to launch.
        "gather_dweight_kernel": (
            _row(512, 4, BLOCK_P=8, BLOCK_D=256),
            _row(inf, 4, BLOCK_P=4, BLOCK_D=1024),
        ),
        # size: 10 × compute capability for the 16-bit types, 0 for float32, whose products run on no tensor core. One program
        # an SM. Hopper's and Blackwell's tiles need the fewest bytes of L2 a product; in 4 stretches the epilogue of 128
        # accumulators a thread stays under 255 registers with every flag, in 2 it spills, and so it does with BLOCK_J ≥ 4.
        # float32: one stretch, BLOCK_D = 32 or BLOCK_J = 4, and ptxas stops at 128 registers and spills the rest.
        # Ampere: 3 × 32 KiB of its 163 KiB in flight. Unmeasured, like everything here: see FUSED_SCORING.
        "score_kernel": (
            _row(0, 8, 2, BLOCK_N=ROW_BLOCK, BLOCK_V=64, BLOCK_D=16, TMA=0, PARTS=2, BLOCK_J=2, GROUP=16),
            _row(89, 8, 4, BLOCK_N=ROW_BLOCK, BLOCK_V=128, BLOCK_D=64, TMA=0, PARTS=2, BLOCK_J=4, GROUP=16),
            _row(inf, 8, 4, BLOCK_N=ROW_BLOCK, BLOCK_V=256, BLOCK_D=64, TMA=1, PARTS=4, BLOCK_J=2, GROUP=16),
        ),
        # size: N. A few thousand tokens: one a thread, so that even small batches reach every SM.
        "clipped_ratio_kernel": (_row(inf, 4, BLOCK=128),),
        # size: K. One row of slots per program; a warp handles the usual supports alone, without barriers. BLOCK_E
        # earlier ids are compared at a time: BLOCK_K × BLOCK_E comparisons must fit in registers.
        "topk_kl_kernel": (
            _row(32, 1, BLOCK_K=32, BLOCK_E=16),
            _row(128, 1, BLOCK_K=128, BLOCK_E=8),
            _row(1024, 8, BLOCK_K=1024, BLOCK_E=8),
        ),
    }
)

# (10 × compute capability, bytes per element) → rows from which linear_logp takes score_kernel instead of cuBLAS's product
# and fold_kernel. An entry needs a measurement on that chip. None has been taken, so no call takes the kernel by itself;
# `settings.fused_scoring = True` does, for benches and tests.
FUSED_SCORING: Mapping[tuple[int, int], int] = MappingProxyType({})


def pick(kernel: str, size: int) -> Config:
    """The first row of the kernel's table that serves `size`."""
    for config in TABLES[kernel]:
        if size <= config.limit:
            return config
    raise ValueError(f"{kernel}: no launch configuration for size {size}, the largest is {TABLES[kernel][-1].limit}")
