"""Wrong calls: each raises a ValueError that names the function or class, the argument, what came and what was wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.losses import (
    CISPO,
    EOPD,
    GRPO,
    GSPO,
    HDPO,
    KDRL,
    MOPD,
    OPD,
    RLAD,
    RLSD,
    SAPO,
    SDAR,
    SDPO,
    SRPO,
    TRRD,
    CrossEntropy,
    Reference,
    Rollout,
    SampledTailKL,
    SpanCorrelation,
    TopKAdvantage,
    TopKKL,
    TopKPG,
)  # fmt: skip
from tests.sweeps import Own

pytestmark = pytest.mark.slow_interpreted  # what is refused is the same on every backend

B, T, D, V, K = 2, 3, 8, 16, 4
RIGHT: tuple[rk.TokenLoss, ...] = (
    GRPO(), TRRD(), RLAD(topk=TopKKL(), topk_coef=0.5), CISPO(), SAPO(), GSPO(), OPD(), MOPD(), KDRL(), SRPO(), HDPO(), RLSD(),
    SDAR(), CrossEntropy(z_loss=0.1), TopKKL(), TopKPG(), TopKAdvantage(), SampledTailKL(), EOPD(), SDPO(), SpanCorrelation(),
    Own(lambda s: -s.logp),
)  # fmt: skip
LOSSES = {loss.name: loss for loss in RIGHT}


def world() -> SimpleNamespace:
    """The arguments of right calls; a case spoils one of them."""
    weight, ids = torch.randn(V, D), torch.randint(V, (B, T, K))
    lq, lp = torch.randn(2, B, T, K)
    s, o, t, tail = torch.randn(4, B, T)
    a, g, target = torch.randn(B), torch.tensor([4, 4]), torch.randint(V, (B, T))
    teacher = rk.TopK(ids, lp, tail_logp=tail, target_logp=t, entropy=t.abs())
    pool = {
        "old_logp": o, "ref_logp": o, "rollout_logp": o, "base_logp": o, "teacher_logp": t, "advantages": a, "correct": a > 0,
        "group_ids": g, "weights": s.abs(), "w": s, "target": target, "teacher": teacher, "old_topk_logp": lq,
        "spans": g.unsqueeze(1).expand(B, T),
    }  # fmt: skip
    return SimpleNamespace(
        hidden=torch.randn(B, T, D), weight=weight, head=rk.LMHead(weight), target=target, ids=ids, s=s, o=o, t=t, a=a, g=g, lq=lq,
        tempered=lambda *shape: rk.LMHead(weight, temperature=torch.ones(shape)), half=torch.full((B, T), 0.5), teacher=teacher,
        pool=pool,
        scores=rk.TokenScores(s, s.exp(), s.abs(), lq, tail),
    )  # fmt: skip


def _logp(w: SimpleNamespace, **more: Any) -> Any:
    return rk.linear_logp(**{"hidden": w.hidden, "head": w.head, "target": w.target} | more)


def _topk(w: SimpleNamespace, **more: Any) -> Any:
    return rk.linear_topk(**{"hidden": w.hidden, "head": w.head, "k": K} | more)


def _gather(w: SimpleNamespace, **more: Any) -> Any:
    return rk.linear_gather(**{"hidden": w.hidden, "head": w.head, "ids": w.ids} | more)


def _support(w: SimpleNamespace, **more: Any) -> Any:
    return rk.linear_support(**{"hidden": w.hidden, "head": w.head, "ids": w.ids} | more)


def _on_log_probs(name: str) -> Callable[..., Any]:
    """A right call of a loss on scores; ``logp`` and the like are of the scores."""

    def call(w: SimpleNamespace, /, *, loss: Any = LOSSES[name], **more: Any) -> Any:
        read = {k: getattr(w.scores, k) for k in loss.read()}
        scores = read | {k: more.pop(k) for k in rk.TokenScores._fields if k in more}
        return loss(more.pop("scores", rk.TokenScores(**scores)), **{k: w.pool[k] for k in loss.needed()} | more)

    return call


def _in_the_sweep(name: str) -> Callable[..., Any]:
    def call(w: SimpleNamespace, /, *, loss: Any = LOSSES[name], **more: Any) -> Any:
        tensors = {k: w.pool[k] for k in loss.needed() if k != "target"} if isinstance(loss, rk.TokenLoss) else {}
        return rk.linear_loss(**{"hidden": w.hidden, "head": w.head, "target": w.target, "loss": loss} | tensors | more)

    return call


ON_LOGP = {name: _on_log_probs(name) for name in LOSSES}
IN_SWEEP = {f"linear_loss {name}": _in_the_sweep(name) for name in LOSSES}
CALLS: dict[str, Callable[..., Any]] = {
    "linear_logp": _logp, "linear_topk": _topk, "linear_gather": _gather, "linear_support": _support, **ON_LOGP, **IN_SWEEP
}  # fmt: skip
SWEEPS = ("linear_logp", "linear_topk", "linear_gather", "linear_support", *IN_SWEEP)
TARGETS = ("linear_logp", *IN_SWEEP)
READ_TARGETS = tuple(call for call in TARGETS if call != "linear_loss TopKKL")  # whose target only masks
GATHERED = ("linear_gather", "linear_support")
CALLED = (*ON_LOGP, *IN_SWEEP)


def roads(names: Iterable[str]) -> tuple[str, ...]:
    """These losses' calls, on log-probs and in the sweep."""
    return tuple(call for name in names for call in (name, f"linear_loss {name}"))


def known(loss: rk.TokenLoss) -> list[str]:
    """The tensors that a call of it may give."""
    return [*dict.fromkeys((*loss.needed(), *loss.takes))]


def with_tensor(argument: str) -> tuple[str, ...]:
    return roads(k for k, x in LOSSES.items() if argument in known(x))


def with_scores(*names: str) -> tuple[str, ...]:
    """The calls on log-probs of losses that read all these scores."""
    return tuple(k for k, x in LOSSES.items() if set(names) <= set(x.read()))


TAUGHT = with_tensor("teacher")
LIKELY = tuple(name for name in TAUGHT if "topk_logp" in LOSSES[name.split()[-1]].read())
LIKELY_SWEEPS = tuple(name for name in LIKELY if name in IN_SWEEP)
TWICE = with_scores("logp", "topk_logp")


def _reduced(**fields: Any) -> dict[str, Any]:
    return {"reduction": rk.Reduction(**fields)}


def _packed(w: SimpleNamespace) -> dict[str, Any]:
    return {"logp": w.s.view(-1), "old_logp": w.o.view(-1), "teacher_logp": w.t.view(-1)}


def _wide(w: SimpleNamespace) -> rk.TopK:
    """A teacher of more slots than the vocabulary has tokens."""
    zeros = torch.zeros(B, T, V + 1)
    return w.teacher._replace(ids=zeros.int(), logp=zeros)


def _meta(x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


Cases = dict[str, tuple[Any, ...]]
# what is wrong → (calls, the spoiled arguments, fragments of the message in this order), the message begins with the call …
OF_THE_CALL: Cases = {
    "hidden_D": (SWEEPS, lambda w: {"hidden": w.hidden[..., :4]}, "weight (V, D) has D=8, hidden has D=4"),
    "hidden_0dim": (SWEEPS, lambda w: {"hidden": w.hidden[0, 0, 0]}, "hidden"),
    "target": (TARGETS, lambda w: {"target": w.target[:1]}, "target", "(1, 3)", "(2, 3, 8)"),
    "topk_target": ("linear_topk", lambda w: {"target": w.target[:1]}, "target", "(1, 3)", "(2, 3, 8)"),
    "mask": (tuple(CALLS), lambda w: {"mask": torch.ones(B)}, "mask", "(2,)", "(2, 3)"),
    "topk_ids": ("linear_logp", lambda w: {"topk_ids": w.ids[:1]}, "topk_ids", "(1, 3, 4)", "(2, 3, K)"),
    "topk_ids_no_K": ("linear_logp", lambda w: {"topk_ids": w.target}, "topk_ids", "(2, 3)", "(2, 3, K)"),
    "ids": (GATHERED, lambda w: {"ids": w.target}, "ids", "(2, 3)", "(2, 3, K)"),
    "temperature": (SWEEPS, lambda w: {"head": w.tempered(T, B)}, "temperature", "(3, 2)", "(2, 3)"),
    "temperature_a_sequence": (SWEEPS, lambda w: {"head": w.tempered(B)}, "temperature", "(2,)"),
    "mask_half": (tuple(CALLS), lambda w: {"mask": w.half}, "mask", "0 or 1", "0.5"),
    "mask_nan": (tuple(CALLS), lambda w: {"mask": w.half * torch.nan}, "mask", "0 or 1", "nan"),
    "mask_minus_one": (tuple(CALLS), lambda w: {"mask": torch.full((B, T), -1)}, "mask", "0 or 1", "-1"),
    "target_V": (READ_TARGETS, lambda w: {"target": w.target * 0 + V}, "target", "vocab_size=16", "16"),
    "target_negative": (READ_TARGETS, lambda w: {"target": w.target * 0 - 1}, "target", "vocab_size=16", "-1"),
    "target_beyond_int32": (READ_TARGETS, lambda w: {"target": w.target * 0 + 2**32}, "target", "vocab_size=16", "4294967296"),
    "topk_ids_V": ("linear_logp", lambda w: {"topk_ids": w.ids * 0 + V}, "topk_ids", "vocab_size=16", "16"),
    "topk_ids_minus_2": ("linear_logp", lambda w: {"topk_ids": w.ids * 0 - 2}, "topk_ids", "-1 for an empty", "-2"),
    "ids_V": (GATHERED, lambda w: {"ids": w.ids * 0 + V}, "ids", "vocab_size=16", "16"),
    "teacher_ids_V": (
        LIKELY_SWEEPS, lambda w: {"teacher": w.teacher._replace(ids=w.ids * 0 + V)}, "ids", "vocab_size=16", "16",
    ),
    "teacher_ids_minus_2": (
        LIKELY_SWEEPS, lambda w: {"teacher": w.teacher._replace(ids=w.ids * 0 - 2)}, "ids", "-1 for an empty", "-2",
    ),
    "k_0": ("linear_topk", lambda w: {"k": 0}, "1 <= K", "K=0"),
    "k_beyond_V": ("linear_topk", lambda w: {"k": V + 1}, "vocab_size=16", "K=17"),
    "topk_ids_K_0": ("linear_logp", lambda w: {"topk_ids": w.ids[..., :0]}, "topk_ids", "1 <= K", "K=0"),
    "topk_ids_beyond_V": ("linear_logp", lambda w: {"topk_ids": torch.zeros(B, T, V + 1).int()}, "vocab_size=16", "K=17"),
    "teacher_beyond_V": (
        tuple(call for call in LIKELY_SWEEPS if "TopKPG" not in call), lambda w: {"teacher": _wide(w)}, "vocab_size=16", "K=17",
    ),
    "topk_pg_beyond_V": (
        "linear_loss TopKPG", lambda w: {"teacher": _wide(w), "old_topk_logp": _wide(w).logp}, "teacher.ids", "vocab_size=16",
        "K=17",
    ),
    "ids_K_0": (GATHERED, lambda w: {"ids": w.ids[..., :0]}, "ids", "K=0"),
    "filter_eps": (TARGETS, lambda w: {"filter_eps": 1.5}, "filter_eps", "[0, 1)", "1.5"),
    "extras": ("linear_logp", lambda w: {"extras": ("top2", "top3")}, "extras", "mean_logits", "'top2'"),
    "tail_without_ids": ("linear_logp", lambda w: {"tail": True}, "tail", "topk_ids", "None"),
    "hidden_dtype": (SWEEPS, lambda w: {"hidden": w.hidden.bfloat16()}, "hidden", "bfloat16", "weight", "float32"),
    "hidden_integers": (SWEEPS, lambda w: {"hidden": w.hidden.int()}, "hidden", "float32", "int32"),
    "target_float": (TARGETS, lambda w: {"target": w.target.float()}, "target", "integers", "float32"),
    "target_bool": (TARGETS, lambda w: {"target": w.target > 3}, "target", "integers", "bool"),
    "topk_ids_float": ("linear_logp", lambda w: {"topk_ids": w.ids.float()}, "topk_ids", "integers", "float32"),
    "ids_float": (GATHERED, lambda w: {"ids": w.ids.float()}, "ids", "integers", "float32"),
    "hidden_device": (SWEEPS, lambda w: {"hidden": _meta(w.hidden)}, "hidden", "meta", "weight"),
    "target_device": (TARGETS, lambda w: {"target": _meta(w.target)}, "target", "meta"),
    "mask_device": (tuple(CALLS), lambda w: {"mask": torch.ones(B, T, device="meta")}, "mask", "meta"),
    "loss": ("linear_loss GRPO", lambda w: {"loss": "grpo"}, "loss must be a TokenLoss", "GRPO()", "got 'grpo'"),
    "loss_class": ("linear_loss GRPO", lambda w: {"loss": GRPO}, "loss must be a TokenLoss", "GRPO()", "got <class"),
    "loss_function": ("linear_loss GRPO", lambda w: {"loss": lambda scores: 0}, "loss must be a TokenLoss", "got <function"),
    "loss_method": ("linear_loss GRPO", lambda w: {"loss": rk.METHODS["dapo"]}, "METHODS['grpo'].loss", "got Method("),
    "loss_divergence": ("linear_loss GRPO", lambda w: {"loss": rk.losses.JSD()}, "loss must be a TokenLoss", "got JSD("),
}  # fmt: skip
# … or with the loss's class
OF_THE_LOSS: Cases = {
    "advantages_T": (with_tensor("advantages"), lambda w: {"advantages": w.s[0]}, "advantages", "(3,)", "(2, 3) or (2,)"),
    "advantages_0dim": (with_tensor("advantages"), lambda w: {"advantages": w.s[0, 0]}, "advantages", "()", "(2, 3) or (2,)"),
    "advantages_packed": ("GRPO", lambda w: {"logp": w.s.view(6), "old_logp": w.o.view(6)}, "advantages", "(2,)", "(6,)"),
    "teacher_logp_T": (with_tensor("teacher_logp"), lambda w: {"teacher_logp": w.t.T}, "teacher_logp", "(3, 2)", "(2, 3)"),
    "correct_4": (
        with_tensor("correct"), lambda w: {"correct": w.s[:, 0].repeat(2) > 0}, "correct", "(4,)", "(2, 3) or (2,)",
    ),
    "group_ids_1": (with_tensor("group_ids"), lambda w: {"group_ids": w.g[:1]}, "group_ids", "(1,)", "(2, 3) or (2,)"),
    "topk_logp": (
        with_scores("topk_logp"), lambda w: {"topk_logp": w.lq[..., :2]}, "topk_logp", "(2, 3, 2)", "(2, 3, 4)",
    ),
    "old_topk_logp": (roads(["TopKPG"]), lambda w: {"old_topk_logp": w.lq[..., :2]}, "old_topk_logp", "K=2", "K=4"),
    "topk_logp_rows": (TWICE, lambda w: {"topk_logp": w.lq[:1]}, "scores.topk_logp", "(1, 3)", "logp (2, 3)"),
    "teacher_rows": (
        TAUGHT, lambda w: {"teacher": w.teacher[:1]}, "teacher.ids", "(1, 3, 4)", "(2, 3)",
    ),
    "teacher_logp_K": (
        TAUGHT, lambda w: {"teacher": w.teacher._replace(logp=w.lq[..., :2])}, "teacher.ids", "(2, 3, 4)", "(2, 3, 2)",
    ),
    "teacher_tail": (TAUGHT, lambda w: {"teacher": w.teacher._replace(tail_logp=w.a)}, "teacher.tail_logp", "(2,)", "(2, 3)"),
    "teacher_target": (
        TAUGHT, lambda w: {"teacher": w.teacher._replace(target_logp=w.a)}, "teacher.target_logp", "(2,)", "(2, 3)",
    ),
    "tail_logp": ("TopKKL", lambda w: {"tail_logp": w.lq}, "tail_logp", "(2, 3, 4)", "(2, 3)"),
    "lse": ("CrossEntropy", lambda w: {"lse": w.a}, "scores.lse", "(2,)", "logp (2, 3)"),
    "teacher_K_0": (
        TAUGHT, lambda w: {"teacher": w.teacher._replace(ids=w.ids[..., :0], logp=w.lq[..., :0])}, "teacher.ids", "K=0",
    ),
    "topk_logp_K_0": (with_scores("topk_logp"), lambda w: {"topk_logp": w.lq[..., :0]}, "topk_logp", "K=0"),
    "topk_logp_0dim": (with_scores("topk_logp"), lambda w: {"topk_logp": w.lq[0, 0, 0]}, "topk_logp", "K=0"),
    "denominator_0": (CALLED, lambda w: _reduced(denominator=0), "denominator", "positive", "0"),
    "denominator_negative": (CALLED, lambda w: _reduced(denominator=-2.0), "denominator", "positive", "-2.0"),
    "denominator_nan": (CALLED, lambda w: _reduced(denominator=float("nan")), "denominator", "positive", "nan"),
    "denominator_tensor_0": (CALLED, lambda w: _reduced(denominator=torch.tensor(0.0)), "denominator", "positive", "0"),
    "denominator_tensor_vector": (CALLED, lambda w: _reduced(denominator=torch.ones(T)), "denominator", "(3,)"),
    "reduction": (CALLED, lambda w: {"reduction": "mean"}, "reduction", "token-mean", "'mean'"),
    "reduction_kind": (CALLED, lambda w: _reduced(kind="mean"), "reduction", "token-mean", "'mean'"),
    "seq_ids": (CALLED, lambda w: _reduced(kind="seq-mean-token-mean", seq_ids=w.g), "seq_ids", "(2, 3)", "(2,)"),
    "seq_ids_falling": (
        CALLED, lambda w: _reduced(kind="seq-mean-token-mean", seq_ids=torch.arange(6).flip(0).view(B, T)),
        "seq_ids", "non-decreasing", "-1",
    ),
    "seq_ids_device": (
        CALLED, lambda w: _reduced(kind="seq-mean-token-mean", seq_ids=_meta(w.target)), "seq_ids", "meta",
    ),
    "no_teacher_tail": (
        roads(["TopKKL"]), lambda w: {"loss": TopKKL(normalize="tail"), "teacher": rk.TopK(w.ids, w.lq)},
        "teacher.tail_logp", "None",
    ),
    "no_teacher_tail_in_rlad": (
        roads(["RLAD"]),
        lambda w: {"loss": RLAD(topk=TopKKL(normalize="tail"), topk_coef=1.0), "teacher": w.teacher._replace(tail_logp=None)},
        "teacher.tail_logp", "None",
    ),
    "no_entropy": ("EOPD", lambda w: {"teacher": w.teacher._replace(entropy=None)}, "teacher.entropy", "None", "entropy=True"),
    "no_teacher_at_all": (
        roads(["RLAD"]), lambda w: {"teacher": w.teacher._replace(target_logp=None)}, "teacher_logp", "None", "target=",
    ),
    "no_target_logp": (
        roads(["EOPD", "SampledTailKL"]), lambda w: {"teacher": w.teacher._replace(target_logp=None)}, "target_logp", "None",
    ),
    "rlad_without_teacher": (roads(["RLAD"]), lambda w: {"teacher": None, "teacher_logp": w.t}, "teacher", "None", "TopK"),
    "own_without_teacher": (
        "linear_loss Own", lambda w: {"loss": Own(lambda s: s.topk_logp.sum(-1), scores=("topk_logp",))}, "teacher", "None", "TopK",
    ),
    "no_base": (roads(["OPD"]), lambda w: {"loss": OPD(extrapolation=1.5), "base_logp": None}, "base_logp", "None"),
    "gspo_packed": (
        "GSPO", lambda w: {k: torch.randn(T) for k in ("logp", "old_logp", "advantages")}, "seq_ids", "None",
    ),
    "gamma_packed": ("OPD", lambda w: {"loss": OPD(gamma=0.5)} | _packed(w), "gamma", "seq_ids", "None"),
    "correct_half": (
        roads(["SRPO", "HDPO"]), lambda w: {"correct": w.half[:, 0]}, "correct", "0 or 1", "0.5",
    ),
    "no_groups": (roads(["HDPO"]), lambda w: {"group_ids": None}, "group_ids", "None", "integers"),
    "no_correct": (roads(["SRPO", "HDPO"]), lambda w: {"correct": None}, "correct", "None", "(B,)"),
    "group_ids_float": (with_tensor("group_ids"), lambda w: {"group_ids": w.a}, "group_ids", "integers", "float32"),
    "teacher_ids_float": (
        TAUGHT, lambda w: {"teacher": w.teacher._replace(ids=w.ids.float())}, "teacher.ids", "integers", "float32",
    ),
    "logp_device": (TWICE, lambda w: {"topk_logp": _meta(w.lq)}, "topk_logp", "meta", "logp on"),
    "teacher_device": (TAUGHT, lambda w: {"teacher": w.teacher.to("meta")}, "teacher.ids", "meta"),
    "own_shape": (roads(["Own"]), lambda w: {"loss": Own(lambda s: s.logp.sum())}, "tokens must return loss", "one value", "()"),
    "own_shape_of_six": ("Own", lambda w: {"loss": Own(lambda s: s.logp[1:])}, "tokens must return loss", "(6,)", "(5,)"),
    "own_number": (roads(["Own"]), lambda w: {"loss": Own(lambda s: 1.0)}, "tokens must return loss", "one value", "float"),
    "own_none": (roads(["Own"]), lambda w: {"loss": Own(lambda s: None)}, "tokens must return loss", "one value", "NoneType"),
}  # fmt: skip


# every tensor that a loss needs or takes: how it is spoiled, and the message after the argument's name
SPOILT: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "list": (lambda x: x.tolist(), r" must be a torch.Tensor, got list; torch.as_tensor\("),
    "number": (lambda x: 1.0, r" must be a torch.Tensor, got float; torch.as_tensor\("),
    "rows": (lambda x: x[:1] if x.dim() > 1 else x.repeat(2), r" has shape \((1, 3|1, 3, 4|4,)\), wanted \(2, 3"),
    "columns": (lambda x: torch.stack([x.flatten()[:2]], 1), r" has shape \(2, 1\), wanted \(2, 3"),
    "device": (lambda x: x.to("meta"), " is on meta, wanted (cpu|cuda:0); all tensors must share a device"),
}
TENSORS = [
    (call, argument)
    for call in CALLED
    for argument in known(LOSSES[call.split()[-1]])
    if argument != "teacher" and (argument != "target" or call in ON_LOGP)
]


def expand(cases: Cases, prefix: int) -> dict[str, tuple[str, Callable[..., Any], str, list[str]]]:
    return {
        f"{call}-{case}": (call, spoil, call.split()[prefix], fragments)
        for case, (calls, spoil, *fragments) in cases.items()
        for call in ([calls] if isinstance(calls, str) else calls)
    }


TABLE = expand(OF_THE_CALL, 0) | expand(OF_THE_LOSS, -1)


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_are_right_before_they_are_spoiled(call: str) -> None:
    with rk.set_checks(True):
        CALLS[call](world())


@pytest.mark.parametrize("case", TABLE)
def test_message(case: str) -> None:
    call, spoil, prefix, fragments = TABLE[case]
    w = world()
    with pytest.raises(ValueError, match=f"^{prefix}: ") as error, rk.set_checks(True):
        CALLS[call](w, **spoil(w))
    rest = str(error.value)
    for fragment in fragments:
        assert fragment in rest, f"{fragment!r} is missing, or not in its place, in {str(error.value)!r}"
        rest = rest.split(fragment, 1)[1]


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize(("call", "argument"), TENSORS)
def test_every_tensor_of_every_loss(call: str, argument: str, how: str) -> None:
    w, (spoil, message) = world(), SPOILT[how]
    with pytest.raises(ValueError, match=f"^{call.split()[-1]}: {argument}{message}"):
        CALLS[call](w, **{argument: spoil(w.pool[argument])})


@pytest.mark.parametrize(("call", "argument"), [(c, k) for c in CALLED for k in LOSSES[c.split()[-1]].needed()])
def test_every_tensor_that_is_needed(call: str, argument: str) -> None:
    if argument == "target" and call in IN_SWEEP:  # the sweep's own
        return
    with pytest.raises(ValueError, match=f"^{call.split()[-1]}: {argument} is None, wanted (a tensor|a TopK|integers)"):
        CALLS[call](world(), **{argument: None})


@pytest.mark.parametrize("name", LOSSES)
def test_every_score_that_is_read(name: str) -> None:
    w = world()
    for k in LOSSES[name].read():
        with pytest.raises(ValueError, match=rf"^{name}: scores.{k} is None; linear_logp\(.*\) gives it"):
            CALLS[name](w, **{k: None})
        with pytest.raises(ValueError, match=rf"^{name}: {k} must be float32, bfloat16, float16 or float64, got torch.int64$"):
            CALLS[name](w, **{k: w.ids if k == "topk_logp" else w.target})


# option → values that every loss with such a field refuses, and fragments of the message after the class's name
OPTIONS: dict[str, list[tuple[Any, ...]]] = {
    "clip": [
        (0.2, "(low, high)", "0.2"), ((-0.1, 0.2), "0 <= low", "(-0.1, 0.2)"), ((1.1, 0.2), "low <= 1", "(1.1, 0.2)"),
        ((0.2, float("nan")), "high >= 0", "(0.2, nan)"), ([0.2, 0.2], "(low, high)", "[0.2, 0.2]"),
        (("0.2", "0.2"), "(low, high)", "('0.2', '0.2')"), ((0.2,), "(low, high)", "(0.2,)"),
    ],
    "dual_clip": [(1.0, "greater than 1", "1.0"), ("3", "greater than 1", "'3'"), (True, "greater than 1", "True")],
    "alpha": [(1.5, "[0, 1]", "1.5"), (-0.1, "[0, 1]", "-0.1"), ("0.5", "[0, 1]", "'0.5'"), (None, "[0, 1]", "None")],
    "teacher_clamp": [(0.0, "positive", "0.0"), ("1", "positive", "'1'")],
    "reference": [
        (0.1, "Reference(coef, estimator)", "0.1"), (Reference(None), "reference.coef", "finite", "None"),
        (Reference(torch.nan), "reference.coef", "finite", "nan"), (Reference("0.1"), "reference.coef", "finite", "'0.1'"),
        (Reference(0.1, "k1"), "reference.estimator", "'k1'", "k2"), (Reference(0.0, "k9"), "reference.estimator", "k3+", "'k9'"),
        (Reference(0.1, ["k3"]), "reference.estimator", "k3+", "['k3']"),
    ],
    "rollout": [
        ("tis", "Rollout(form", "'tis'"), (Rollout("cut"), "rollout.form", "truncate", "'cut'"),
        (Rollout(policy="new"), "rollout.policy", "current", "'new'"),
        (Rollout(low=3.0), "rollout", "low <= high", "low=3.0, high=2.0"), (Rollout(low="0"), "rollout", "0 <= low", "low='0'"),
    ],
    "temperatures": [((1.0, 0.0), "> 0", "(1.0, 0.0)"), (1.0, "> 0", "1.0"), ([1.0, 1.0], "> 0", "[1.0, 1.0]")],
    "level": [("token", "sequence-token", "'token'"), (None, "sequence-token", "None")],
    "gamma": [(1.5, "[0, 1]", "1.5"), ("1", "[0, 1]", "'1'")],
    "extrapolation": [(None, "finite", "None"), (torch.inf, "finite", "inf")],
    "coef": [("1", "finite number", "'1'"), (torch.nan, "finite number", "nan")],
    "reward_clamp": [(0.0, "positive", "0.0"), ("5", "positive", "'5'")],
    "advantage_coef": [(None, "finite number", "None")],
    "kd_coef": [(None, "finite number", "None"), ("1", "finite number", "'1'"), (torch.inf, "finite number", "inf")],
    "form": [("reward", "in-reward", "'reward'")],
    "teach": [("none", "wrong-groups", "'none'"), (None, "wrong-groups", "None")],
    "kd_estimator": [("k1", "'k1'", "k2"), ("k9", "k3+", "'k9'")],
    "mix": [(1.5, "[0, 1]", "1.5"), (None, "[0, 1]", "None")],
    "weight_clip": [(-0.1, "[0, 1]", "-0.1"), ((0.2, 0.2), "[0, 1]", "(0.2, 0.2)")],
    "gate": [("5", "finite number", "'5'")],
    "z_loss": [(-1.0, "[0, inf)", "-1.0"), (torch.nan, "[0, inf)", "nan"), ("0", "[0, inf)", "'0'")],
    "direction": [("up", "reverse", "'up'"), (None, "reverse", "None")],
    "normalize": [("all", "both", "'all'"), (True, "both", "True")],
    "scale": [("1", "finite number", "'1'"), (None, "finite number", "None"), (torch.inf, "finite number", "inf")],
    "beta": [("0.5", "(0, 1)", "'0.5'"), (None, "(0, 1)", "None")],
    "log_ratio_clamp": [(0.0, "positive", "0.0"), ("1", "positive", "'1'")],
    "logp_floor": [(-10.0, "normalize='both'", "-10.0"), ("-10", "negative", "'-10'")],
    "clamp_gradient": [("keep", "kill", "'keep'")],
    "loss_min": [("0", "number or None", "'0'"), (torch.nan, "number or None", "nan")],
    "loss_max": [("0", "number or None", "'0'")],
    "outside_logp": [(-100.0, "normalize='teacher'", "-100.0", "'both'"), ("-100", "finite", "'-100'")],
    "ratio_clip": [(0.0, "positive", "0.0"), ("2", "positive", "'2'")],
    "label_smoothing": [(1.0, "[0, 1)", "1.0"), ("0", "[0, 1)", "'0'"), (torch.nan, "[0, 1)", "nan")],
    "weight": [("both", "student", "'both'")],
    "iw_clip": [(2.0, "(low, high)", "2.0"), ((2.0, 1.0), "low < high", "(2.0, 1.0)"), ([0.0, 2.0], "(low, high)", "[0.0, 2.0]")],
    "entropy_threshold": [("0.8", "number", "'0.8'"), (torch.nan, "number", "nan")],
    "kl_coef": [(None, "finite number", "None")],
    "topk": [("reverse", "TopKKL", "'reverse'"), (TopKKL, "TopKKL", "<class")],
    "topk_coef": [("0.5", "topk_coef", "finite number", "'0.5'"), (None, "go together", "None"), (torch.nan, "finite", "nan")],
    "reduction": [("mean", "token-mean", "'mean'"), (None, "token-mean", "None"), (rk.Reduction("token-mean"), "Reduction")],
}  # fmt: skip
TOGETHER: dict[str, tuple[type[rk.TokenLoss], dict[str, Any], tuple[str, ...]]] = {
    "topk alone": (RLAD, {"topk": TopKKL()}, ("topk and topk_coef", "None")),
    "topk_coef alone": (RLAD, {"topk_coef": 1.0}, ("topk and topk_coef", "None", "1.0")),
    "jsd of a teacher alone": (TopKKL, {"direction": "jsd", "normalize": "teacher"}, ("normalize='teacher'", "'jsd'", "wanted")),
    "jsd at an end": (TopKKL, {"direction": "jsd", "beta": 1.0}, ("beta", "(0, 1)", "1.0", "'reverse'")),
    "mixed at an end": (TopKKL, {"direction": "mixed", "beta": 0.0}, ("beta", "(0, 1)", "0.0", "'reverse'")),
    "clamp of jsd": (TopKKL, {"direction": "jsd", "log_ratio_clamp": 1.0}, ("log_ratio_clamp", "KL", "1.0", "'jsd'")),
    "floor above 0": (TopKKL, {"normalize": "none", "logp_floor": 0.5}, ("logp_floor", "negative", "0.5")),
    "bounds": (TopKKL, {"loss_min": 2.0, "loss_max": 1.0}, ("loss_min", "below loss_max", "2.0", "1.0")),
    "outside of a forward KL": (
        TopKKL, {"direction": "forward", "normalize": "teacher", "outside_logp": -9.0}, ("outside_logp", "'forward'"),
    ),
    "outside and a floor": (
        TopKKL, {"normalize": "teacher", "outside_logp": -9.0, "logp_floor": -5.0}, ("outside_logp", "logp_floor=-5.0"),
    ),
    "mopd's policy": (MOPD, {"rollout": Rollout(policy="old")}, ("rollout.policy", "'current'", "'old'")),
    "mopd without rollout": (MOPD, {"rollout": None}, ("rollout.policy", "'current'", "None")),
}  # fmt: skip


def names(loss: rk.TokenLoss) -> list[str]:
    return [f.name for f in fields(loss)]


FIELDS = [(name, option, i) for name, loss in LOSSES.items() for option in names(loss) for i in range(len(OPTIONS.get(option, ())))]


def _refused(kind: type[rk.TokenLoss], options: dict[str, Any], fragments: Iterable[str]) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}: ") as error:
        kind(**options)
    rest = str(error.value)
    for fragment in fragments:
        assert fragment in rest, f"{fragment!r} is missing, or not in its place, in {str(error.value)!r}"
        rest = rest.split(fragment, 1)[1]


def test_every_option_of_every_loss_is_tried() -> None:
    options = {option for loss in RIGHT for option in names(loss)}
    assert options - {"value", "scores", "unbiased", "renormalize", "normalize_weights"} == set(OPTIONS)


@pytest.mark.parametrize(("name", "option", "i"), FIELDS)
def test_options(name: str, option: str, i: int) -> None:
    value, *fragments = OPTIONS[option][i]
    kind = type(LOSSES[name])
    fitting = {"topk": TopKKL(), "topk_coef": 0.5} if kind is RLAD and option.startswith("topk") else {}
    fitting |= {"value": lambda s: s.logp} if kind is Own else {}
    _refused(kind, fitting | {option: value}, fragments)


@pytest.mark.parametrize("case", TOGETHER)
def test_options_together(case: str) -> None:
    _refused(*TOGETHER[case])


@pytest.mark.parametrize("call", roads(k for k, x in LOSSES.items() if "reference" in names(x)))
def test_what_an_option_needs(call: str) -> None:
    name = call.split()[-1]
    needs = (("reference", Reference(0.1), "ref_logp"), ("rollout", Rollout(policy="current"), "rollout_logp"))
    for option, value, argument in needs:
        loss = replace(LOSSES[name], **{option: value})
        with pytest.raises(ValueError, match=f"^{name}: {argument} is None, wanted a tensor in logp's shape"):
            CALLS[call](world(), loss=loss, **{argument: None})
        CALLS[call](world(), loss=loss)


@pytest.mark.parametrize("name", ["rows", "cols"])
@pytest.mark.parametrize("size", [0, -2, 2.5, True, "8"], ids=str)
def test_set_tile(name: str, size: Any) -> None:
    with pytest.raises(ValueError, match=f"^set_tile: {name} must be a positive int or None, got {size!r}"):
        rk.set_tile(**{name: size})
