"""One call's operands and its loop over tiles: matrix product of a tile, then one row pass of the backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlad_kernels.backends.contract import INTERPRET, has_bf16_mm
from rlad_kernels.core.config import settings
from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.engine.shards import Shard
from rlad_kernels.engine.statistics import Stats

# Rows and columns of one tile of logits. On CPU, products of this size run at full speed and the row pass finds part of the
# tile in cache; on CUDA, tiles must be large enough for cuBLAS to fill the chip.
_TILE = {"cpu": (1024, 4096), "cuda": (4096, 16384)}
# The float32 d_weight, or weight, of a tile's columns, where the weight itself is of a narrower dtype.
_SLAB_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# Some paths keep whole rows of logits; each chunk of rows reads and writes all of d_weight, hence the floor.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2048 << 20}
_CHUNK_ROWS_MIN = 512
# Without that cost, where the memory is lent, the floor is lower: for CUDA a chunk's d_hidden still has a tile for each SM.
_LENT_ROWS_MIN = {"cpu": 256, "cuda": 1024}
# cuBLAS takes its fast kernels where rows start at multiples of 128 bytes and tiles end with its own: at 18,994 columns of
# bfloat16 a product took three times as long.
_ALIGNED = 64  # elements of a scratch row
_WHOLE = {"cpu": 1, "cuda": 128}  # rows and columns of a tile are multiples of it


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty`` for memory that is large and written once: on CPU with huge pages."""
    x = like.new_empty(shape, dtype=dtype)
    if x.device.type == "cpu" and not INTERPRET:
        torch.ops.rlad.huge_pages_(x)
    return x


def dlogits_wait(n: int, width: int, dtype: torch.dtype) -> bool:
    """Whether n rows' dlogits in this dtype take no more memory than a float32 d_weight of this width."""
    return dtype == torch.bfloat16 and n * 2 <= width * 4  # float16 has a scale for each chunk


def tile_sizes(
    device: str, n: int, vocab: int, *, itemsize: int = 4, keep_logits: int = 0, multiple: int = 1, slab: int = 0, lent: int = 0
) -> tuple[int, int]:
    """Rows and columns of a tile, of about one area: few rows get wide columns, and a small call is one tile.

    With ``keep_logits`` a chunk's rows, whose logits are all held, in so many buffers; ``lent`` is memory for them, so many bytes
    a column, into which they are made to fit unless it is too little. ``slab`` is the width of what is held in the accumulation
    dtype for a tile's columns: their d_weight, or their weight.
    """
    rows, cols = _TILE[device]
    area = rows * cols
    if keep_logits:
        rows = max(_CHUNK_BYTES[device] // (itemsize * vocab * keep_logits), _CHUNK_ROWS_MIN)
        fit = lent * vocab // (itemsize * keep_logits * round_up(vocab, _ALIGNED)) // _WHOLE[device] * _WHOLE[device]
        rows = min(rows, fit) if fit >= _LENT_ROWS_MIN[device] else rows
    rows = min(round_up(round_up(settings.tile_rows or rows, multiple), _WHOLE[device]), max(n, 1))
    widest = _SLAB_BYTES[device] // (itemsize * slab) if slab else vocab
    cols = settings.tile_cols or max(cols, min(area // rows, widest))
    return rows, min(round_up(cols, _WHOLE[device]), vocab)


def slab_columns(device: str, width: int, itemsize: int) -> int:
    """Columns whose d_weight is made at once where all rows' dlogits are there: a slab that stays in cache until it is cast."""
    return round_up(settings.tile_cols or max(_SLAB_BYTES[device] // 8 // (itemsize * width), 1), _WHOLE[device])


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def scratch(memory: Tensor, rows: int, cols: int) -> Tensor:
    """``memory`` as ``(rows, cols)``, each row at a multiple of 64 elements."""
    return memory.as_strided((rows, cols), (round_up(cols, _ALIGNED), 1))


def scratch_size(rows: int, cols: int) -> int:
    """Elements of memory for :func:`scratch`."""
    return rows * round_up(cols, _ALIGNED)


def new_scratch(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """:func:`scratch` in memory of its own."""
    rows, cols = shape
    return scratch(like.new_empty(scratch_size(rows, cols), dtype=dtype), rows, cols)


class Tiles:
    """Hidden rows, head and tile sizes of one call; every product it makes has an accumulation-dtype result.

    ``keep_logits`` sizes chunks for callers that hold all logits of their rows, in so many buffers of one budget together, a
    ``multiple`` of rows at a time; ``slab`` bounds a tile's columns for callers that hold their d_weight. ``whole`` is for those
    that hold all of it: where :func:`dlogits_wait`, :attr:`waits` is true, and chunks fit into its memory.

    With a ``group`` the weight is this rank's part of the head, from row ``first``: ``vocab`` counts its columns, ``total`` all.

    On CUDA low-precision operands go to cuBLAS as they are, with float32 results; on a CPU with bfloat16 instructions,
    bfloat16 ones to ``bf16_mm_``. Otherwise a tile of the weight is widened first: bfloat16 products are exact in float32.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inv_temp: Tensor,
        logit_scale: float,
        softcap: float,
        vocab_size: int,
        first: int = 0,
        group: str = "",
        *,
        keep_logits: int = 0,
        multiple: int = 1,
        slab: bool = False,
        whole: bool = False,
    ) -> None:
        self.acc = acc_dtype(hidden.dtype)
        self.bf16_mm = hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu" and has_bf16_mm()
        self.native = hidden.is_cuda or self.bf16_mm
        self.rounds_once = hidden.is_cuda  # cuBLAS sums in float32 what it then rounds to 16 bits
        self.hidden = hidden if self.native else hidden.to(self.acc)
        self.shard = Shard(weight, vocab_size, first, group)
        self.total, self.vocab = vocab_size, self.shard.columns
        self.weight = weight[: self.vocab]
        self.bias = None if bias is None else bias[: self.vocab].to(self.acc)
        self.inv_temp = inv_temp.to(self.acc).expand(hidden.shape[0]).contiguous()
        self.logit_scale, self.softcap = logit_scale, softcap
        # dlogits are an operand too: in the operands' dtype where that is what the products read.
        self.grad_dtype = hidden.dtype if self.native or INTERPRET else self.acc
        self.n = hidden.shape[0]
        sizes = {"itemsize": self.acc.itemsize, "keep_logits": keep_logits, "multiple": multiple}
        sizes["slab"] = weight.shape[1] if (slab or not self.native) and weight.dtype != self.acc else 0
        self.waits = whole and dlogits_wait(self.n, weight.shape[1], self.grad_dtype)
        sizes["lent"] = weight.shape[1] * weight.element_size() if self.waits else 0
        part = -(-vocab_size // self.shard.world)  # chunks must have the same rows on every rank
        self.rows, self.cols = tile_sizes(hidden.device.type, self.n, part, **sizes)
        self.cols = max(min(self.cols, self.vocab), 1)
        self._buffers: dict[torch.dtype, Tensor] = {}

    def row_ranges(self, held: int = 0) -> Iterator[tuple[int, int]]:
        """The tiles' rows; none has both rows before ``held`` and after."""
        for first, last in ((0, held), (held, self.n)):
            yield from ((r, min(r + self.rows, last)) for r in range(first, last, self.rows))

    def columns(self) -> Iterator[tuple[int, int, Tensor]]:
        """Vocabulary ranges with their weight rows, ready to be an operand."""
        for c0 in range(0, self.vocab, self.cols):
            c1 = min(c0 + self.cols, self.vocab)
            yield c0, c1, self.operand(self.weight[c0:c1])

    def operand(self, x: Tensor) -> Tensor:
        return x if self.native else x.to(self.acc)

    def buffer(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """A ``(rows, cols)`` scratch tile, reused from tile to tile."""
        if dtype not in self._buffers:
            self._buffers[dtype] = empty(self.inv_temp, scratch_size(self.rows, self.cols), dtype=dtype)
        return scratch(self._buffers[dtype], rows, cols)

    def logits(self, r0: int, r1: int, w: Tensor, out: Tensor | None = None) -> Tensor:
        """Raw logits ``hidden[r0:r1] @ w.T`` in the accumulation dtype."""
        return self._product(self.hidden[r0:r1], w.t(), self.buffer(r1 - r0, w.shape[0], self.acc) if out is None else out)

    def gathered(self, rows: Tensor, w: Tensor) -> Tensor:
        """Raw logits of scattered rows."""
        return self._product(self.hidden.index_select(0, rows), w.t(), new_scratch(self.inv_temp, (len(rows), len(w))))

    def add_product(self, into: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None, *, first: bool = False) -> None:
        """into ← (0 if first else into) + factor·a @ b, accumulated in the accumulation dtype."""
        a, b = self.operand(a), self.operand(b)
        if self.bf16_mm:
            torch.ops.rlad.bf16_mm_(into, a, b, not first)
        elif factor is not None:
            product = self._product(a, b) * factor
            into.copy_(product) if first else into.add_(product)
        elif a.dtype == into.dtype:
            into.addmm_(a, b, beta=0 if first else 1)
        else:
            torch.addmm(into, a, b, beta=0 if first else 1, out_dtype=into.dtype, out=into)

    def _product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if self.bf16_mm:
            out = self.inv_temp.new_empty(a.shape[0], b.shape[1]) if out is None else out
            torch.ops.rlad.bf16_mm_(out, a, b, False)
            return out
        if a.dtype == self.acc:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=self.acc, out=out)

    def bias_tile(self, c0: int, c1: int) -> Tensor | None:
        return None if self.bias is None else self.bias[c0:c1]

    def fold(
        self, x: Tensor, c0: int, r0: int, r1: int, slots: Tensor, stats: Tensor, z: Tensor, *, entropy: bool, extras: bool
    ) -> None:
        """Add one tile to the running statistics and slot logits of its rows, the slots' columns left out."""
        torch.ops.rlad.fold_(
            x,
            c0,
            self.bias_tile(c0, c0 + x.shape[1]),
            self.inv_temp[r0:r1],
            self.logit_scale,
            self.softcap,
            slots[r0:r1],
            stats[:, r0:r1],
            z[r0:r1],
            entropy,
            extras,
        )

    def new_stats(self, slots: int) -> tuple[Tensor, Tensor]:
        """Statistics ``(6, N)`` and slot logits ``(N, J)`` of no columns yet."""
        stats = self.inv_temp.new_zeros(len(Stats._fields), self.n)
        stats[0] = -torch.inf
        return stats, self.inv_temp.new_full((self.n, slots), -torch.inf)
