"""Part one of ``rlad_smollm2.py``: one RLAD loss, computed naively and by rlad_kernels, side by side.

The inputs are real: hidden states of SmolLM2 over chat-formatted problems. Every variant runs in a fresh process, loads the same
saved inputs, and reports its loss, its gradients, its time, and the high-water mark of its memory beyond inputs and gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlad_kernels as rk

TOPICS = ("gsm_symbolic", "family_relationships", "knights_knaves", "syllogism")
BLOCK = 128  # tokens a sequence
TOPK, COEF, ALPHA, CLIP = 16, 0.5, 0.5, 0.2
TOPK_KL = rk.losses.TopKKL("reverse", normalize="both")
MIB = 2**20
LOSS_TOLERANCE = 1e-5
MEMORY_FACTOR = 5.0
Inputs = dict[str, Tensor]


def naive(x: Inputs) -> Tensor:
    """The loss as one would write it: all logits, one log_softmax, three gathers. Any float dtype."""
    logp = (x["hidden"] @ x["weight"].T).log_softmax(-1)
    chosen = logp.gather(-1, x["target"][..., None]).squeeze(-1)
    ratio = (ALPHA * (chosen - x["old_logp"]) + (1 - ALPHA) * (chosen - x["teacher_logp"])).exp()
    advantages = x["advantages"][:, None]
    policy = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    student = logp.gather(-1, x["topk_ids"].long()).log_softmax(-1)
    teacher = x["topk_logp"].log_softmax(-1)
    divergence = (student.exp() * (student - teacher)).sum(-1)
    return (policy + COEF * divergence).mean()


def fused(x: Inputs) -> Tensor:
    """The same loss in one call: tiles of logits come and go, the gradient is made on the way."""
    rlad = rk.losses.RLAD(alpha=ALPHA, clip=(CLIP, CLIP), topk=TOPK_KL, topk_coef=COEF)
    given = {"old_logp": x["old_logp"], "advantages": x["advantages"], "teacher": teacher_topk(x)}
    return rk.linear_loss(x["hidden"], rk.LMHead(x["weight"]), x["target"], rlad, **given).loss


def in_two_steps(x: Inputs) -> Tensor:
    """The same loss from its parts: log-probs first, any loss on top of them after."""
    scores = rk.linear_logp(x["hidden"], rk.LMHead(x["weight"]), x["target"], topk_ids=x["topk_ids"])
    trrd = rk.losses.TRRD(alpha=ALPHA, clip=(CLIP, CLIP))
    policy = trrd(scores.logp, old_logp=x["old_logp"], teacher_logp=x["teacher_logp"], advantages=x["advantages"])
    divergence = TOPK_KL(scores.topk_logp, teacher=teacher_topk(x), reduction=trrd.reduction)
    return policy.loss + COEF * divergence.loss


def teacher_topk(x: Inputs) -> rk.TopK:
    return rk.TopK(x["topk_ids"], x["topk_logp"], target_logp=x["teacher_logp"])


VARIANTS: dict[str, tuple[str, Callable[[Inputs], Tensor]]] = {
    "naive": ("plain PyTorch, all logits", naive),
    "in_two_steps": ("linear_logp, then the losses", in_two_steps),
    "fused": ("linear_loss, one call", fused),
}


@torch.no_grad()
def make_inputs(model: Any, tokenizer: Any, tokens: int, seed: int) -> Inputs:
    """Student, teacher and old policy over the same real tokens.

    The student reads blocks of 128 tokens; the teacher, the same model, has also read the block before; the old log-probs are those
    of the student's head in bfloat16, as an inference engine would have reported them; the advantages are drawn and normalised.
    """
    count = max(2, tokens // BLOCK)
    stream = torch.tensor(real_text(tokenizer, (count + 1) * BLOCK + 1, seed))
    blocks = stream.unfold(0, BLOCK, BLOCK)[: count + 1]
    hidden = torch.cat([model.base_model(part).last_hidden_state for part in blocks[1:].split(8)])
    with_context = torch.cat([blocks[:-1], blocks[1:]], dim=1)
    teacher_hidden = torch.cat([model.base_model(part).last_hidden_state[:, BLOCK:] for part in with_context.split(4)])
    target = stream[BLOCK + 1 :].unfold(0, BLOCK, BLOCK)[:count].contiguous()
    weight = model.get_output_embeddings().weight.detach()
    teacher = rk.linear_topk(teacher_hidden, rk.LMHead(weight), TOPK, target=target)
    old = rk.linear_logp(hidden.bfloat16(), rk.LMHead(weight.bfloat16()), target).logp
    advantages = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    advantages = (advantages - advantages.mean()) / advantages.std()
    inputs = {"hidden": hidden, "weight": weight, "target": target, "old_logp": old, "advantages": advantages}
    return inputs | {"teacher_logp": teacher.target_logp, "topk_ids": teacher.ids, "topk_logp": teacher.logp}


def real_text(tokenizer: Any, length: int, seed: int) -> list[int]:
    """Token ids of chat-formatted reasoning-gym problems with their answers, one after the other."""
    import reasoning_gym

    ids: list[int] = []
    datasets = [reasoning_gym.create_dataset(topic, size=1000, seed=seed) for topic in TOPICS]
    for items in zip(*datasets, strict=True):
        for item in items:
            chat = [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item["answer"]}]
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            ids += tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) >= length:
            return ids[:length]
    raise ValueError(f"the problems hold only {len(ids)} tokens, {length} were asked for: lower --tokens")


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process in bytes; without /proc the most so far stands for both."""
    if sys.platform.startswith("linux"):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_high_water_mark() -> None:
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):  # some sandboxes forbid it; then the mark of loading stands if the loss stays below it
            Path("/proc/self/clear_refs").write_text("5")


def gradients(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[float, Tensor, Tensor]:
    hidden, weight = (inputs[name].detach().requires_grad_() for name in ("hidden", "weight"))
    value = loss(inputs | {"hidden": hidden, "weight": weight})
    value.backward()
    assert hidden.grad is not None and weight.grad is not None
    return value.item(), hidden.grad, weight.grad


def warm_up(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    """A thimbleful of the same work, so that libraries and thread pools are loaded before anything is measured."""
    rows, vocab = 2, 1024
    small = {name: value[:rows] for name, value in inputs.items() if name != "weight"}
    small["weight"] = inputs["weight"][:vocab]
    gradients(loss, small | {"target": small["target"] % vocab, "topk_ids": small["topk_ids"] % vocab})


def measure(variant: str, folder: Path, repeats: int) -> dict[str, float]:
    """What a fresh process does: load, warm up, note the memory, run, note the high-water mark, then time some more runs."""
    loss = VARIANTS[variant][1]
    inputs = torch.load(folder / "inputs.pt")
    warm_up(loss, inputs)
    forget_high_water_mark()
    before = memory("VmRSS")
    start = time.perf_counter()
    value, d_hidden, d_weight = gradients(loss, inputs)
    best = time.perf_counter() - start
    extra = memory("VmHWM") - before - d_hidden.nbytes - d_weight.nbytes
    torch.save({"hidden": d_hidden, "weight": d_weight}, folder / f"{variant}.pt")
    del d_hidden, d_weight
    for _ in range(repeats - 1):
        start = time.perf_counter()
        gradients(loss, inputs)
        best = min(best, time.perf_counter() - start)
    return {"loss": value, "seconds": best, "extra_mib": extra / MIB}


def oracle(inputs: Inputs) -> tuple[float, Inputs]:
    """Loss and gradients in float64, a few sequences at a time (every sequence has the same weight in the mean)."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    hidden, weight = wide["hidden"].requires_grad_(), wide["weight"].requires_grad_()
    total, count = 0.0, len(hidden)
    for start in range(0, count, 4):
        part = {name: value if name == "weight" else value[start : start + 4] for name, value in wide.items()}
        share = naive(part) * len(part["hidden"]) / count
        share.backward()
        total += share.item()
    assert hidden.grad is not None and weight.grad is not None
    return total, {"hidden": hidden.grad, "weight": weight.grad}


@dataclass(frozen=True)
class Row:
    """One line of the table; the errors are the largest absolute deviations from float64."""

    variant: str
    loss: float
    seconds: float
    extra_mib: float
    hidden_error: float
    weight_error: float


def compare(inputs: Inputs, threads: int, repeats: int, progress: Callable[[str], None]) -> tuple[float, Inputs, list[Row]]:
    """Every variant in its own process, each compared with float64."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(inputs, folder / "inputs.pt")
        progress("float64 oracle")
        exact_loss, exact = oracle(inputs)
        rows = []
        for variant in VARIANTS:
            progress(VARIANTS[variant][0])
            options = ["--variant", variant, "--folder", name, "--threads", str(threads), "--repeats", str(repeats)]
            done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, env=os.environ)
            if done.returncode:
                raise SystemExit(f"the process for {variant!r} failed with exit code {done.returncode}: see the trace above")
            got = torch.load(folder / f"{variant}.pt")
            error = {key: (got[key].double() - exact[key]).abs().max().item() for key in exact}
            measured = json.loads(done.stdout.splitlines()[-1])
            rows.append(Row(variant, hidden_error=error["hidden"], weight_error=error["weight"], **measured))
    return exact_loss, exact, rows


def verdicts(exact: Inputs, rows: list[Row]) -> list[tuple[str, bool]]:
    """What part one claims, each with whether it held in this run."""
    table = {row.variant: row for row in rows}
    plain, checks = table["naive"], []
    for row in rows[1:]:
        gap = abs(row.loss - plain.loss)
        text = f"{row.variant}: loss differs from plain PyTorch by {gap:.1e} (at most {LOSS_TOLERANCE:g})"
        checks.append((text, gap <= LOSS_TOLERANCE))
        for name in ("hidden", "weight"):
            error, reference = getattr(row, f"{name}_error"), getattr(plain, f"{name}_error")
            bound = 2 * reference + 2**-23 * exact[name].abs().max().item()
            checks.append((f"{row.variant}: {name} gradient off float64 by {error:.1e} (at most {bound:.1e})", error <= bound))
    factor = plain.extra_mib / max(table["fused"].extra_mib, 1e-9)
    checks.append((f"fused: {factor:.1f} times less extra memory (at least {MEMORY_FACTOR:g})", factor >= MEMORY_FACTOR))
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one variant in this process; rlad_smollm2.py starts it.")
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.variant, args.folder, args.repeats)))


if __name__ == "__main__":
    main()
