"""DAC-KL on a given band of the teacher's probabilities, and its span term (arXiv 2407.10068)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlad_kernels.core.token_loss import Batch, Metrics, Tensors, TokenLoss
from rlad_kernels.core.types import TokenScores, TopK
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.support.terms import support
from rlad_kernels.losses.support.topk_kl import TopKKL


@dataclass(frozen=True, kw_only=True)
class SpanCorrelation(TokenLoss):
    """Σ_v (p_v·p'_v − q_v·q'_v)² over the ids that a token and the next of its span both have (DAC-KL's, arXiv 2407.10068).

    p and q are teacher and student at the token, p' and q' at the next one; the last token of a span has 0. An id that one of
    the two supports lacks leaves: its products are below the least of that support.

    Tensors of a call:
        topk_logp: student log-probs ``(…, K)`` at ``teacher.ids``, in nats; what receives gradient.
        teacher: the support and the teacher's log-probs there; an empty or non-finite slot leaves.
        spans: ints ``(…)``, the span of each token, −1 for none; packed, numbers that differ between sequences
            (``rk.spans.span_ids``).

    Metrics: invalid_teacher.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> q, p = torch.tensor([[0.5], [0.5]]).log(), torch.tensor([[0.5], [1.0]]).log()
        >>> teacher = rk.TopK(torch.tensor([[3], [3]]), p)
        >>> rk.losses.SpanCorrelation()(q, teacher=teacher, spans=torch.tensor([0, 0])).token_loss
        tensor([0.0625, 0.0000])
    """

    needs = ("teacher", "spans")
    whole = (*TokenLoss.whole, "spans")
    reads = ("topk_logp",)
    rowwise = False

    def prepare(self, batch: Batch, tensors: Tensors) -> Tensors:
        spans, keep = tensors["spans"], batch.keep
        linked = (spans[1:] == spans[:-1]) & (spans[1:] >= 0) & keep[1:] & keep[:-1]
        linked = torch.cat([linked, linked.new_zeros(min(len(spans), 1))])  # to the token after it
        if batch.like.dim() > 1:
            row = batch.like.shape[-1]
            linked = linked & (torch.arange(len(spans), device=spans.device) % row != row - 1)
        return {**tensors, "spans": linked}

    def tokens(self, scores: TokenScores, *, teacher: TopK, spans: Tensor) -> tuple[Tensor, Metrics]:
        valid, invalid = support(teacher.ids, teacher.logp)
        p, q = (torch.where(valid, torch.where(valid, x, 0).exp(), 0) for x in (teacher.logp, scores.topk_logp))
        last = torch.iinfo(torch.int32).max
        theirs, order = torch.where(valid, teacher.ids, last).roll(-1, 0).sort(1)
        place = torch.searchsorted(theirs, teacher.ids.contiguous()).clamp(max=theirs.shape[1] - 1)
        shared = valid & (theirs.gather(1, place) == teacher.ids) & spans.unsqueeze(1)
        at = order.gather(1, place)
        gap = torch.where(shared, p * p.roll(-1, 0).gather(1, at) - q * q.roll(-1, 0).gather(1, at), 0)
        return gap.square().sum(1), {"invalid_teacher": invalid.to(gap.dtype)}


add_method(
    "dac_kl",
    "top-k",
    TopKKL("forward", normalize="none"),
    formula="Σ_S p(log p − log q), S = {v: l ≤ p_v ≤ u} ∪ {y}",
    paper="arXiv 2407.10068",
    confidence="C",
    note="Pass rk.supports.probability_band(with_sampled(linear_topk(…, K), y), l, u, target=y), exact where K ≥ 1/l. A sum over "
    "a part of the vocabulary can be negative.",
    published="Summed with SFT and the span term, weights 1; a learned network gives the bounds. The equation was not read: ours "
    "has given bounds and does not renormalise.",
)
add_method(
    "dac_kl_span",
    "top-k",
    SpanCorrelation(),
    formula="Σ_v (p_v p'_v − q_v q'_v)², ' the next token of the span",
    paper="arXiv 2407.10068",
    confidence="C",
    note="On the ids that both tokens' supports hold.",
    published="Element-wise products of neighbouring distributions in spans of a chunker, weight 1; its distance not read, ours "
    "is ℓ2 squared.",
)
