"""rlad_kernels: what RL and distillation losses need from an LM head, in one sweep over the vocabulary."""

from rlad_kernels.fused import fused_linear_loss
from rlad_kernels.head import LMHead
from rlad_kernels.losses import load as _load_methods
from rlad_kernels.losses.cispo import cispo_loss
from rlad_kernels.losses.cross_entropy import linear_cross_entropy_loss
from rlad_kernels.losses.divergence import linear_divergence, linear_divergence_loss
from rlad_kernels.losses.eopd import eopd_loss
from rlad_kernels.losses.grpo import grpo_loss
from rlad_kernels.losses.gspo import gspo_loss
from rlad_kernels.losses.hdpo import hdpo_loss
from rlad_kernels.losses.kdrl import annealed_coef, kdrl_loss
from rlad_kernels.losses.masks import final_eos_mask, response_mask, reward_mask, special_token_mask, spread, top_entropy_mask
from rlad_kernels.losses.mopd import mopd_loss
from rlad_kernels.losses.opd import opd_loss
from rlad_kernels.losses.reduction import LossOutput
from rlad_kernels.losses.rlad import rlad_loss
from rlad_kernels.losses.rlsd import rlsd_loss
from rlad_kernels.losses.rollout import Rollout
from rlad_kernels.losses.sapo import sapo_loss
from rlad_kernels.losses.sdar import sdar_loss
from rlad_kernels.losses.spans import sequence_stat, span_ids
from rlad_kernels.losses.srpo import srpo_loss
from rlad_kernels.losses.teachers import combine_teachers
from rlad_kernels.losses.topk_kl import linear_topk_kl_loss, topk_kl_loss
from rlad_kernels.losses.topk_pg import topk_advantage_loss, topk_pg_loss
from rlad_kernels.losses.topk_sampled import topk_sampled_tail_loss
from rlad_kernels.losses.trrd import trrd_loss
from rlad_kernels.registry import METHODS, TOKEN_LOSSES
from rlad_kernels.scores import TokenScores, TopK, linear_gather, linear_logp, linear_topk
from rlad_kernels.settings import set_checks, set_compaction, set_tile
from rlad_kernels.supports import intersection, linear_support, probability_band, symmetric_difference, union, with_sampled

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
