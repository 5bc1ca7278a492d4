"""Recipes of published methods that are no loss of their own: a reward, or a schedule, in front of a loss of the library.

python examples/recipes.py

Needs: nothing but rlad_kernels. Seconds on a CPU; each recipe is a function to copy. It prints

    rewards of four explanations: [-22.23, -20.64, -23.9, -18.11]
    scores [32.5, 40.0, 43.75, 43.75] as the advantages of GRPO: loss 0.0000

and the loss at six steps of a schedule, from 7.7034 to 0.0013.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import rlad_kernels as rk


def explanation_reward(
    student_logp: Tensor,
    teacher_logp: Tensor,
    think: Tensor,
    solution: Tensor,
    *,
    likely: tuple[float, float] = (5.0, 0.05),
    close: tuple[float, float] = (5.0, 0.05),
) -> Tensor:
    """The reward ``(B,)`` of a reinforcement-learned teacher for its explanations (arXiv 2506.08388).

    How likely the student finds the solution after reading the explanation, on average and at its worst token, less how far the
    explanation is from what the student would say by itself, on average and at its worst token: Σ KL is estimated as t − s.
    Factors are those of the authors' configuration, read in a copy of their code; it also takes the student's log-probs at
    temperature 0.7, ``rk.LMHead(…, temperature=0.7)``, and 1 off for an explanation without its tags.

    Args:
        student_logp: log-probs s ``(B, T)`` of explanation and solution from the student, who sees the question.
        teacher_logp: t ``(B, T)`` of the explanation from the teacher, who sees the solution too.
        think, solution: bool ``(B, T)``, where they stand.
        likely, close: factors of mean and worst token.
    """
    stat, kl = rk.spans.sequence_stat, teacher_logp - student_logp
    found = likely[0] * stat(student_logp, solution) + likely[1] * stat(student_logp, solution, how="min")
    return found - close[0] * stat(kl, think) - close[1] * stat(kl, think, how="max")


def structure_score(think: Tensor, query: Tensor, answer: Tensor) -> Tensor:
    """RLKD's score ``(B,)`` of how far a student's reasoning has the teacher's structure (arXiv 2505.16142).

    A model cuts both into steps of a thought, a query and an answer; a judge says of each step, bool ``(B, steps)``, whether they
    are the teacher's. A step counts 1, half as much for a wrong query and half for a wrong answer, up to the first wrong thought
    (their code; False beyond the last step).
    """
    alive = think.long().cumprod(1)
    return (alive * torch.where(query, 1.0, 0.5) * torch.where(answer, 1.0, 0.5)).sum(1)


def group_advantages(reward: Tensor, group: int) -> Tensor:
    """GRPO's advantages ``(B,)``: rewards less their group's mean, by its standard deviation.

    ``group`` answers in a row are to one prompt. Any number that an answer has will do: a reward model's score, or RLKD's
    15·right + 10·format + 10·tags + 15·structure.
    """
    of_group = reward.view(-1, group)
    return ((of_group - of_group.mean(1, keepdim=True)) / (of_group.std(1, keepdim=True) + 1e-4)).flatten()


class Stage(NamedTuple):
    """From step ``start`` on: the temperature of the soft part, and its share of the loss."""

    start: int
    temperature: float
    soft: float


STAGES = (Stage(0, 4.0, 1.0), Stage(100, 2.0, 0.5), Stage(200, 1.0, 0.0))


def stage_of(step: int, stages: Sequence[Stage] = STAGES) -> Stage:
    return [s for s in stages if s.start <= step][-1]


def staged_distillation(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, target: Tensor, weights: Tensor, step: int,
    stages: Sequence[Stage] = STAGES,
) -> Tensor:  # fmt: skip
    """soft·T²·KL(p_T‖q_T) + (1 − soft)·cross-entropy on what the teacher wrote, each a weighted mean; T and soft by stages.

    From soft targets at a high temperature (arXiv 1503.02531, whose T² keeps the gradient's size) to the teacher's own words (arXiv
    1606.07947). The schedule is an example, from no paper.

    Args:
        hidden, teacher_hidden: ``(B, T, D)``, the teacher's without gradient.
        weight, teacher_weight: the heads.
        target: the teacher's tokens ``(B, T)``.
        weights: ``(B, T)``: a sequence's score at each of its tokens (``rk.masks.spread``), 0 for a token that is not to count.
    """
    at, total = stage_of(step, stages), torch.zeros((), device=hidden.device)
    mean = rk.Reduction(denominator=weights.sum())
    if at.soft:
        student, teacher = (rk.LMHead(w, temperature=at.temperature) for w in (weight, teacher_weight))
        kl = rk.linear_divergence_loss(
            hidden,
            student,
            teacher_hidden,
            teacher,
            rk.losses.ForwardKL(),
            weights=weights,
            scale=at.temperature**2,
            reduction=mean,
        )
        total = total + at.soft * kl.loss
    if at.soft < 1:
        ce = rk.linear_loss(hidden, rk.LMHead(weight), target, rk.losses.CrossEntropy(), weights=weights, reduction=mean)
        total = total + (1 - at.soft) * ce.loss
    return total


def main() -> None:
    torch.manual_seed(0)
    b, t, d, v = 4, 8, 16, 50
    hidden, weight = torch.randn(b, t, d), torch.nn.Parameter(torch.randn(v, d) * 0.1)
    target = torch.randint(v, (b, t))
    old = rk.linear_logp(hidden, rk.LMHead(weight), target).logp.detach()

    think = (torch.arange(t) < 5).expand(b, t)
    reward = explanation_reward(old, old + 0.3 * torch.randn(b, t), think, ~think)
    print("rewards of four explanations:", [round(x, 2) for x in reward.tolist()])

    judged = torch.rand(3, b, 3) > 0.3
    score = 15 * structure_score(*judged) + 10.0
    advantages = group_advantages(score, 2)
    out = rk.linear_loss(hidden, rk.LMHead(weight), target, rk.losses.GRPO(), old_logp=old, advantages=advantages)
    print(f"scores {score.tolist()} as the advantages of GRPO: loss {out.loss.item():.4f}")

    teacher_hidden, teacher_weight = torch.randn(b, t, d), torch.randn(v, d)
    optimizer, weights = torch.optim.Adam([weight], lr=0.05), torch.rand(b, 1).expand(b, t)
    for step in range(300):
        loss = staged_distillation(hidden, weight, teacher_hidden, teacher_weight, target, weights, step)
        if step in (0, 99, 100, 199, 200, 299):
            print(f"step {step}: {stage_of(step)}: loss {loss.item():.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
