"""rlad_kernels: what RL and distillation losses need from an LM head, in one sweep over the vocabulary."""

from rlad_kernels.fused import fused_linear_loss
from rlad_kernels.head import LMHead
from rlad_kernels.losses import load as _load_methods
from rlad_kernels.losses.cispo import cispo_loss
from rlad_kernels.losses.cross_entropy import linear_cross_entropy_loss
from rlad_kernels.losses.grpo import grpo_loss
from rlad_kernels.losses.gspo import gspo_loss
from rlad_kernels.losses.hdpo import hdpo_loss
from rlad_kernels.losses.kdrl import annealed_coef, kdrl_loss
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
from rlad_kernels.losses.trrd import trrd_loss
from rlad_kernels.registry import METHODS, TOKEN_LOSSES
from rlad_kernels.scores import TokenScores, TopK, linear_gather, linear_logp, linear_topk
from rlad_kernels.settings import set_checks, set_compaction, set_tile

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
    "fused_linear_loss",
    "grpo_loss",
    "gspo_loss",
    "hdpo_loss",
    "kdrl_loss",
    "linear_cross_entropy_loss",
    "linear_gather",
    "linear_logp",
    "linear_topk",
    "linear_topk_kl_loss",
    "mopd_loss",
    "opd_loss",
    "rlad_loss",
    "rlsd_loss",
    "sapo_loss",
    "sdar_loss",
    "sequence_stat",
    "set_checks",
    "set_compaction",
    "set_tile",
    "span_ids",
    "srpo_loss",
    "topk_kl_loss",
    "trrd_loss",
]
