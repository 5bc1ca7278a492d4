"""rlad_kernels: what RL and distillation losses need from an LM head, in one sweep over the vocabulary."""

from rlad_kernels import losses
from rlad_kernels.batch import context, masks, spans, supports
from rlad_kernels.core.config import set_checks, set_compaction, set_keep, set_tile
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.reduction import Reduction
from rlad_kernels.core.token_loss import TokenLoss
from rlad_kernels.core.types import TokenScores, TopK
from rlad_kernels.linear.divergence import linear_divergence, linear_divergence_loss
from rlad_kernels.linear.gather import linear_gather
from rlad_kernels.linear.logp import linear_logp
from rlad_kernels.linear.loss import linear_loss
from rlad_kernels.linear.topk import linear_support, linear_topk
from rlad_kernels.losses.methods import METHODS

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "LMHead",
    "Reduction",
    "TokenLoss",
    "TokenScores",
    "TopK",
    "context",
    "linear_divergence",
    "linear_divergence_loss",
    "linear_gather",
    "linear_logp",
    "linear_loss",
    "linear_support",
    "linear_topk",
    "losses",
    "masks",
    "set_checks",
    "set_compaction",
    "set_keep",
    "set_tile",
    "spans",
    "supports",
]
