"""TRL 1.16.0: the losses of its trainers, called without one."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.losses import Reference
from tests.official import B, Case, Given, K, T, ours, ours_divergence, ours_topk

L_MAX = 9
COUNT = 31  # kept tokens of all ranks


def grpo_loss(x: Given, loss_type: str, compute: Any = None, **options: Any) -> Tensor:
    """``GRPOTrainer._compute_loss`` on log-probs, or that of a trainer derived from it."""
    from trl import GRPOTrainer

    given: dict[str, Any] = {
        "epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None, "beta": 0.0, "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
        "importance_sampling_level": "token", "use_vllm": False, **options,
    }  # fmt: skip
    accelerator = SimpleNamespace(num_processes=1, gather=lambda y: y, reduce=lambda y, reduction: y)
    trainer: Any = SimpleNamespace(
        **given, loss_type=loss_type, args=SimpleNamespace(**given, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (x["logp"], torch.zeros_like(x["logp"]), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, max_completion_length=L_MAX,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=False), accelerator=accelerator,
        vllm_importance_sampling_correction=True, _entropy_bonus_enabled=False, _metrics={"eval": defaultdict(list)},
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )  # fmt: skip
    ids = torch.zeros(B, T, dtype=torch.int64)
    batch = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": x["mask"].to(x["logp"].dtype),
        "advantages": x["advantages"], "old_per_token_logps": x["old_logp"], "ref_per_token_logps": x["ref_logp"],
        "num_items_in_batch": torch.tensor(float(COUNT)),
    }  # fmt: skip
    if trainer.use_vllm:
        batch["importance_sampling_ratio"] = (x["old_logp"] - x["rollout_logp"]).exp().clamp(max=2.0)
    return (compute or GRPOTrainer._compute_loss)(trainer, None, batch)


def gmpo_loss(x: Given) -> Tensor:
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer

    one = {**x, "advantages": x["advantages"][:, 0]}
    return grpo_loss(one, "gmpo", GMPOTrainer._compute_loss, epsilon_low=0.4, epsilon_high=0.4)


def jsd_loss(x: Given, beta: float) -> Tensor:
    with contextlib.redirect_stdout(None):
        from trl.experimental.gkd import GKDTrainer

    labels = torch.where(x["mask"], 0, -100)
    return GKDTrainer.generalized_jsd_loss(x["logits"], x["teacher_logits"], labels, beta=beta)


def server_loss(x: Given, **options: Any) -> Tensor:
    from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer as Trainer

    trainer: Any = SimpleNamespace(_reduce_divergence_loss=Trainer._reduce_divergence_loss, **options)
    topk = x["teacher_logits"].log_softmax(-1).gather(-1, x["ids"])
    result = {"topk_logprobs": topk, "topk_token_ids": x["ids"]}
    return Trainer._compute_server_forward_kl_loss(
        trainer, result, x["logits"].log_softmax(-1), torch.where(x["mask"], 0, -100)
    )  # fmt: skip


def sdpo_loss(x: Given, alpha: float, tail: bool) -> Tensor:
    """SDPO's loss takes the student's top-K; with the roles of the two exchanged the support is the teacher's."""
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    token = compute_topk_self_distillation_loss(
        x["teacher_logits"], x["logits"], distillation_topk=K, distillation_alpha=alpha, distillation_add_tail=tail
    )  # fmt: skip
    return token[x["mask"]].mean()


CLIP_GSPO: dict[str, Any] = {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"}
CASES: dict[str, Case] = {
    "grpo": Case(ours("grpo"), lambda x: grpo_loss(x, "grpo")),
    "grpo + k3": Case(ours("grpo", reference=Reference(0.04, "k3")), lambda x: grpo_loss(x, "grpo", beta=0.04)),
    "bnpo": Case(ours("bnpo"), lambda x: grpo_loss(x, "bnpo")),
    "bnpo, dual clip": Case(ours("bnpo", dual_clip=1.3), lambda x: grpo_loss(x, "bnpo", delta=1.3)),
    "dr_grpo": Case(ours("dr_grpo", denominator=B * L_MAX), lambda x: grpo_loss(x, "dr_grpo")),
    "dapo": Case(ours("dapo", denominator=COUNT), lambda x: grpo_loss(x, "dapo", epsilon_high=0.28)),
    "tis": Case(ours("tis"), lambda x: grpo_loss(x, "bnpo", use_vllm=True)),
    "cispo": Case(ours("cispo", denominator=COUNT), lambda x: grpo_loss(x, "cispo", epsilon_high=5.0)),
    "cispo, clipped often": Case(
        ours("cispo", clip=(1.0, 0.1), denominator=COUNT), lambda x: grpo_loss(x, "cispo", epsilon_high=1.1)
    ),
    "sapo": Case(ours("sapo"), lambda x: grpo_loss(x, "sapo"), guard=2.0**-23),  # its 1.05 is a float32
    "gspo": Case(ours("gspo"), lambda x: grpo_loss(x, "grpo", **CLIP_GSPO), per_sequence=True),
    "luspo": Case(ours("luspo", clip=(3e-4, 4e-4)), lambda x: grpo_loss(x, "luspo", **CLIP_GSPO), per_sequence=True),
    "vespo": Case(ours("vespo", denominator=COUNT), lambda x: grpo_loss(x, "vespo"), per_sequence=True),
    "gmpo": Case(ours("gmpo"), gmpo_loss, per_sequence=True),
    "gkd_jsd": Case(ours_divergence("gkd_jsd"), lambda x: jsd_loss(x, 0.5), "logits"),
    "gkd_jsd, β = 0.1": Case(ours_divergence("gkd_jsd", beta=0.1), lambda x: jsd_loss(x, 0.1), "logits"),
    "forward_kl": Case(ours_divergence("forward_kl"), lambda x: jsd_loss(x, 0.0), "logits"),
    "reverse_kl": Case(ours_divergence("reverse_kl"), lambda x: jsd_loss(x, 1.0), "logits"),
    "trl_server_distillation": Case(ours_topk("trl_server_distillation"), lambda x: server_loss(x, loss_add_tail=True), "logits"),
    "ta_opd": Case(ours_topk("ta_opd"), lambda x: sdpo_loss(x, 0.0, True), "logits"),
    "lsm": Case(ours_topk("lsm"), lambda x: sdpo_loss(x, 0.0, False), "logits"),
    "ms_swift_topk": Case(ours_topk("ms_swift_topk"), lambda x: sdpo_loss(x, 0.5, False), "logits"),
}
