"""rlad_kernels: what RL and distillation losses need from an LM head, in one sweep over the vocabulary."""

from rlad_kernels.fused import fused_linear_loss
from rlad_kernels.head import LMHead
from rlad_kernels.losses.divergence import linear_divergence, linear_divergence_loss
from rlad_kernels.losses.ratio import grpo_loss, trrd_loss
from rlad_kernels.losses.reduction import LossOutput
from rlad_kernels.losses.rlad import rlad_loss
from rlad_kernels.losses.topk_kl import linear_topk_kl_loss, topk_kl_loss
from rlad_kernels.registry import METHODS
from rlad_kernels.scores import TokenScores, TopK, linear_gather, linear_logp, linear_topk
from rlad_kernels.settings import set_checks, set_compaction, set_tile

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "LMHead",
    "LossOutput",
    "TokenScores",
    "TopK",
    "fused_linear_loss",
    "grpo_loss",
    "linear_divergence",
    "linear_divergence_loss",
    "linear_gather",
    "linear_logp",
    "linear_topk",
    "linear_topk_kl_loss",
    "rlad_loss",
    "set_checks",
    "set_compaction",
    "set_tile",
    "topk_kl_loss",
    "trrd_loss",
]
