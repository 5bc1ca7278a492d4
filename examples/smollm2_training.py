"""Part two of ``rlad_smollm2.py``: on-policy self-distillation with RLAD on small sums whose answers can be verified.

Each step: the student answers a batch of problems, several times each (top-p rollouts); the answers are verified (reward 0 or 1)
and compared within their group (GRPO advantages); the teacher, the untrained model shown the answer in its prompt, scores the very
tokens the student wrote; and ``linear_loss`` makes one gradient of all of it. No logits are built over a prompt, nor over a batch.
"""

from __future__ import annotations

import copy
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import smollm2_report as report
import torch
from torch import Tensor
from tqdm import tqdm

import rlad_kernels as rk

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": True}
Chat = list[dict[str, str]]
Bundle = TypeVar("Bundle", bound=tuple)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a run, next to the model and the seed."""

    steps: int = 15
    prompts: int = 16  # problems a step
    group: int = 4  # answers a problem
    updates: int = 2  # optimiser steps a batch, each on its own share of the problems
    max_new: int = 12  # tokens an answer
    top_p: float = 0.9
    lr: float = 5e-5
    warmup: int = 3
    last_lr: float = 0.1  # share of lr left at the end of the linear decay
    alpha: float = 0.5
    teacher_clamp: float = 2.0
    topk: int = 16
    topk_kl_coef: float = 1.0
    filter_eps: float = 0.0  # above it, gradient goes through likely columns only
    max_grad_norm: float = 1.0
    held_out: int = 240
    evaluate_every: int = 8


class Problem(NamedTuple):
    question: str
    answer: str

    @property
    def expression(self) -> str:
        """``7 + 5 =``, without the words around it."""
        return self.question.rpartition(": ")[2]

    @property
    def negative_term(self) -> bool:
        return "-" in self.expression.replace(" - ", " ")


ASK = "State the final answer to the following arithmetic problem:"  # the generator's own words
WORKED = (Problem(f"{ASK} 25 - -30 =", "55"), Problem(f"{ASK} -12 + 30 =", "18"))


class Reading(NamedTuple):
    """Prompts the model has read: keys and values of all tokens but the last, the last token, and which cache slots are real."""

    cache: Any
    last: Tensor  # (rows, 1)
    seen: Tensor  # (rows, slots)


class Rollout(NamedTuple):
    """Answers ``(rows, T)``: token ids, their untruncated log-probs, the mask of real tokens, the entropy at each."""

    tokens: Tensor
    logp: Tensor
    mask: Tensor
    entropy: Tensor


def load_problems(seed: int, held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Every distinct question the generator has, shuffled and cut into training and held-out problems."""
    import reasoning_gym

    drawn = reasoning_gym.create_dataset("chain_sum", **SUMS, size=10_000, seed=0)
    distinct = sorted({Problem(item["question"], item["answer"]) for item in drawn})
    random.Random(seed).shuffle(distinct)
    return distinct[held_out:], distinct[:held_out]


def student_chat(problem: Problem) -> Chat:
    return [{"role": "user", "content": f"{problem.question}\nReply with the answer only."}]


def teacher_chat(problem: Problem) -> Chat:
    """The same request with the answer given away, after two worked examples that restate the sum before its answer.

    The worked examples have two-digit terms: no training or held-out problem is among them.
    """
    chat: Chat = []
    for shown in (*WORKED, problem):
        request = f"{shown.question}\nReply with the answer only. The answer is {shown.answer}."
        chat += [{"role": "user", "content": request}, {"role": "assistant", "content": f"{shown.expression} {shown.answer}"}]
    return chat[:-1]


def right(reply: str, problem: Problem) -> bool:
    """Whether the last number in the reply is the answer, whatever words stand around it."""
    return re.findall(r"-?\d+", reply)[-1:] == [problem.answer]


class Task(NamedTuple):
    """What the student and the teacher are asked about a problem, and what a reply is worth, between 0 and 1."""

    student: Callable[[Problem], Chat]
    teacher: Callable[[Problem], Chat]
    score: Callable[[str, Problem], float]


SUMS_TASK = Task(student_chat, teacher_chat, right)


def extend(model: Any, cache: Any, seen: Tensor, tokens: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Read ``tokens`` after what the cache holds: their final hidden states, and the longer mask of real slots."""
    seen = torch.cat([seen, torch.ones_like(tokens) if keep is None else keep], dim=1)
    positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    output = model.base_model(tokens, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True)
    return output.last_hidden_state, seen


def read(model: Any, tokenizer: Any, chats: Sequence[Chat], group: int = 1) -> Reading:
    """Read each prompt once for its whole group, and the opening that all prompts share once for all of them.

    Gradient flows through the cache, so this serves rollouts, the teacher and the training pass alike.
    """
    from transformers import DynamicCache

    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*(row[:-2] for row in ids), strict=False)))
    rest = [row[shared:-1] for row in ids]
    padding = [[0] * (max(map(len, rest)) - len(row)) for row in rest]
    device = model.device
    tokens = torch.tensor([pad + row for pad, row in zip(padding, rest, strict=True)], device=device)
    keep = torch.tensor([pad + [1] * len(row) for pad, row in zip(padding, rest, strict=True)], device=device)
    cache = DynamicCache(config=model.config)
    seen = torch.ones(1, 0, dtype=torch.long, device=device)
    if shared:
        _, seen = extend(model, cache, seen, torch.tensor([ids[0][:shared]], device=device))
        cache.batch_repeat_interleave(len(ids))
    _, seen = extend(model, cache, seen.expand(len(ids), -1), tokens, keep)
    cache.batch_repeat_interleave(group)
    last = torch.tensor([row[-1:] for row in ids], device=device)
    return Reading(cache, last.repeat_interleave(group, 0), seen.repeat_interleave(group, 0))


def nucleus(logp: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """One token a row from the smallest set of tokens that holds a mass of ``top_p`` (256 tokens at most)."""
    best, ids = logp.topk(256, dim=-1)
    mass = best.exp()
    mass[mass.cumsum(-1) - mass >= top_p] = 0
    return ids.gather(-1, torch.multinomial(mass, 1, generator=generator)).squeeze(-1)


@torch.no_grad()
def answer(model: Any, reading: Reading, max_new: int, eos: int, choose: Callable[[Tensor], Tensor]) -> Rollout:
    """Write answers token by token until every row has ended; only the last position ever meets the head."""
    token, seen = reading.last, reading.seen
    alive = torch.ones(len(token), dtype=torch.bool, device=token.device)
    columns = []
    for _ in range(max_new):
        hidden, seen = extend(model, reading.cache, seen, token)
        logp = model.get_output_embeddings()(hidden[:, -1]).float().log_softmax(-1)
        picked = torch.where(alive, choose(logp), eos)
        columns.append((picked, logp.gather(-1, picked[:, None]).squeeze(-1), alive, -(logp.exp() * logp).sum(-1)))
        alive = alive & (picked != eos)
        token = picked[:, None]
        if not alive.any():
            break
    return Rollout(*(torch.stack(column, dim=1) for column in zip(*columns, strict=True)))


def response_hidden(model: Any, reading: Reading, tokens: Tensor) -> Tensor:
    """Final hidden states at exactly the positions that predict ``tokens``: no prompt position reaches the head."""
    return extend(model, reading.cache, reading.seen, torch.cat([reading.last, tokens[:, :-1]], dim=1))[0]


def decode(tokenizer: Any, rollout: Rollout) -> list[str]:
    return [
        tokenizer.decode(row[keep], skip_special_tokens=True).strip()
        for row, keep in zip(rollout.tokens, rollout.mask, strict=True)
    ]


def advantages(rewards: Tensor, group: int) -> Tensor:
    """GRPO: how much better than its group, in the group's standard deviations; 0 where all did equally well."""
    groups = rewards.view(-1, group)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def rows_of(bundle: Bundle, rows: slice) -> Bundle:
    """The same named tuple of tensors, with some of the rows."""
    return type(bundle)(*(None if field is None else field[rows] for field in bundle))


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, problems: Sequence[Problem], max_new: int, task: Task = SUMS_TASK) -> list[str]:
    """The model's likeliest reply to each problem, token by token."""
    replies: list[str] = []
    for start in tqdm(range(0, len(problems), 60), desc="answering", leave=False, disable=None):
        reading = read(model, tokenizer, list(map(task.student, problems[start : start + 60])))
        replies += decode(tokenizer, answer(model, reading, max_new, tokenizer.eos_token_id, lambda logp: logp.argmax(-1)))
    return replies


def accuracy(model: Any, tokenizer: Any, problems: Sequence[Problem], max_new: int) -> dict[str, Any]:
    """Greedy answers to the sums: the share that is right, with its standard error."""
    replies = greedy(model, tokenizer, problems, max_new)
    marks = list(map(right, replies, problems))

    def share(negative: bool | None) -> list[float]:
        kept = [
            mark for mark, problem in zip(marks, problems, strict=True) if negative is None or problem.negative_term == negative
        ]
        mean = sum(kept) / max(1, len(kept))
        return [mean, math.sqrt(mean * (1 - mean) / max(1, len(kept))), len(kept)]

    samples = [(problem.expression, problem.answer, reply) for problem, reply in zip(problems, replies, strict=True)][:4]
    return {"all": share(None), "no_negative_term": share(False), "negative_term": share(True), "samples": samples}


class Trainer:
    """The student, the frozen teacher, the optimiser, and one step of the recipe."""

    def __init__(
        self, model: Any, tokenizer: Any, recipe: Recipe, problems: Sequence[Problem], seed: int, *,
        task: Task = SUMS_TASK, loss: rk.TokenLoss | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.recipe, self.problems, self.task = model, tokenizer, recipe, problems, task
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        topk = rk.losses.TopKKL("reverse", normalize="both")
        self.loss = loss or rk.losses.RLAD(
            alpha=recipe.alpha, teacher_clamp=recipe.teacher_clamp, topk=topk, topk_coef=recipe.topk_kl_coef
        )  # fmt: skip
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self.shuffler = random.Random(seed)
        self.queue: list[Problem] = []
        self.done = 0

    def next_problems(self) -> list[Problem]:
        """The next problems of a shuffled pass over the training set; a new pass starts when it runs out."""
        count = self.recipe.prompts
        while len(self.queue) < count:
            self.queue += self.shuffler.sample(list(self.problems), len(self.problems))
        batch, self.queue = self.queue[:count], self.queue[count:]
        return batch

    def rollouts(self, batch: list[Problem]) -> tuple[Rollout, Tensor]:
        """Several sampled answers a problem, and their rewards."""
        recipe = self.recipe
        with torch.no_grad():
            reading = read(self.model, self.tokenizer, list(map(self.task.student, batch)), recipe.group)
        choose = lambda logp: nucleus(logp, recipe.top_p, self.generator)  # noqa: E731
        rollout = answer(self.model, reading, recipe.max_new, self.tokenizer.eos_token_id, choose)
        asked = [problem for problem in batch for _ in range(recipe.group)]
        return rollout, torch.tensor(
            list(map(self.task.score, decode(self.tokenizer, rollout), asked)), device=self.model.device
        ).float()

    @torch.no_grad()
    def teach(self, batch: list[Problem], rollout: Rollout) -> rk.TopK:
        """The teacher's top-K and its log-prob of every sampled token, over the answers only."""
        reading = read(self.teacher, self.tokenizer, list(map(self.task.teacher, batch)), self.recipe.group)
        hidden = response_hidden(self.teacher, reading, rollout.tokens)
        head = rk.LMHead.from_model(self.teacher)
        return rk.linear_topk(hidden, head, self.recipe.topk, target=rollout.tokens, mask=rollout.mask)

    def update(self, batch: list[Problem], rollout: Rollout, teacher: rk.TopK, advantage: Tensor) -> dict[str, float]:
        """One optimiser step on these problems and their answers."""
        recipe = self.recipe
        reading = read(self.model, self.tokenizer, list(map(self.task.student, batch)), recipe.group)
        hidden = response_hidden(self.model, reading, rollout.tokens)
        head, given = rk.LMHead.from_model(self.model), {"old_logp": rollout.logp, "advantages": advantage, "teacher": teacher}
        given = {name: given[name] for name in self.loss.needed()}
        given |= {"mask": rollout.mask, "reduction": "seq-mean-token-mean", "filter_eps": recipe.filter_eps}
        out = rk.linear_loss(hidden, head, rollout.tokens, self.loss, **given)
        self.optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
        self.optimizer.step()
        return dict(loss=out.loss.item(), **{name: value.item() for name, value in out.metrics.items()})

    def step(self) -> dict[str, float]:
        """Roll out, verify, let the teacher score, update; what happened, as numbers."""
        recipe, start = self.recipe, time.perf_counter()
        decay = 1 - (1 - recipe.last_lr) * self.done / recipe.steps
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (self.done + 1) / recipe.warmup) * decay
        batch = self.next_problems()
        rollout, rewards = self.rollouts(batch)
        teacher, advantage = self.teach(batch, rollout), advantages(rewards, recipe.group)
        share = math.ceil(len(batch) / recipe.updates)
        parts = []
        for first in range(0, len(batch), share):
            rows = slice(first * recipe.group, (first + share) * recipe.group)
            scores = (rows_of(rollout, rows), rows_of(teacher, rows), advantage[rows])
            parts.append(self.update(batch[first : first + share], *scores))
        self.done += 1
        kept = rollout.mask.sum()
        numbers = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        numbers |= {"reward": rewards.mean().item(), "entropy": (rollout.entropy[rollout.mask].sum() / kept).item()}
        return numbers | {"length": (kept / len(rewards)).item(), "seconds": time.perf_counter() - start}


def train(model: Any, tokenizer: Any, recipe: Recipe, seed: int, out: Path) -> dict[str, Any]:
    """The whole of part two: accuracy before, the run, accuracy after, the table and the curves."""
    training, held_out = load_problems(seed, recipe.held_out)
    report.opening(len(training), len(held_out), asdict(recipe))
    trainer = Trainer(model, tokenizer, recipe, training, seed)
    points = [(0, accuracy(model, tokenizer, held_out, recipe.max_new))]
    report.held_out("before", points[0][1])
    history = []
    with tqdm(total=recipe.steps, desc="training", unit="step", disable=None) as bar:
        for step in range(1, recipe.steps + 1):
            history.append(dict(step=step, **trainer.step()))
            bar.set_postfix(reward=f"{history[-1]['reward']:.2f}", kl=f"{history[-1]['kl_teacher']:.2f}")
            bar.update()
            if step % recipe.evaluate_every == 0 or step == recipe.steps:
                points.append((step, accuracy(model, tokenizer, held_out, recipe.max_new)))
    report.table(history)
    report.held_out("after", points[-1][1])
    report.curves(history, points, out / "curves.png", f"RLAD self-distillation: lr {recipe.lr:g}, seed {seed}")
    return {"recipe": asdict(recipe), "training_problems": len(training), "history": history, "held_out": points}
