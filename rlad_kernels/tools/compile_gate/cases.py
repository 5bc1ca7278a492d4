"""The launches that the compile gate compiles: each kernel × config row × dtype × flags, as calls on meta tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, isinf

import torch

from rlad_kernels.backends.triton._launch import Launch, record
from rlad_kernels.backends.triton.clipped_ratio import ESTIMATORS, clipped_ratio
from rlad_kernels.backends.triton.columns import column_stats_
from rlad_kernels.backends.triton.configs import TABLES
from rlad_kernels.backends.triton.divergence import FAMILIES, divergence_
from rlad_kernels.backends.triton.dlogits import dlogits_
from rlad_kernels.backends.triton.fold import fold_
from rlad_kernels.backends.triton.gather import HALVES, gather_dhidden, gather_dot, gather_dweight_
from rlad_kernels.backends.triton.score import score_partials
from rlad_kernels.backends.triton.topk import fold_topk_
from rlad_kernels.backends.triton.topk_kl import DIRECTIONS, NORMALIZATIONS, topk_kl

R, C, V, D, J = 1024, 8192, 151936, 4096, 64  # sizes of a real sweep: what matters is which are divisible by 16


@dataclass(frozen=True)
class Case:
    """One call of a launcher; `wide` says whether its tensors allow 16-byte accesses."""

    label: str
    call: Callable[[], object]
    wide: bool = True

    def launch(self, arch: int = 90) -> Launch:
        """The one launch this call makes on a device of `arch`."""
        with record(arch) as launches:
            self.call()
        (only,) = launches
        return only


def _f32(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ids(*shape: int) -> torch.Tensor:
    return _f32(*shape, dtype=torch.int32)


def _sizes(kernel: str, large: int) -> list[int]:
    """One size per config row: its limit, or `large` for the unlimited row."""
    return [large if isinf(row.limit) else int(row.limit) for row in TABLES[kernel]]


def _flag_sets(*names: str, single: bool) -> list[frozenset[str]]:
    """No flag and every flag, and if `single` each alone: the full product would only repeat the same branches."""
    alone = [frozenset([name]) for name in names] if single else []
    return [frozenset(), *alone, frozenset(names)]


def _tiles(kernel: str) -> list[torch.Tensor]:
    """A tile for each config row, one whose last column is cut off (odd vocabularies), and one of a single column."""
    tiles = [_f32(R, cols) for cols in _sizes(kernel, C)]
    return [*tiles, tiles[-1][:, :-1], _f32(R, 1)]


def _sweep_args(flags: frozenset[str], cols: int) -> tuple[object, ...]:
    bias = _f32(cols) if "bias" in flags else None
    return bias, _f32(R), 1.0, 30.0 if "softcap" in flags else 0.0


def fold_cases() -> Iterator[Case]:
    tiles = _tiles("fold_kernel")
    for tile in tiles:
        cols = tile.shape[1]
        for f in _flag_sets("bias", "softcap", "slots", "exclude", "entropy", "extras", single=tile is tiles[1]):
            j = J if f & {"slots", "exclude"} else 0
            args = (tile, 0, *_sweep_args(f, cols), _ids(R, j), "exclude" in f, _f32(6, R), _f32(R, j))
            flags = ("entropy" in f, "extras" in f)
            yield Case(f"C={cols} {'+'.join(sorted(f))}", lambda a=args, b=flags: fold_(*a, *b), cols > 1)


def topk_cases() -> Iterator[Case]:
    for k in _sizes("fold_topk_kernel", 1024):
        for f in _flag_sets("bias", "softcap", "entropy", single=k == 128):
            state = (_ids(R, J), _f32(6, R), _f32(R, J), _f32(R, k), _ids(R, k))
            args = (_f32(R, C), 0, *_sweep_args(f, C), *state, "entropy" in f)
            yield Case(f"K={k} {'+'.join(sorted(f))}", lambda a=args: fold_topk_(*a))


def dlogits_cases() -> Iterator[Case]:
    for dtype in HALVES:
        tiles = _tiles("dlogits_kernel")
        for tile in tiles:
            cols, single = tile.shape[1], tile is tiles[1] and dtype == torch.bfloat16
            out = _f32(R, tile.stride(0), dtype=dtype)[:, :cols]
            for f in _flag_sets("bias", "softcap", "slots", "entropy", "tail", single=single):
                j = J if "slots" in f else 0
                rest = (_ids(R, j), _f32(R, j), _f32(6, R), "entropy" in f, "tail" in f)
                args = (out, tile, 0, *_sweep_args(f, cols), *rest)
                yield Case(f"{dtype} C={cols} {'+'.join(sorted(f))}", lambda a=args: dlogits_(*a), cols > 1)


def divergence_cases() -> Iterator[Case]:
    tiles = _tiles("divergence_kernel")
    flags = _flag_sets("bias", "teacher_bias", "softcap", "teacher_softcap", "grad", "accumulate", single=False)
    for tile in tiles:
        cols = tile.shape[1]
        for f in (*flags, frozenset({"grad"})):
            for family in FAMILIES if tile is tiles[0] else ("sym",):
                student = (tile, *_sweep_args(f, cols), _f32(2, R))
                teacher_flags = frozenset(x.removeprefix("teacher_") for x in f if x.startswith("teacher_"))
                teacher = (tile, *_sweep_args(teacher_flags, cols), _f32(2, R))
                numbers = (_f32(4, R), family, 0.8 if "softcap" in f else 0.2, 0.7, 0.3, "accumulate" in f)
                args = (_f32(R), tile if "grad" in f else None, *student, *teacher, *numbers)
                wide = cols > 1 and "grad" in f
                yield Case(f"{family} C={cols} {'+'.join(sorted(f))}", lambda a=args: divergence_(*a), wide)


def column_cases() -> Iterator[Case]:
    for tile in (_f32(R, C), _f32(R, C)[:, :-1]):
        cols = tile.shape[1]
        for f in _flag_sets("bias", "softcap", single=False):
            out = _f32(3 if "softcap" in f else 2, R // 128, cols)
            args = (out, tile, *_sweep_args(f, cols), _f32(R), 128)
            yield Case(f"C={cols} {'+'.join(sorted(f))}", lambda a=args: column_stats_(*a))


def gather_dot_cases() -> Iterator[Case]:
    for dtype in HALVES:
        for d in _sizes("gather_dot_kernel", D):
            args = (_f32(R, d, dtype=dtype), _f32(V, d, dtype=dtype), _ids(R, J))
            yield Case(f"{dtype} D={d}", lambda a=args: gather_dot(*a))


def gather_dhidden_cases() -> Iterator[Case]:
    for dtype in HALVES:
        for d in _sizes("gather_dhidden_kernel", D):
            args = (_f32(R, J), _f32(V, d, dtype=dtype), _ids(R, J))
            yield Case(f"{dtype} D={d}", lambda a=args: gather_dhidden(*a))


def gather_dweight_cases() -> Iterator[Case]:
    places = (_f32(R * J, dtype=torch.int64), _ids(R * J))
    for dtype in HALVES:
        for out in {torch.float32, dtype}:
            for d in _sizes("gather_dweight_kernel", D):
                args = (_f32(V, d, dtype=out), _f32(R, J), _f32(R, d, dtype=dtype), *places)
                for add in (False, True):
                    yield Case(f"{dtype} → {out} D={d} add={add}", lambda a=args, add=add: gather_dweight_(*a, add))


def score_cases() -> Iterator[Case]:
    for dtype in HALVES:
        for f in _flag_sets("bias", "softcap", "entropy", "extras", "column_max", single=dtype == torch.bfloat16):
            head = (_f32(R, D, dtype=dtype), _f32(V, D, dtype=dtype), *_sweep_args(f, V))
            args = (*head, _ids(R, J), "entropy" in f, "extras" in f, "column_max" in f)
            yield Case(f"{dtype} {'+'.join(sorted(f))}", lambda a=args: score_partials(*a))


def clipped_ratio_cases() -> Iterator[Case]:
    plain = [(teacher, None, dual) for teacher in (False, True) for dual in (0.0, 3.0)]
    for teacher, estimator, dual in (*plain, *((True, name, 3.0) for name in ESTIMATORS)):
        args = (_f32(R), _f32(R), _f32(R) if teacher else None, _f32(R), _f32(R) if estimator else None)
        rest = (torch.tensor([0.5, 0.2, 0.2, inf, dual, 0.1]), estimator or "k3")
        yield Case(f"teacher={teacher} {estimator} dual={dual}", lambda a=args, b=rest: clipped_ratio(*a, *b))


def topk_kl_cases() -> Iterator[Case]:
    modes = [(d, n, False) for d in DIRECTIONS for n in NORMALIZATIONS] + [(d, "tail", True) for d in DIRECTIONS]
    for i, k in enumerate(_sizes("topk_kl_kernel", 1024)):
        for direction, normalize, given in modes if i == 0 else modes[::3]:
            tail = _f32(R) if given else None
            args = (_f32(R, k), _ids(R, k), _f32(R, k), tail, _f32(R), direction, normalize)
            yield Case(f"K={k} {direction} {normalize} tail_logp={given}", lambda a=args: topk_kl(*a))


CASES: dict[str, list[Case]] = {
    "fold_kernel": list(fold_cases()),
    "fold_topk_kernel": list(topk_cases()),
    "dlogits_kernel": list(dlogits_cases()),
    "divergence_kernel": list(divergence_cases()),
    "column_stats_kernel": list(column_cases()),
    "gather_dot_kernel": list(gather_dot_cases()),
    "gather_dhidden_kernel": list(gather_dhidden_cases()),
    "gather_dweight_kernel": list(gather_dweight_cases()),
    "score_kernel": list(score_cases()),
    "clipped_ratio_kernel": list(clipped_ratio_cases()),
    "topk_kl_kernel": list(topk_kl_cases()),
}
