"""Cross-entropy with token weights and z-loss: SFT, and distillation from sequences that the teacher wrote (arXiv 1606.07947)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlad_kernels.core.check import is_number
from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.registry import add_method, register
from rlad_kernels.core.types import LossOutput, TokenScores
from rlad_kernels.engine.call import check_states, target_shape
from rlad_kernels.linear.loss import fuse
from rlad_kernels.losses.ratio.surrogate import per_token


@register("cross_entropy")
def cross_entropy_tokens(
    scores: TokenScores, *, weights: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """−w·log π(y) + z_loss·lse² per token, a token of weight 0 keeping only its z-loss; and ``entropy`` where it is known."""
    loss = -scores.logp if weights is None else torch.where(weights == 0, 0, -weights * scores.logp)
    loss = loss + z_loss * scores.lse.square() if z_loss else loss
    return loss, {} if scores.entropy is None else {"entropy": scores.entropy}


def linear_cross_entropy_loss(
    hidden: Tensor, head: LMHead, target: Tensor, *, weights: Tensor | None = None, z_loss: float = 0.0,
    mask: Tensor | None = None, filter_eps: float = 0.0, reduction: str = "token-mean", seq_ids: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """−w·log π(y) + z_loss·lse², in one sweep: SFT, or distillation from what a teacher wrote (arXiv 1606.07947, 2204.02311).

    Args:
        hidden, head, target, mask: as in :func:`linear_logp`.
        weights: w per token in the target's shape, detached; None is 1. They do not enter the divisor of a reduction: pass
            ``denominator=weights[mask].sum()`` for a weighted mean.
        z_loss: factor on the squared logsumexp in nats² (PaLM: 1e-4), not weighted by w. It holds the normaliser near 0, which
            log-probs alone leave free; its gradient is 2·z_loss·lse·p.
        filter_eps: as in :func:`fused_linear_loss`.
        reduction, seq_ids, denominator: as in :func:`grpo_loss`.

    Returns:
        LossOutput as of :func:`fused_linear_loss`. Metrics: entropy, rows_skipped.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
    """
    name = "linear_cross_entropy_loss"
    check_states(name, hidden, head)
    target_shape(name, hidden, target)
    if not (is_number(z_loss) and 0 <= z_loss < torch.inf):
        raise ValueError(f"{name}: z_loss must be finite and at least 0, got {z_loss!r}")
    inputs: dict[str, Any] = {"z_loss": z_loss}
    if weights is not None:
        like = torch.empty(target.shape, dtype=acc_dtype(hidden.dtype), device=head.weight.device)
        inputs["weights"] = per_token(name, "weights", weights, like)
    return fuse(
        name, hidden, head, target, cross_entropy_tokens, inputs=inputs, mask=mask, topk_ids=None, filter_eps=filter_eps,
        reduction=reduction, seq_ids=seq_ids, denominator=denominator,
    )  # fmt: skip


add_method(
    "seq_kd", "other", linear_cross_entropy_loss, formula="−log π(y), y written by the teacher", needs=(),
    paper="arXiv 1606.07947", confidence="B", products=3,
)  # fmt: skip
add_method(
    "cross_entropy_z_loss", "other", linear_cross_entropy_loss, formula="−w·log π(y) + c·lse², c = 1e-4", needs=("weights",),
    paper="arXiv 2204.02311", confidence="B", products=3, options={"z_loss": 1e-4},
)  # fmt: skip
