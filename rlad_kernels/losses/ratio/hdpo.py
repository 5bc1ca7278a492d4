"""HDPO: distillation where a whole group is wrong and reinforcement has nothing to say (arXiv 2609.04108, table of methods)."""

from __future__ import annotations

from dataclasses import dataclass

from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.kdrl import KDRL


@dataclass(frozen=True, kw_only=True)
class HDPO(KDRL):
    """HDPO: −min(rA, clip(r)A), A = Â + 1[all of the group wrong]·β·sg[t − s] (as in arXiv 2609.04108).

    It is :class:`KDRL` in the reward, on wrong groups, with a clip; options, tensors and metrics are that one's.

    Args:
        kd_coef: β; no published value is known to us.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.zeros(2, 1)
        >>> given = {"old_logp": logp, "advantages": torch.zeros(2), "teacher_logp": logp - 1.0}
        >>> rk.losses.HDPO()(logp, **given, correct=torch.tensor([True, False]), group_ids=torch.tensor([0, 1])).loss
        tensor(0.5000)
    """

    clip: tuple[float, float] | None = (0.2, 0.2)
    kd_coef: float = 1.0
    form: str = "in-reward"
    teach: str = "wrong-groups"


add_method(
    "hdpo",
    "ratio",
    HDPO(),
    formula="−min(rA, clip(r)A), A = Â + 1[all wrong]·β·sg[t − s]",
    paper="arXiv 2609.04108",
    confidence="A",
    note="As the paper that compares it writes it; the method's own paper was not read.",
    published=(
        "As compared there: PPO's clip of 0.2, no KL, the gap t − s detached, verl with no reduction named (token mean, its "
        "default, here); β is not stated (1 here). The method's own paper, arXiv 2603.23871, distils the whole distribution on "
        "privileged rollouts."
    ),
)
