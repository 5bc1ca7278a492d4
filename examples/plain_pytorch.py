"""Before and after in a hand-written RL loop: the same loss and gradients, without the logits.

python examples/plain_pytorch.py  # step 0: loss -0.071888 before, -0.071888 after; gradients equal to 1e-5; and two more
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rlad_kernels as rk

VOCAB, DIM, GROUPS, GROUP, PROMPT, ANSWER, CLIP, TEMPERATURE = 4_000, 64, 4, 4, 8, 24, 0.2, 0.9


class Policy(nn.Module):
    """Any model whose backbone and head can be called apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.mix = nn.GRU(DIM, DIM, batch_first=True)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.mix(self.embed(tokens))[0]


def before(policy: Policy, tokens: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    logits = policy.lm_head(policy.hidden(tokens[:, :-1])).float() / TEMPERATURE  # (B, T, V): this is what memory goes to
    logp = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    ratio = (logp - old_logp).exp()
    surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[:, None])
    return -(surrogate * mask).sum() / mask.sum()


def after(policy: Policy, tokens: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    head = rk.LMHead(policy.lm_head.weight, temperature=TEMPERATURE)
    grpo, hidden = rk.losses.GRPO(clip=(CLIP, CLIP)), policy.hidden(tokens[:, :-1])
    return rk.linear_loss(hidden, head, tokens[:, 1:], grpo, old_logp=old_logp, advantages=advantages, mask=mask).loss


@torch.no_grad()
def rollout(policy: Policy) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample groups of answers, reward even tokens, and score the answers once more under the policy that sampled."""
    tokens = torch.randint(VOCAB, (GROUPS, PROMPT)).repeat_interleave(GROUP, 0)
    for _ in range(ANSWER):
        logits = policy.lm_head(policy.hidden(tokens)[:, -1]) / TEMPERATURE
        tokens = torch.cat([tokens, logits.softmax(-1).multinomial(1)], 1)
    reward = (tokens[:, PROMPT:] % 2 == 0).float().mean(1).view(GROUPS, GROUP)
    advantages = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).flatten()
    mask = (torch.arange(tokens.shape[1] - 1) >= PROMPT - 1).expand(len(tokens), -1)  # position t predicts token t + 1
    head = rk.LMHead(policy.lm_head.weight, temperature=TEMPERATURE)
    old_logp = rk.linear_logp(policy.hidden(tokens[:, :-1]), head, tokens[:, 1:], mask=mask).logp
    return tokens, old_logp, advantages, mask


def main() -> None:
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(3):
        batch = rollout(policy)
        for _ in range(2):  # two updates a rollout: the second one has ratios away from 1
            losses, gradients = [], []
            for loss_of in (before, after):
                optimizer.zero_grad()
                losses.append(loss_of(policy, *batch))
                losses[-1].backward()
                gradients.append([p.grad.clone() for p in policy.parameters()])
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
            for ours, naive in zip(gradients[1], gradients[0], strict=True):
                assert (ours - naive).norm() <= 1e-5 * naive.norm()
            optimizer.step()
        print(f"step {step}: loss {losses[0].item():+.6f} before, {losses[1].item():+.6f} after; gradients equal to 1e-5")


if __name__ == "__main__":
    main()
