"""rlad_kernels: what RL and distillation losses need from an LM head, in one sweep over the vocabulary."""

from rlad_kernels.fused import fused_linear_loss
from rlad_kernels.head import LMHead
from rlad_kernels.losses.eopd import eopd_loss
from rlad_kernels.losses.masks import final_eos_mask, response_mask, reward_mask, special_token_mask, spread, top_entropy_mask
from rlad_kernels.losses.ratio import grpo_loss, trrd_loss
from rlad_kernels.losses.reduction import LossOutput
from rlad_kernels.losses.rlad import rlad_loss
from rlad_kernels.losses.topk_kl import linear_topk_kl_loss, topk_kl_loss
from rlad_kernels.losses.topk_pg import topk_advantage_loss, topk_pg_loss
from rlad_kernels.losses.topk_sampled import topk_sampled_tail_loss
from rlad_kernels.registry import METHODS
from rlad_kernels.scores import TokenScores, TopK, linear_gather, linear_logp, linear_topk
from rlad_kernels.settings import set_checks, set_compaction, set_tile
from rlad_kernels.supports import intersection, linear_support, probability_band, symmetric_difference, union, with_sampled

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "LMHead",
    "LossOutput",
    "TokenScores",
    "TopK",
    "eopd_loss",
    "final_eos_mask",
    "fused_linear_loss",
    "grpo_loss",
    "intersection",
    "linear_gather",
    "linear_logp",
    "linear_support",
    "linear_topk",
    "linear_topk_kl_loss",
    "probability_band",
    "response_mask",
    "reward_mask",
    "rlad_loss",
    "set_checks",
    "set_compaction",
    "set_tile",
    "special_token_mask",
    "spread",
    "symmetric_difference",
    "top_entropy_mask",
    "topk_advantage_loss",
    "topk_kl_loss",
    "topk_pg_loss",
    "topk_sampled_tail_loss",
    "trrd_loss",
    "union",
    "with_sampled",
]
