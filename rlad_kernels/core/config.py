"""The process-wide switches: tile sizes, checks that synchronise, row compaction, memory to keep logits in."""

from __future__ import annotations

from types import TracebackType

from rlad_kernels.core.sizes import byte_size


class _Settings:
    def __init__(self) -> None:
        self.tile_rows: int | None = None
        self.tile_cols: int | None = None
        self.checks = False
        self.compaction = True
        self.keep = 0


settings = _Settings()


class _Restore:
    """Undoes a setting when used as a context manager; ignoring it keeps the setting."""

    def __init__(self, **previous: object) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for name, was in self._previous.items():
            setattr(settings, name, was)


def _size(name: str, value: int | None) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"set_tile: {name} must be a positive int or None, got {value!r}")
    return value


def set_tile(rows: int | None = None, cols: int | None = None) -> _Restore:
    """Override the tile of logits that a sweep holds: ``rows`` tokens by ``cols`` vocabulary entries.

    ``None`` gives that size back to the library's own choice. Works as a statement, which stays in force,
    and as a context manager, which restores what was set before.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> with rk.set_tile(rows=128, cols=1024):
        ...     rk.linear_logp(torch.ones(1, 1), rk.LMHead(torch.ones(2, 1)), torch.tensor([1])).logp
        tensor([-0.6931])
    """
    restore = _Restore(tile_rows=settings.tile_rows, tile_cols=settings.tile_cols)
    settings.tile_rows, settings.tile_cols = _size("rows", rows), _size("cols", cols)
    return restore


def set_checks(enabled: bool) -> _Restore:
    """Turn on the checks that synchronise on CUDA: ids in range, mask values 0 or 1, finite log-normalisers.

    On CPU the id and mask checks always run. Works as a statement or as a context manager.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> with rk.set_checks(True):
        ...     rk.linear_logp(torch.ones(1, 1), rk.LMHead(torch.ones(2, 1)), torch.tensor([1])).logp
        tensor([-0.6931])
    """
    restore = _Restore(checks=settings.checks)
    settings.checks = bool(enabled)
    return restore


def set_compaction(enabled: bool) -> _Restore:
    """Choose whether masked and zero-gradient rows are dropped (default) or computed and zeroed.

    Dropping rows costs one host synchronisation a call on CUDA; without it a call can be captured in a CUDA graph, unless it has
    ``filter_eps``, whose choice of columns the host reads.
    Under capture nothing is dropped whatever is set here. Works as a statement or as a context manager.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> with rk.set_compaction(False):
        ...     rk.linear_logp(torch.ones(1, 1), rk.LMHead(torch.ones(2, 1)), torch.tensor([-100])).logp
        tensor([0.])
    """
    restore = _Restore(compaction=settings.compaction)
    settings.compaction = bool(enabled)
    return restore


def set_keep(memory: int | str) -> _Restore:
    """Choose in how much memory each ``linear_logp`` keeps logits of its forward for its backward, 0 at first.

    The backward of rows that fit is two products in place of three; it stays exact. ``memory`` is in bytes, or has a unit: "2GiB".
    A call's own ``keep`` goes before this; a trainer's calls, whose arguments are not yours, follow it. Works as a statement or as
    a context manager.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> with rk.set_keep("1MiB"):
        ...     rk.linear_logp(torch.ones(1, 1), rk.LMHead(torch.ones(2, 1)), torch.tensor([1])).logp
        tensor([-0.6931])
    """
    restore = _Restore(keep=settings.keep)
    settings.keep = byte_size("set_keep", "memory", memory)
    return restore
