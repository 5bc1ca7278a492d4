"""OpenRLHF 0.11.2, models/loss.py: its module alone, whose package would want DeepSpeed and Ray."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

import rlad_kernels as rk
from rlad_kernels.losses import Reference
from tests.official import Case, Given, ours

MISSING = find_spec("openrlhf") is None


@cache
def modules() -> tuple[ModuleType, ModuleType]:
    """``openrlhf.models.loss`` and ``.utils`` without their package's ``__init__``; neither it nor deepspeed stays a module."""
    spec = find_spec("openrlhf")
    assert spec is not None and spec.submodule_search_locations is not None
    package, deepspeed = ModuleType("openrlhf.models"), ModuleType("deepspeed")
    package.__path__ = [str(Path(next(iter(spec.submodule_search_locations))) / "models")]
    sys.modules |= {"openrlhf.models": package, "deepspeed": deepspeed}
    try:
        return import_module("openrlhf.models.loss"), import_module("openrlhf.models.utils")
    finally:  # what else they have imported stays: parts of torch cannot be imported twice
        for name in [n for n in sys.modules if n.split(".")[0] in ("openrlhf", "deepspeed")]:
            del sys.modules[name]


def policy(x: Given, **options: Any) -> Tensor:
    rest = (x["old_logp"], x["advantages"], x["mask"].to(x["logp"].dtype), x["rollout_logp"])
    return modules()[0].PolicyLoss(**options)(x["logp"], *rest)[0]


def sft(x: Given) -> Tensor:
    return modules()[0].SFTLoss()(x["logp"], x["mask"].to(x["logp"].dtype))


def with_kl(x: Given, coef: float, **how: Any) -> Tensor:
    """The policy loss and a KL to the reference, both per token, as its actor's trainer adds them."""
    loss, utils = modules()
    kl = utils.compute_approx_kl(x["logp"], x["ref_logp"], **how)
    return policy(x) + coef * loss.aggregate_loss(kl, x["mask"].to(x["logp"].dtype))


def sft_ours(x: Given) -> rk.losses.LossOutput:
    return rk.METHODS["seq_kd"](x["logp"], mask=x["mask"])


DAPO = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
GUARD = 1e-8  # in the divisor of a sequence's mean
OFF = {"is_correction_level": "token"}
CASES: dict[str, Case] = {
    "grpo": Case(ours("grpo"), lambda x: policy(x, token_level_loss=False), guard=GUARD),
    "bnpo": Case(ours("bnpo"), policy),
    "dapo": Case(ours("dapo"), lambda x: policy(x, **DAPO)),
    "bnpo, dual clip": Case(ours("bnpo", dual_clip=1.3), lambda x: policy(x, dual_clip=1.3)),
    "gspo": Case(
        ours("gspo", clip=(0.2, 0.2)), lambda x: policy(x, policy_loss_type="gspo"), per_sequence=True, guard=GUARD
    ),  # its default clip, which is not the paper's
    "gspo, the paper's clip": Case(
        ours("gspo"),
        lambda x: policy(x, policy_loss_type="gspo", clip_eps_low=3e-4, clip_eps_high=4e-4),
        per_sequence=True,
        guard=GUARD,
    ),
    "tis": Case(ours("tis"), lambda x: policy(x, **OFF, is_correction_mode="clip", is_correction_threshold=(0.0, 2.0))),
    "icepop": Case(ours("icepop", reduction="token-mean"), lambda x: policy(x, **OFF, is_correction_threshold=(0.5, 5.0))),
    "icepop, by sequences": Case(
        ours("icepop", reduction="seq-mean-token-mean"), lambda x: policy(x, **OFF, token_level_loss=False), guard=GUARD
    ),
    "seq_kd": Case(sft_ours, sft),
    "bnpo + k2": Case(ours("bnpo", reference=Reference(0.3, "k2")), lambda x: with_kl(x, 0.3, kl_estimator="k2")),
    "bnpo + k3": Case(ours("bnpo", reference=Reference(0.3, "k3")), lambda x: with_kl(x, 0.3, kl_estimator="k3")),
    "bnpo + k3+": Case(
        ours("bnpo", reference=Reference(0.3, "k3+")), lambda x: with_kl(x, 0.3, kl_estimator="k3", unbiased_gradient=True)
    ),
}
