"""verl 0.9.1: trainer/ppo/core_algos.py and trainer/distillation; ``python -m tests.official.verl`` runs the cases.

They run in a process of their own, where empty modules stand in for what verl imports and is not installed.
"""

from __future__ import annotations

import json
import traceback
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlad_kernels.losses import Reference, Rollout
from tests.official import NO_CLIP, SEEDS, B, Case, Given, compare, ours, ours_topk, runs

MISSING = find_spec("verl") is None
L_MAX = 9
WIDE: dict[str, Any] = {"clip_ratio_low": 1.0, "clip_ratio_high": NO_CLIP}  # no clip


def config(**options: Any) -> Any:
    """An ActorConfig; without ``clip_ratio_c`` there is no dual clip, where verl's default is 3."""
    from verl.workers.config import ActorConfig, PolicyLossConfig

    more = {k: options.pop(k) for k in ("clip_cov_ratio", "kl_cov_ratio", "ppo_kl_coef", "dro_beta") if k in options}
    rest = {"clip_ratio_c": NO_CLIP, "global_batch_info": {}, "policy_loss": PolicyLossConfig(**more), **options}
    return ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **rest)


def core() -> Any:
    from verl.trainer.ppo import core_algos

    return core_algos


def policy(x: Given, name: str = "vanilla", mode: str = "token-mean", weights: Any = None, **options: Any) -> Tensor:
    given = (x["old_logp"], x["logp"], x["advantages"], x["mask"].to(x["logp"].dtype))
    return core().get_policy_loss_fn(name)(*given, mode, config(**options), weights)[0]


def reinforce(x: Given) -> Tensor:
    mask = x["mask"].to(x["logp"].dtype)
    return core().compute_policy_loss_reinforce(x["rollout_logp"], x["logp"], x["advantages"], mask, config=config())[0]


def is_weights(x: Given, threshold: float | str, level: str = "token") -> Tensor:
    """The weights of verl's rollout correction: one bound is TIS, two are IcePop."""
    from verl.trainer.ppo import rollout_corr_helper as helper

    helper.compute_is_metrics = lambda **_: {}
    gap = x["old_logp"] - x["rollout_logp"]
    return helper.compute_rollout_correction_weights(gap, x["mask"].to(gap.dtype), level, threshold)[0]


def kl(x: Given, to: str, name: str) -> Tensor:
    return core().agg_loss(core().kl_penalty(x["logp"], x[to], name), x["mask"].to(x["logp"].dtype), "token-mean")


def k1(x: Given, who: str, to: str) -> Tensor:
    return core().kl_penalty(x[f"{who}_logp"], x[f"{to}_logp"], "k1")


def rewarded(x: Given, reward: Tensor) -> Given:
    """The batch with the negative of a KL as advantages, as verl has a distillation reward."""
    return {**x, "advantages": -reward.detach()}


def distilling(x: Given, bound: float = NO_CLIP) -> Given:
    return rewarded(x, k1(x, "old", "teacher").clamp(-bound, bound))


def extrapolated(x: Given) -> Given:
    """ExOPD's reward: −[(o − b) − 1.25(t − b)]."""
    return rewarded(x, k1(x, "old", "base") - 1.25 * k1(x, "teacher", "base"))


def distilled(x: Given, policy_gradient: bool) -> Tensor:
    """``distillation_loss`` of the top-K forward KL, whose tokens are packed, as its logits processor has them."""
    from verl.trainer.distillation import losses
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
    from verl.workers.config import DistillationLossConfig

    options = DistillationLossConfig(loss_mode="forward_kl_topk", use_policy_gradient=policy_gradient)
    wrapped, mask = SimpleNamespace(distillation_loss=options), x["mask"]
    topk = x["teacher_logits"].log_softmax(-1).gather(-1, x["ids"])
    nested = [SimpleNamespace(is_nested=True, values=lambda y=y: y[mask]) for y in (topk, x["ids"])]
    found = compute_forward_kl_topk(x["logits"][mask].unsqueeze(0), *nested, wrapped, "thd")  # type: ignore[arg-type]

    def padded(packed: Tensor, _: Any) -> Tensor:
        zeros = torch.zeros_like(mask, dtype=packed.dtype)
        return packed if packed.shape == mask.shape else zeros.index_put(mask.nonzero(as_tuple=True), packed[0])

    losses.no_padding_2_padding = padded  # nested tensors need tensordict
    data = {
        "response_mask": mask,
        "old_log_probs": x["old_logp"],
        "dp_size": 1,
        "batch_num_tokens": None,
        "global_batch_size": None,
    }
    actor = SimpleNamespace(loss_agg_mode="token-mean", loss_scale_factor=None, global_batch_info={})
    return losses.distillation_loss(actor, wrapped, {"log_probs": x["logp"], **found}, data)[0]  # type: ignore[arg-type]


GSPO: dict[str, Any] = {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}
SEQ, GUARD = "seq-mean-token-mean", 1e-8  # which it adds to the divisor of a sequence's mean
NORM: dict[str, Any] = {"global_batch_info": {"global_batch_size": B, "loss_scale_factor": L_MAX}}
DPPO_TV: dict[str, Any] = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15}
DPPO_KL: dict[str, Any] = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05}
GMPO: dict[str, Any] = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
CASES: dict[str, Case] = {
    "grpo": Case(ours("grpo"), lambda x: policy(x, mode=SEQ), guard=GUARD),
    "bnpo": Case(ours("bnpo"), policy),
    "dr_grpo": Case(ours("dr_grpo", denominator=B * L_MAX), lambda x: policy(x, mode="seq-mean-token-sum-norm", **NORM)),
    "dapo": Case(ours("dapo"), lambda x: policy(x, clip_ratio_high=0.28)),
    "tis": Case(ours("tis"), lambda x: policy(x, weights=is_weights(x, 2.0))),
    "icepop": Case(
        ours("icepop", reduction="seq-mean-token-mean"),
        lambda x: policy(x, mode=SEQ, weights=is_weights(x, "0.5_5.0")),
        guard=GUARD,
    ),
    "gspo": Case(ours("gspo"), lambda x: policy(x, "gspo", SEQ, **GSPO), per_sequence=True, guard=GUARD),
    "gspo_token": Case(ours("gspo_token"), lambda x: policy(x, "gspo", SEQ, **GSPO), guard=GUARD),
    "cispo": Case(ours("cispo"), lambda x: policy(x, "cispo", clip_ratio_low=1.0, clip_ratio_high=4.0)),
    "cispo, clipped often": Case(
        ours("cispo", clip=(0.1, 0.1)), lambda x: policy(x, "cispo", clip_ratio_low=0.1, clip_ratio_high=0.1)
    ),
    "sapo": Case(ours("sapo"), lambda x: policy(x, "sapo"), guard=GUARD),
    "bnpo + k2": Case(ours("bnpo", reference=Reference(0.3, "k2")), lambda x: policy(x) + 0.3 * kl(x, "ref_logp", "k2")),
    "bnpo + k3": Case(ours("bnpo", reference=Reference(0.3, "k3")), lambda x: policy(x) + 0.3 * kl(x, "ref_logp", "k3")),
    "bnpo + k3+": Case(ours("bnpo", reference=Reference(0.3, "k3+")), lambda x: policy(x) + 0.3 * kl(x, "ref_logp", "k3+")),
    "kdrl": Case(ours("kdrl"), lambda x: policy(x, **WIDE) + 2e-3 * kl(x, "teacher_logp", "k2")),
    "opd": Case(ours("opd"), lambda x: policy(distilling(x), **WIDE)),
    "opd_clipped": Case(ours("opd_clipped"), lambda x: policy(distilling(x, 5.0), clip_ratio_c=3.0)),
    "exopd": Case(ours("exopd"), lambda x: policy(extrapolated(x), clip_ratio_c=3.0)),
    "exopd, rollout": Case(
        ours("exopd", rollout=Rollout(high=5.0)), lambda x: policy(extrapolated(x), weights=is_weights(x, 5.0), clip_ratio_c=3.0)
    ),
    "seq_tis": Case(ours("seq_tis"), lambda x: policy(x, weights=is_weights(x, 2.0, "sequence"))),
    "seq_mis": Case(ours("seq_mis"), lambda x: policy(x, weights=is_weights(x, "0.5_2.0", "sequence"))),
    "luspo": Case(ours("luspo", clip=(3e-4, 4e-4)), lambda x: policy(x, "gspo", "seq-mean-token-sum", **GSPO), per_sequence=True),
    "dppo_tv": Case(ours("dppo_tv"), lambda x: policy(x, "dppo_tv", **DPPO_TV)),
    "dppo_kl": Case(ours("dppo_kl"), lambda x: policy(x, "dppo_kl", **DPPO_KL)),
    "dppo_kl, cut": Case(
        ours("dppo_kl", ratio_max=2.0, delta=(0.05, 0.1)),
        lambda x: policy(x, "dppo_kl", clip_ratio_low=0.05, clip_ratio_high=0.1, clip_ratio_c=2.0),
    ),
    "gmpo": Case(ours("gmpo"), lambda x: policy(x, "geo_mean", **GMPO), per_sequence=True, guard=4 * GUARD),
    "clip_cov": Case(ours("clip_cov", fraction=1.0), lambda x: policy(x, "clip_cov", clip_cov_ratio=1.0), selects=True),
    "kl_cov, a third": Case(ours("kl_cov", fraction=0.34), lambda x: policy(x, "kl_cov", kl_cov_ratio=0.34, ppo_kl_coef=1.0)),
    "reinforce": Case(ours("reinforce"), reinforce),
    "kl_cov": Case(ours("kl_cov"), lambda x: policy(x, "kl_cov", kl_cov_ratio=2e-4, ppo_kl_coef=1.0)),
    "verl_forward_kl_topk": Case(ours_topk("verl_forward_kl_topk"), lambda x: distilled(x, False), "logits"),
    "verl_topk_pg": Case(ours_topk("verl_topk_pg"), lambda x: distilled(x, True)),
}


def main() -> None:
    """Print what failed of each case, as JSON."""
    from tests import verl_world

    verl_world.enter()
    float32 = torch.Tensor.float
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else float32(x)  # type: ignore[method-assign]
    failed = {}
    for name, dtype in runs(CASES):
        try:
            assert sum(compare(CASES[name], seed, dtype) for seed in SEEDS)
        except Exception:
            failed[f"{name}, {dtype}"] = traceback.format_exc()
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
