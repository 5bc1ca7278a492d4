"""REINFORCE: the policy gradient of the sampled tokens, without a ratio (Williams 1992; for language models arXiv 2402.14740)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlad_kernels.core.token_loss import Metrics
from rlad_kernels.core.types import TokenScores
from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.sampled import SampledLoss, reinforced


@dataclass(frozen=True, kw_only=True)
class REINFORCE(SampledLoss):
    """REINFORCE: −w·Â·s, w = 1 without the sampler's log-probs, else sg of ``rollout``'s weight (arXiv 2402.14740).

    For samples of the current policy: over several updates only ``rollout`` corrects it. The value is no objective, only its
    gradient is meant: d/ds = −w·Â. Summed over a sequence it is the gradient of the sequence's log-prob; RLOO is Â = the reward
    minus the mean reward of the group's others.

    Args:
        rollout: how ``rollout_logp`` weighs the tokens where that is given; None is min(π/μ, 2). π is that of ``old_logp`` or,
            without it, the current policy's; whole sequences need ``old_logp``.
        reference: as of :class:`GRPO`.

    Tensors of a call:
        logp, advantages, ref_logp, rollout_logp: as of :class:`GRPO`.
        old_logp: needed for a ``rollout`` of the policy ``old``, as of :class:`GRPO`.

    Metrics: kl_ref, rollout_weight_mean, rollout_clip_frac.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> logp = torch.tensor([[-1.0, -3.0]], requires_grad=True)
        >>> rk.losses.REINFORCE()(logp, advantages=torch.tensor([2.0])).loss.backward()
        >>> logp.grad
        tensor([[-2., -2.]])
    """

    reduction: str = "seq-mean-token-sum"

    needs = ("advantages",)
    takes = (*SampledLoss.takes, "old_logp")

    def needed(self) -> tuple[str, ...]:
        of_old = self.rollout is not None and self.rollout.policy == "old"
        return (*super().needed(), *(("old_logp",) if of_old else ()))

    def tokens(
        self,
        scores: TokenScores,
        *,
        advantages: Tensor,
        old_logp: Tensor | None = None,
        ref_logp: Tensor | None = None,
        rollout_logp: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        logp = scores.logp
        advantages, found = self.weighed(advantages, logp, logp if old_logp is None else old_logp, rollout_logp)
        return self.reference.add(reinforced(logp, advantages), found, logp, ref_logp)


add_method(
    "reinforce",
    "ratio",
    REINFORCE(),
    formula="−Â·s; Σ over a sequence's tokens, mean over sequences",
    paper="Williams 1992; arXiv 2402.14740",
    confidence="A",
    published=(
        "verl's compute_policy_loss_reinforce: sums of sequences, no clip, an optional detached weight π/μ; its gpg is the same "
        "with token-mean. RLOO's KL is in its reward, ours is a term."
    ),
    note="Over several updates on the same samples it is biased without a rollout's weights.",
)
