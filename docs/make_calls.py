"""Write docs/reference/methods.md, a call with an example of each method, from ``METHODS``: ``python docs/make_calls.py``.

A method that needs a tensor which is not known here stops the run.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

from rlad_kernels.core.divergence import Divergence
from rlad_kernels.losses.methods import FAMILIES, METHODS, Method

PAGE = Path(__file__).parent / "reference" / "methods.md"
TITLES = {"ratio": "Sampled tokens", "top-k": "A teacher's top-K", "divergence": "The whole vocabulary", "other": "Cross-entropy"}

# What a call is given: its shape, what it is, and how the example below makes it. B sequences of T tokens, K ids a token.
TENSORS = {
    "hidden": ("(B, T, D)", "last hidden states of the student, after the final norm; gets a gradient", ""),
    "head": ("`LMHead`", "the student's LM head; its weight gets a gradient if it wants one", ""),
    "target": ("(B, T) ints", "the sampled tokens, or the labels; `linear_loss` hands it on", ""),
    "mask": ("(B, T) bools", "the tokens that count", ""),
    "logp": ("(B, T)", "s = log π(y) of the current policy: `scores.logp`", ""),
    "topk_logp": ("(B, T, K)", "its log-probs at `teacher.ids`: `scores.topk_logp`", ""),
    "scores": ("`TokenScores`", "what `linear_logp` returns; a loss takes what it reads", ""),
    "old_logp": ("(B, T)", "o, log-probs of the policy that the ratio is to, as a rule the one that sampled", "before.logp"),
    "old_topk_logp": ("(B, T, K)", "its log-probs at `teacher.ids`", "before.topk_logp"),
    "rollout_logp": ("(B, T)", "μ, log-probs that the sampling engine reported", "before.logp + 0.01"),
    "ref_logp": ("(B, T)", "b, log-probs of the reference policy", "before.logp - 0.1"),
    "base_logp": ("(B, T)", "log-probs of the teacher before its own training", "before.logp - 0.2"),
    "teacher_logp": ("(B, T)", "t, the teacher's log-probs of the sampled tokens", "teacher.target_logp"),
    "teacher": ("`TopK`, K ids", "ids and log-probs of the teacher, or of another support", ""),
    "teacher_hidden": ("(B, T, D')", "last hidden states of the teacher", ""),
    "teacher_head": ("`LMHead`", "the teacher's LM head, over the same vocabulary", ""),
    "advantages": ("(B,) or (B, T)", "Â", "torch.tensor([1.0, -1.0])"),
    "correct": ("(B,) or (B, T)", "1 where the response is right, else 0", "torch.tensor([1, 0])"),
    "group_ids": ("(B,) ints", "which responses are answers to one prompt", "torch.tensor([0, 0])"),
    "spans": ("(B, T) ints", "the span of each token, −1 for none", "torch.zeros(B, T).long()"),
    "weights": ("(B, T)", "a factor for each token", "torch.ones(B, T)"),
    "reduction": ("a name or `Reduction`", "how tokens become one number; None is the loss's own", ""),
}  # fmt: skip
SUPPORTS = {"lsm_sampled": "rk.supports.with_sampled(teacher, target)"}  # in place of the teacher's top-K
REQUIRED = {"denominator": "float(B * T)"}

SETUP = dedent("""
    import torch
    import rlad_kernels as rk

    B, T, D, V, K = 2, 3, 8, 32, 4
    hidden, weight = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    head, target, mask = rk.LMHead(weight), torch.randint(V, (B, T)), torch.ones(B, T).bool()
    teacher_hidden, teacher_head = torch.randn(B, T, 4), rk.LMHead(torch.randn(V, 4))

    teacher = rk.linear_topk(teacher_hidden, teacher_head, K, target=target, entropy=True)
    with torch.no_grad():
        before = rk.linear_logp(hidden, head, target, topk_ids=teacher.ids)  # of the policy that sampled
    scores = rk.linear_logp(hidden, head, target, topk_ids=teacher.ids, entropy=True, tail=True, mean_logits=True)
    """).strip()


def table(rows: list[list[str]]) -> str:
    escaped = "\\|"
    lines = [[cell.replace("|", escaped) or "–" for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [lines[0], ["---"] * len(rows[0]), *lines[1:]])


def example(method: Method) -> str:
    """The method's calls, after ``SETUP``: on log-probs and in the sweep, or of a divergence between two heads."""
    call = f'rk.METHODS["{method.name}"]'
    if isinstance(method.loss, Divergence):
        return f"out = rk.linear_divergence_loss(hidden, head, teacher_hidden, teacher_head, {call}.loss, mask=mask)"
    given = {k: TENSORS[k][2] or k for k in method.needs if k != "target"} | {"mask": "mask"}
    lines, first = [], method.loss.read()
    scores = f"scores.{first[0]}" if len(first) == 1 else "scores"
    if method.name in SUPPORTS:
        lines.append(f"support = {SUPPORTS[method.name]}")
        lines.append("topk_logp = rk.linear_logp(hidden, head, target, topk_ids=support.ids).topk_logp")
        given["teacher"], scores = "support", "topk_logp"
    if method.required:
        options = ", ".join(f"{k}={REQUIRED[k]}" for k in method.required)
        lines.append(f'reduction = rk.Reduction("{method.loss.reduction}", {options})')
        given["reduction"] = "reduction"
    if "target" in method.needs:
        scores = f"{scores}, target=target"
    words = [f"{k}={v}" for k, v in given.items()]
    line = f"given = dict({', '.join(words)})"
    lines.append(line if len(line) <= 132 else "given = dict(\n" + "".join(f"    {x},\n" for x in words) + ")")
    lines.append(f"out = {call}({scores}, **given)  # on log-probs")
    lines.append(f"out = rk.linear_loss(hidden, head, target, {call}.loss, **given)  # in the sweep")
    return "\n".join(lines)


def section(method: Method) -> str:
    if missing := sorted({*method.needs} - {*TENSORS}):
        raise ValueError(f"make_calls: {method.name} needs {missing}; add them to TENSORS")
    signature = f'rk.METHODS["{method.name}"]({method.signature()})'
    if isinstance(method.loss, Divergence):
        before, _, after = method.signature().partition(", *, ")
        signature = f'rk.linear_divergence_loss({before}, rk.METHODS["{method.name}"].loss, *, {after})'
    required = "".join(f" `reduction` must be a `Reduction({k}=…)`: {v}." for k, v in method.required.items())
    head = f"### {method.name}\n\n`{signature}`\n\n{method.formula} ({method.paper}).{required}"
    return f"{head}\n\n```python\n{example(method)}\n```\n"


def page() -> str:
    families = []
    for family in FAMILIES:
        if found := sorted((m for m in METHODS.values() if m.family == family), key=lambda m: m.name):
            families.append(f"## {TITLES[family]}\n\n" + "\n".join(section(m) for m in found))
    rows = [["argument", "shape", "what it is"], *([f"`{k}`", shape, what] for k, (shape, what, _) in TENSORS.items())]
    return (
        f"""# Calls of all methods

<!-- Written by docs/make_calls.py. -->

Each method with its arguments in the order of the call, and an example. What a method is, where it is from and what is known to go
wrong: [Methods](../methods.md). Arguments after `*` go by name; those with `=None` may be left out.

{table(rows)}

The examples go on from this:

```python
{SETUP}
```

{chr(10).join(families)}""".rstrip()
        + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page())
