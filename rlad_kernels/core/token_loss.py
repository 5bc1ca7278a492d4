"""A loss on tokens as one object, which runs on log-probs and inside the sweep alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rlad_kernels.core.check import check_floats, check_k, flat_tokens, integers, refuse, token_rows
from rlad_kernels.core.modes import ordinary
from rlad_kernels.core.options import Options
from rlad_kernels.core.reduction import REDUCTIONS, Reduction, keep_mask, reduce, sequence_index, token_weights
from rlad_kernels.core.types import LossOutput, TokenScores, TopK, checked_topk

Tensors = dict[str, Any]  # a tensor or a TopK by name
Metrics = dict[str, Tensor]


class Arranged(NamedTuple):
    """A call's arguments, checked."""

    keep: Tensor  # (…) bool
    tensors: Tensors  # those of ``tokens``, (N,) or (N, K)
    weights: Tensor  # (…) the reduction's


class Batch(NamedTuple):
    """All tokens of a call, flat_tokens: what a loss may look at before the rows are cut."""

    keep: Tensor  # (N,) bool
    like: Tensor  # (…) the log-probs' shape, dtype and device
    seq_ids: Tensor | None
    name: str
    sliced: bool = False  # other ranks have the rest of each sequence

    def sequence(self, what: str) -> Tensor:
        """Each token's sequence, 0, 1, … in order, ``(N,)``; ``what`` needs it.

        Raises:
            ValueError: for packed tokens without ``Reduction(seq_ids=…)``, and for slices of sequences.
        """
        if self.sliced:
            raise ValueError(
                f"{self.name}: {what} needs whole sequences, got slices (Reduction(context=…)); call the loss on all tokens, "
                "rk.context.gather(logp, group), without context"
            )
        return sequence_index(self.name, self.keep.view(self.like.shape), what, self.seq_ids)


@dataclass(frozen=True, kw_only=True)
class TokenLoss(Options):
    """A per-token loss: its options, the tensors it needs, and the formula. Derive from it to write your own.

    Calling it computes the loss on log-probs that are at hand; :func:`linear_loss` computes the same inside the sweep, from hidden
    states. A subclass is a frozen dataclass with defaults for its options and overrides :meth:`tokens`.

    Attributes:
        reduction: ``token-mean``, ``seq-mean-token-mean`` or ``seq-mean-token-sum``, unless a call names another.
        needs, takes: names of the tensors that a call must and may give.
        spread: of these, the ones that may be ``(B,)`` for ``(B, T)`` log-probs.
        wide: of these, the ones that are ``(…, K)``, as the teacher's support.
        whole: of these, the ones that are integers. All others come as floats (or bools).
        reads: the scores that the loss reads; a single one may be passed as a tensor.
        rowwise: False for a loss whose token reads the scores of other tokens: :func:`linear_loss` then runs it on
            :func:`linear_logp`, at four products instead of three.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Reinforce(rk.TokenLoss):
        ...     entropy_coef: float = 0.0
        ...     needs = ("advantages",)
        ...     reads = ("logp", "entropy")
        ...
        ...     def tokens(self, scores, *, advantages):
        ...         return -advantages * scores.logp - self.entropy_coef * scores.entropy, {}
        >>> hidden, head, target = torch.randn(4, 8, requires_grad=True), rk.LMHead(torch.randn(16, 8)), torch.arange(4)
        >>> out = rk.linear_loss(hidden, head, target, Reinforce(entropy_coef=0.01), advantages=torch.ones(4))
        >>> sorted(out.metrics)
        ['entropy', 'rows_skipped']
    """

    reduction: str = "token-mean"

    needs: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    spread: ClassVar[tuple[str, ...]] = ("advantages", "correct", "group_ids")
    wide: ClassVar[tuple[str, ...]] = ("old_topk_logp",)
    whole: ClassVar[tuple[str, ...]] = ("group_ids", "target")
    reads: ClassVar[tuple[str, ...]] = ("logp",)
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"{self.name}: reduction must be one of {REDUCTIONS}, got {self.reduction!r}")
        super().__post_init__()

    @property
    def products(self) -> int:
        """2·N·D·V matrix products of :func:`linear_loss`, forward and backward."""
        return 3 if self.rowwise else 4

    def needed(self) -> tuple[str, ...]:
        """The tensors that a call must give, with these options."""
        return self.needs

    def read(self) -> tuple[str, ...]:
        """The scores that :meth:`tokens` reads, with these options."""
        return self.reads

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        """The tensors of :meth:`tokens` from those of the call, ``(N,)`` without gradient, 0 at masked tokens.

        Here a loss may look at other tokens of the batch: a sequence, a group.
        """
        return tensors

    def tokens(self, scores: TokenScores, **tensors: Any) -> tuple[Tensor, Metrics]:
        """The loss of each token and its metrics, ``(N,)``, from scores ``(N,)`` and ``(N, K)``: differentiable PyTorch.

        The sweep calls it on some of the rows at a time. Which metrics there are must not depend on the data.
        """
        raise NotImplementedError(f"{self.name}: tokens(scores, **tensors) must be defined")

    def __call__(
        self,
        scores: Tensor | TokenScores,
        *,
        mask: Tensor | None = None,
        reduction: str | Reduction | None = None,
        **tensors: Any,
    ) -> LossOutput:
        """The reduced loss on log-probs.

        Args:
            scores: :class:`TokenScores` of the current policy (of :func:`linear_logp`) or, where the loss reads one of them, that
                tensor: log-probs in nats ``(B, T)``, packed ``(N,)``, or ``(…, K)`` on a support. What receives gradient.
            mask: bool or 0/1 ``(…)``; None is all. What sits at masked tokens does not matter.
            reduction: a name, or :class:`Reduction`; None is the loss's own.
            tensors: those in ``needs`` and ``takes``, by name; they receive no gradient.

        Returns:
            LossOutput.

        Raises:
            ValueError: naming the argument, what came and what was wanted.
        """
        scores = self._scores(scores)
        like = _like(self.name, scores)
        call, teacher = self.arrange(like, mask, reduction, tensors), tensors.get("teacher")
        if teacher is not None and scores.topk_logp is not None and scores.topk_logp.shape != teacher.ids.shape:
            got, wanted = tuple(scores.topk_logp.shape), tuple(teacher.ids.shape)
            raise ValueError(f"{self.name}: topk_logp has shape {got}, teacher.ids {wanted}; they must match")
        return self.reduced(scores, call)

    def reduced(self, scores: TokenScores, call: Arranged) -> LossOutput:
        """The reduced loss of scores in the tokens' shape and a call's checked arguments."""
        shape, keep = call.keep.shape, call.keep.reshape(-1)
        flat = TokenScores(*(None if x is None else _replaced(flat_tokens(x, len(shape)), keep) for x in scores[:-1]))
        loss, metrics = self.evaluate(flat, call.tensors)
        return reduce(loss.view(shape), call.weights, call.keep, {k: x.view(shape) for k, x in metrics.items()})

    def evaluate(self, scores: TokenScores, tensors: Tensors) -> tuple[Tensor, Metrics]:
        """:meth:`tokens`, its results checked, with the entropy among the metrics where it is known."""
        try:
            found = self.tokens(scores, **tensors)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise TypeError(f"{self.name}: tokens does not take {sorted(tensors)}: {error}") from error
        loss, metrics = found if isinstance(found, tuple) else (found, {})
        rows = next(x.shape[:1] for x in scores if isinstance(x, Tensor))
        for what, x in {"loss": loss, **metrics}.items():
            if not isinstance(x, Tensor) or x.shape != rows:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{self.name}: tokens must return {what} of one value a token, shape {tuple(rows)}, got {got}")
        return loss, metrics if scores.entropy is None else {**metrics, "entropy": scores.entropy.detach()}

    def arrange(self, like: Tensor, mask: Tensor | None, reduction: str | Reduction | None, tensors: Mapping[str, Any]) -> Arranged:
        """A call's arguments checked, for tokens in the shape, dtype and on the device of ``like``."""
        needed = self.needed()
        known = [*dict.fromkeys((*self.needs, *self.takes, *needed)), "mask", "reduction"]
        for k in tensors:
            if k not in known and k in self.__dataclass_fields__:
                raise TypeError(f"{self.name}: {k} is an option, not a tensor of the call; wanted {self.name}({k}=…)")
        refuse(self.name, tensors, known)
        for argument in needed:
            if tensors.get(argument) is None:
                raise ValueError(f"{self.name}: {argument} is None, wanted {self._wanted(argument)}")
        chosen = Reduction.of(self.name, reduction, self.reduction)
        keep = keep_mask(self.name, mask, like)
        given = {k: self._rows(k, x, like, keep) for k, x in tensors.items() if x is not None}
        batch = Batch(keep.reshape(-1), like, chosen.seq_ids, self.name, chosen.context is not None)
        weights = token_weights(self.name, keep, chosen, like.dtype)
        return Arranged(keep, self.prepare(batch, given), weights)

    def _wanted(self, argument: str) -> str:
        """What an argument must be, in words."""
        if argument == "teacher":
            return "a TopK of the teacher"
        kind = "integers" if argument in self.whole else "a tensor"
        return f"{kind} in logp's shape" + (" or (B,)" if argument in self.spread else ", (…, K)" * (argument in self.wide))

    def _rows(self, argument: str, x: Any, like: Tensor, keep: Tensor) -> Any:
        """One argument as rows ``(N,)`` or ``(N, K)``, detached, 0 at masked tokens."""
        if argument == "teacher":
            teacher = checked_topk(self.name, argument, x)
            check_k(self.name, teacher.ids.shape[-1], None, "teacher.ids (…, K)")
            if teacher.ids.shape[:-1] != like.shape:
                got, wanted = tuple(teacher.ids.shape), tuple(like.shape)
                raise ValueError(f"{self.name}: teacher.ids (…, K) has shape {got}, wanted leading shape {wanted}")
            named = zip(TopK._fields, teacher, strict=True)
            return TopK._make(None if y is None else self._rows(f"teacher.{k}", y, like, keep) for k, y in named)
        wide = argument in self.wide or argument in ("teacher.ids", "teacher.logp")
        x = token_rows(self.name, argument, x, like, spread=argument in self.spread, wide=wide)
        if argument == "teacher.ids":
            x = integers(self.name, argument, x).to(torch.int32)
        elif argument in self.whole:
            x = integers(self.name, argument, x)
        elif x.dtype != torch.bool:
            x = x.to(like.dtype)
        return _replaced(flat_tokens(ordinary(x), like.dim()), keep.reshape(-1))

    def _scores(self, scores: Any) -> TokenScores:
        """The scores, those that are read checked and in the accumulation dtype."""
        reads = self.read()
        if isinstance(scores, Tensor) and len(reads) == 1:
            scores = TokenScores(**{reads[0]: scores})
        if not isinstance(scores, TokenScores):
            wanted = "TokenScores" + (f" or a tensor, {reads[0]}" if len(reads) == 1 else f" with {', '.join(reads)}")
            raise ValueError(f"{self.name}: scores must be {wanted}, got {type(scores).__name__}")
        found: dict[str, Tensor] = {}
        for k in TokenScores._fields[:-1]:
            x = getattr(scores, k)
            if x is None:
                if k in reads:
                    raise ValueError(f"{self.name}: scores.{k} is None; linear_logp({ASKED.get(k, '')}) gives it")
                continue
            check_floats(self.name, k, x)
            if k == "topk_logp":
                check_k(self.name, x.shape[-1] if x.dim() else 0, None, "topk_logp (…, K)")
            found[k] = x if x.dtype == torch.float64 else x.float()
        return TokenScores(**found)


ASKED = {
    "entropy": "…, entropy=True", "topk_logp": "…, topk_ids=teacher.ids", "tail_logp": "…, topk_ids=teacher.ids, tail=True",
    "mean_logits": "…, mean_logits=True",
}  # fmt: skip


def _like(name: str, scores: TokenScores) -> Tensor:
    """A tensor in the tokens' shape; all scores must agree on it."""
    shapes = {k: x.shape[:-1] if k == "topk_logp" else x.shape for k, x in scores._asdict().items() if isinstance(x, Tensor)}
    first, shape = next(iter(shapes.items()))
    x = getattr(scores, first)
    for k, other in shapes.items():
        if other != shape:
            raise ValueError(f"{name}: scores.{k} has leading shape {tuple(other)}, scores.{first} {tuple(shape)}; they must agree")
        if (device := getattr(scores, k).device) != x.device:
            raise ValueError(f"{name}: scores.{k} is on {device}, scores.{first} on {x.device}; they must share a device")
    return (x[..., 0] if first == "topk_logp" else x).detach()


def _replaced(x: Tensor, keep: Tensor) -> Tensor:
    """``x`` with 0 in the rows outside ``keep``: whatever sits at masked tokens must not matter, NaN included."""
    keep = keep.unsqueeze(1) if x.dim() > 1 else keep
    return x & keep if x.dtype == torch.bool else torch.where(keep, x, 0)
