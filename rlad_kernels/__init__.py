"""rlad_kernels: what RL and distillation losses need from an LM head, in one sweep over the vocabulary."""

from rlad_kernels.batch.masks import final_eos_mask, response_mask, reward_mask, special_token_mask, spread, top_entropy_mask
from rlad_kernels.batch.spans import sequence_stat, span_ids
from rlad_kernels.batch.supports import intersection, probability_band, symmetric_difference, union, with_sampled
from rlad_kernels.batch.teachers import combine_teachers
from rlad_kernels.core.config import set_checks, set_compaction, set_tile
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.registry import METHODS, TOKEN_LOSSES
from rlad_kernels.core.types import LossOutput, TokenScores, TopK
from rlad_kernels.linear.divergence import linear_divergence, linear_divergence_loss
from rlad_kernels.linear.gather import linear_gather
from rlad_kernels.linear.logp import linear_logp
from rlad_kernels.linear.loss import fused_linear_loss
from rlad_kernels.linear.topk import linear_support, linear_topk
from rlad_kernels.losses import load as _load_methods
from rlad_kernels.losses.cross_entropy import linear_cross_entropy_loss
from rlad_kernels.losses.ratio.cispo import cispo_loss
from rlad_kernels.losses.ratio.grpo import grpo_loss
from rlad_kernels.losses.ratio.gspo import gspo_loss
from rlad_kernels.losses.ratio.hdpo import hdpo_loss
from rlad_kernels.losses.ratio.kdrl import annealed_coef, kdrl_loss
from rlad_kernels.losses.ratio.mopd import mopd_loss
from rlad_kernels.losses.ratio.opd import opd_loss
from rlad_kernels.losses.ratio.rlsd import rlsd_loss
from rlad_kernels.losses.ratio.rollout import Rollout
from rlad_kernels.losses.ratio.sapo import sapo_loss
from rlad_kernels.losses.ratio.sdar import sdar_loss
from rlad_kernels.losses.ratio.srpo import srpo_loss
from rlad_kernels.losses.ratio.trrd import trrd_loss
from rlad_kernels.losses.rlad import rlad_loss
from rlad_kernels.losses.support.eopd import eopd_loss
from rlad_kernels.losses.support.topk_kl import linear_topk_kl_loss, topk_kl_loss
from rlad_kernels.losses.support.topk_pg import topk_advantage_loss, topk_pg_loss
from rlad_kernels.losses.support.topk_sampled import topk_sampled_tail_loss

_load_methods()
__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "TOKEN_LOSSES",
    "LMHead",
    "LossOutput",
    "Rollout",
    "TokenScores",
    "TopK",
    "annealed_coef",
    "cispo_loss",
    "combine_teachers",
    "eopd_loss",
    "final_eos_mask",
    "fused_linear_loss",
    "grpo_loss",
    "gspo_loss",
    "hdpo_loss",
    "intersection",
    "kdrl_loss",
    "linear_cross_entropy_loss",
    "linear_divergence",
    "linear_divergence_loss",
    "linear_gather",
    "linear_logp",
    "linear_support",
    "linear_topk",
    "linear_topk_kl_loss",
    "mopd_loss",
    "opd_loss",
    "probability_band",
    "response_mask",
    "reward_mask",
    "rlad_loss",
    "rlsd_loss",
    "sapo_loss",
    "sdar_loss",
    "sequence_stat",
    "set_checks",
    "set_compaction",
    "set_tile",
    "span_ids",
    "special_token_mask",
    "spread",
    "srpo_loss",
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
