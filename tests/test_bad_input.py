"""Wrong calls: each raises a ValueError that names the function, the argument, what came and what was wanted."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk

B, T, D, V, K = 2, 3, 8, 16, 4


def world() -> SimpleNamespace:
    """The arguments of right calls; a case spoils one of them."""
    weight, ids = torch.randn(V, D), torch.randint(V, (B, T, K))
    lq, lp = torch.randn(2, B, T, K)
    s, o, t, tail = torch.randn(4, B, T)
    return SimpleNamespace(
        hidden=torch.randn(B, T, D), weight=weight, head=rk.LMHead(weight), target=torch.randint(V, (B, T)), ids=ids,
        tempered=lambda *shape: rk.LMHead(weight, temperature=torch.ones(shape)), s=s, o=o, t=t, a=torch.randn(B), lq=lq,
        g=torch.tensor([4, 4]),
        teacher=rk.TopK(ids, lp, tail_logp=tail), without_tail=rk.TopK(ids, lp), half=torch.full((B, T), 0.5),
    )  # fmt: skip


def _logp(w: SimpleNamespace, **more: Any) -> Any:
    return rk.linear_logp(**{"hidden": w.hidden, "head": w.head, "target": w.target} | more)


def _topk(w: SimpleNamespace, **more: Any) -> Any:
    return rk.linear_topk(**{"hidden": w.hidden, "head": w.head, "k": K} | more)


def _gather(w: SimpleNamespace, **more: Any) -> Any:
    return rk.linear_gather(**{"hidden": w.hidden, "head": w.head, "ids": w.ids} | more)


def _grpo(w: SimpleNamespace, **more: Any) -> Any:
    return rk.grpo_loss(**{"logp": w.s, "old_logp": w.o, "advantages": w.a} | more)


def _trrd(w: SimpleNamespace, **more: Any) -> Any:
    return rk.trrd_loss(**{"logp": w.s, "old_logp": w.o, "teacher_logp": w.t, "advantages": w.a} | more)


def _topk_kl(w: SimpleNamespace, **more: Any) -> Any:
    return rk.topk_kl_loss(**{"topk_logp": w.lq, "teacher": w.teacher} | more)


def _linear_kl(w: SimpleNamespace, **more: Any) -> Any:
    return rk.linear_topk_kl_loss(**{"hidden": w.hidden, "head": w.head, "teacher": w.teacher} | more)


def nll(scores: rk.TokenScores, **inputs: Any) -> Tensor:
    return -scores.logp


def _fused(w: SimpleNamespace, **more: Any) -> Any:
    given = {"hidden": w.hidden, "head": w.head, "target": w.target, "token_loss": nll, "inputs": {}}
    return rk.fused_linear_loss(**given | more)


def _rlad(w: SimpleNamespace, **more: Any) -> Any:
    given = {"hidden": w.hidden, "head": w.head, "target": w.target, "old_logp": w.o, "advantages": w.a, "teacher_logp": w.t}
    return rk.rlad_loss(**given | more)


def _sampled(name: str, *arguments: str) -> Callable[..., Any]:
    """A right call of a loss on sampled tokens."""

    def call(w: SimpleNamespace, **more: Any) -> Any:
        pool = {"old_logp": w.o, "rollout_logp": w.o, "teacher_logp": w.t, "advantages": w.a, "correct": w.a > 0, "group_ids": w.g}
        return getattr(rk, name)(**{"logp": w.s, **{k: pool[k] for k in arguments}} | more)

    return call


SAMPLED = {
    "cispo_loss": _sampled("cispo_loss", "old_logp", "advantages"),
    "sapo_loss": _sampled("sapo_loss", "old_logp", "advantages"),
    "gspo_loss": _sampled("gspo_loss", "old_logp", "advantages"),
    "opd_loss": _sampled("opd_loss", "old_logp", "teacher_logp"),
    "mopd_loss": _sampled("mopd_loss", "rollout_logp", "teacher_logp"),
    "kdrl_loss": _sampled("kdrl_loss", "old_logp", "teacher_logp", "advantages", "correct", "group_ids"),
    "srpo_loss": _sampled("srpo_loss", "old_logp", "teacher_logp", "advantages", "correct"),
    "hdpo_loss": _sampled("hdpo_loss", "old_logp", "teacher_logp", "advantages", "correct", "group_ids"),
    "rlsd_loss": _sampled("rlsd_loss", "old_logp", "teacher_logp", "advantages"),
    "sdar_loss": _sampled("sdar_loss", "old_logp", "teacher_logp", "advantages"),
}
CALLS: dict[str, Callable[..., Any]] = {
    "linear_logp": _logp, "linear_topk": _topk, "linear_gather": _gather, "grpo_loss": _grpo, "trrd_loss": _trrd,
    "topk_kl_loss": _topk_kl, "linear_topk_kl_loss": _linear_kl, "fused_linear_loss": _fused, "rlad_loss": _rlad, **SAMPLED,
}  # fmt: skip
TAUGHT = tuple(name for name in SAMPLED if name not in ("cispo_loss", "sapo_loss", "gspo_loss"))
FLAGGED = ("srpo_loss", "hdpo_loss")
PLAIN = ("linear_logp", "linear_topk", "linear_gather", "fused_linear_loss")
SWEEPS = (*PLAIN, "rlad_loss", "linear_topk_kl_loss")
TARGETS = ("linear_logp", "fused_linear_loss", "rlad_loss")
IDS = ("linear_logp", "fused_linear_loss")
MASKS = tuple(CALLS)
ANCHORED = ("trrd_loss", "rlad_loss")
RATIOS = ("grpo_loss", *ANCHORED)
TOPK_KL = ("topk_kl_loss", "linear_topk_kl_loss")
REDUCED = (*RATIOS, *TOPK_KL, "fused_linear_loss")


def _rollout(w: SimpleNamespace, *fields: Any, **more: Any) -> dict[str, Any]:
    return {"rollout_logp": w.o, "rollout": rk.Rollout(*fields, **more)}


def _packed(w: SimpleNamespace) -> dict[str, Any]:
    return {"logp": w.s.view(-1), "old_logp": w.o.view(-1), "teacher_logp": w.t.view(-1)}


# kind → what is wrong → (functions, the spoiled arguments, fragments of the message in this order)
CASES: dict[str, dict[str, tuple[Any, ...]]] = {
    "shape": {
        "hidden_D": (SWEEPS, lambda w: {"hidden": w.hidden[..., :4]}, "weight (V, D) has D=8, hidden has D=4"),
        "hidden_0dim": (PLAIN, lambda w: {"hidden": w.hidden[0, 0, 0]}, "hidden"),
        "target": (TARGETS, lambda w: {"target": w.target[:1]}, "target", "(1, 3)", "(2, 3, 8)"),
        "topk_target": ("linear_topk", lambda w: {"target": w.target[:1]}, "target", "(1, 3)", "(2, 3, 8)"),
        "mask": (MASKS, lambda w: {"mask": torch.ones(B)}, "mask", "(2,)", "(2, 3)"),
        "topk_ids": (IDS, lambda w: {"topk_ids": w.ids[:1]}, "topk_ids", "(1, 3, 4)", "(2, 3, K)"),
        "topk_ids_no_K": (IDS, lambda w: {"topk_ids": w.target}, "topk_ids", "(2, 3)", "(2, 3, K)"),
        "ids": ("linear_gather", lambda w: {"ids": w.target}, "ids", "(2, 3)", "(2, 3, K)"),
        "temperature": (SWEEPS, lambda w: {"head": w.tempered(T, B)}, "temperature", "(3, 2)", "(2, 3)"),
        "temperature_a_sequence": (SWEEPS, lambda w: {"head": w.tempered(B)}, "temperature", "(2,)"),
        "old_logp": (RATIOS, lambda w: {"old_logp": w.o[:1]}, "old_logp", "(1, 3)", "(2, 3)"),
        "old_logp_broadcast": (RATIOS, lambda w: {"old_logp": w.o[:, :1]}, "old_logp", "(2, 1)", "(2, 3)"),
        "advantages_T": (RATIOS, lambda w: {"advantages": w.s[0]}, "advantages", "(3,)", "(2, 3) or (2,)"),
        "advantages_0dim": (RATIOS, lambda w: {"advantages": w.s[0, 0]}, "advantages", "()", "(2, 3) or (2,)"),
        "advantages_packed": ("grpo_loss", lambda w: {"logp": w.s.view(6), "old_logp": w.o.view(6)}, "advantages", "(2,)", "(6,)"),
        "teacher_logp": (ANCHORED, lambda w: {"teacher_logp": w.t.T}, "teacher_logp", "(3, 2)", "(2, 3)"),
        "ref_logp": (RATIOS, lambda w: {"ref_logp": w.t[0]}, "ref_logp", "(3,)", "(2, 3)"),
        "correct": (FLAGGED, lambda w: {"correct": w.s[:, 0].repeat(2) > 0}, "correct", "(4,)", "(2, 3) or (2,)"),
        "group_ids": ("hdpo_loss", lambda w: {"group_ids": w.g[:1]}, "group_ids", "(1,)", "(2, 3) or (2,)"),
        "topk_logp": ("topk_kl_loss", lambda w: {"topk_logp": w.lq[..., :2]}, "topk_logp", "(2, 3, 2)", "(2, 3, 4)"),
        "teacher_rows": ("linear_topk_kl_loss", lambda w: {"hidden": w.hidden[:1]}, "teacher.ids", "(2, 3, 4)", "(1, 3, 8)"),
        "teacher_logp_K": (TOPK_KL, lambda w: {"teacher": rk.TopK(w.ids, w.lq[..., :2])}, "teacher.ids", "(2, 3, 4)", "(2, 3, 2)"),
        "tail_logp": ("topk_kl_loss", lambda w: {"tail_logp": w.lq}, "tail_logp", "(2, 3, 4)", "(2, 3)"),
        "inputs": ("fused_linear_loss", lambda w: {"inputs": {"x": w.a}}, "inputs", "(2,)", "(2, 3)"),
        "token_loss": ("fused_linear_loss", lambda w: {"token_loss": lambda scores: scores.logp.sum()}, "token_loss", "(6,)", "()"),
    },
    "value": {
        "mask_half": (MASKS, lambda w: {"mask": w.half}, "mask", "0 or 1", "0.5"),
        "mask_nan": (MASKS, lambda w: {"mask": w.half * torch.nan}, "mask", "0 or 1", "nan"),
        "mask_minus_one": (MASKS, lambda w: {"mask": torch.full((B, T), -1)}, "mask", "0 or 1", "-1"),
        "target_V": (TARGETS, lambda w: {"target": w.target * 0 + V}, "target", "vocab_size=16", "16"),
        "target_negative": (TARGETS, lambda w: {"target": w.target * 0 - 1}, "target", "vocab_size=16", "-1"),
        "target_beyond_int32": (TARGETS, lambda w: {"target": w.target * 0 + 2**32}, "target", "vocab_size=16", "4294967296"),
        "topk_ids_V": (IDS, lambda w: {"topk_ids": w.ids * 0 + V}, "topk_ids", "vocab_size=16", "16"),
        "topk_ids_minus_2": (IDS, lambda w: {"topk_ids": w.ids * 0 - 2}, "topk_ids", "-1 for an empty", "-2"),
        "ids_V": ("linear_gather", lambda w: {"ids": w.ids * 0 + V}, "ids", "vocab_size=16", "16"),
        "teacher_ids_V": ("linear_topk_kl_loss", lambda w: {"teacher": rk.TopK(w.ids * 0 + V, w.lq)}, "ids", "vocab_size=16", "16"),
        "k_0": ("linear_topk", lambda w: {"k": 0}, "1 <= K", "K=0"),
        "k_beyond_V": ("linear_topk", lambda w: {"k": V + 1}, "vocab_size=16", "K=17"),
        "topk_ids_K_0": (IDS, lambda w: {"topk_ids": w.ids[..., :0]}, "topk_ids", "1 <= K", "K=0"),
        "topk_ids_beyond_V": (IDS, lambda w: {"topk_ids": torch.zeros(B, T, V + 1).int()}, "topk_ids", "vocab_size=16", "K=17"),
        "ids_K_0": ("linear_gather", lambda w: {"ids": w.ids[..., :0]}, "ids", "K=0"),
        "teacher_K_0": (TOPK_KL, lambda w: {"teacher": rk.TopK(w.ids[..., :0], w.lq[..., :0])}, "K=0"),
        "denominator_0": (REDUCED, lambda w: {"denominator": 0}, "denominator", "positive", "0"),
        "denominator_negative": (REDUCED, lambda w: {"denominator": -2.0}, "denominator", "positive", "-2.0"),
        "denominator_nan": (REDUCED, lambda w: {"denominator": float("nan")}, "denominator", "positive", "nan"),
        "denominator_tensor_0": (REDUCED, lambda w: {"denominator": torch.tensor(0.0)}, "denominator", "positive", "0"),
        "denominator_tensor_vector": (REDUCED, lambda w: {"denominator": torch.ones(T)}, "denominator", "(3,)"),
        "reduction": (REDUCED, lambda w: {"reduction": "mean"}, "reduction", "token-mean", "'mean'"),
        "filter_eps": (TARGETS, lambda w: {"filter_eps": 1.5}, "filter_eps", "[0, 1)", "1.5"),
        "extras": ("linear_logp", lambda w: {"extras": ("top2",)}, "extras", "mean_logits", "'top2'"),
        "tail_without_ids": ("linear_logp", lambda w: {"tail": True}, "tail", "topk_ids", "None"),
        "clip_float": (RATIOS, lambda w: {"clip": 0.2}, "clip", "(low, high)", "0.2"),
        "clip_negative": (RATIOS, lambda w: {"clip": (-0.1, 0.2)}, "clip", "0 <= low", "(-0.1, 0.2)"),
        "clip_low_above_1": (RATIOS, lambda w: {"clip": (1.1, 0.2)}, "clip", "low <= 1", "(1.1, 0.2)"),
        "clip_nan": (RATIOS, lambda w: {"clip": (0.2, float("nan"))}, "clip", "high >= 0", "(0.2, nan)"),
        "dual_clip_1": (RATIOS, lambda w: {"dual_clip": 1.0}, "dual_clip", "greater than 1", "1.0"),
        "alpha_above_1": (ANCHORED, lambda w: {"alpha": 1.5}, "alpha", "[0, 1]", "1.5"),
        "alpha_negative": (ANCHORED, lambda w: {"alpha": -0.1}, "alpha", "[0, 1]", "-0.1"),
        "teacher_clamp_0": (ANCHORED, lambda w: {"teacher_clamp": 0.0}, "teacher_clamp", "positive", "0.0"),
        "kl_coef_without_ref": (RATIOS, lambda w: {"kl_coef": 0.1}, "kl_coef", "ref_logp", "None"),
        "k1": (RATIOS, lambda w: {"ref_logp": w.t, "kl_coef": 0.1, "kl_estimator": "k1"}, "kl_estimator", "'k1'", "k2"),
        "kl_estimator": (RATIOS, lambda w: {"ref_logp": w.t, "kl_estimator": "k9"}, "kl_estimator", "k3+", "'k9'"),
        "direction": (TOPK_KL, lambda w: {"direction": "up"}, "direction", "reverse", "'up'"),
        "normalize": (TOPK_KL, lambda w: {"normalize": "all"}, "normalize", "both", "'all'"),
        "no_teacher_tail": (TOPK_KL, lambda w: {"normalize": "tail", "teacher": w.without_tail}, "teacher.tail_logp", "None"),
        "no_topk_kl_coef": ("rlad_loss", lambda w: {"teacher": w.teacher}, "topk_kl_coef", "teacher", "None"),
        "coef_without_teacher": ("rlad_loss", lambda w: {"topk_kl_coef": 1.0}, "topk_kl_coef", "teacher", "None"),
        "rollout_alone": (RATIOS[:2], lambda w: {"rollout": rk.Rollout()}, "rollout", "needs rollout_logp", "None"),
        "rollout_form": ("grpo_loss", lambda w: _rollout(w, "cut"), "rollout.form", "truncate", "'cut'"),
        "rollout_policy": ("cispo_loss", lambda w: _rollout(w, policy="new"), "rollout.policy", "current", "'new'"),
        "rollout_bounds": ("kdrl_loss", lambda w: _rollout(w, low=3.0), "rollout", "low <= high", "low=3.0, high=2.0"),
        "rollout_type": ("opd_loss", lambda w: {"rollout_logp": w.o, "rollout": "tis"}, "rollout", "Rollout(form", "'tis'"),
        "mopd_old": ("mopd_loss", lambda w: _rollout(w), "rollout.policy", "'current'", "'old'"),
        "no_rollout": ("mopd_loss", lambda w: {"rollout_logp": None}, "rollout_logp", "None"),
        "no_teacher": (TAUGHT, lambda w: {"teacher_logp": None}, "teacher_logp", "None"),
        "kl_without_ref": (tuple(SAMPLED), lambda w: {"kl_coef": 0.1}, "kl_coef", "ref_logp", "None"),
        "cispo_clip": ("cispo_loss", lambda w: {"clip": 0.2}, "clip", "(low, high)", "0.2"),
        "temperatures": ("sapo_loss", lambda w: {"temperatures": (1.0, 0.0)}, "temperatures", "> 0", "(1.0, 0.0)"),
        "level": ("gspo_loss", lambda w: {"level": "token"}, "level", "sequence-token", "grpo_loss", "'token'"),
        "gspo_packed": ("gspo_loss", lambda w: {k: torch.randn(T) for k in ("logp", "old_logp", "advantages")}, "seq_ids", "None"),
        "no_base": ("opd_loss", lambda w: {"extrapolation": 1.5}, "extrapolation", "base_logp", "None"),
        "gamma": ("opd_loss", lambda w: {"gamma": 1.5}, "gamma", "[0, 1]", "1.5"),
        "gamma_packed": ("opd_loss", lambda w: {"gamma": 0.5} | _packed(w), "gamma", "seq_ids", "None"),
        "reward_clamp": ("opd_loss", lambda w: {"reward_clamp": 0.0}, "reward_clamp", "positive", "0.0"),
        "form": ("kdrl_loss", lambda w: {"form": "reward"}, "form", "in-reward", "'reward'"),
        "teach": ("kdrl_loss", lambda w: {"teach": "none"}, "teach", "wrong-groups", "'none'"),
        "kd_k1": ("kdrl_loss", lambda w: {"kd_estimator": "k1"}, "kd_estimator", "'k1'", "k2"),
        "kd_estimator": ("kdrl_loss", lambda w: {"kd_estimator": "k9"}, "kd_estimator", "k3+", "'k9'"),
        "no_correct": (FLAGGED, lambda w: {"correct": None}, "correct", "None", "(B,)"),
        "kdrl_no_correct": ("kdrl_loss", lambda w: {"correct": None, "teach": "wrong"}, "correct", "None", "(B,)"),
        "correct_half": (FLAGGED, lambda w: {"correct": w.half[:, 0]}, "correct", "0 or 1", "0.5"),
        "no_groups": ("hdpo_loss", lambda w: {"group_ids": None}, "group_ids", "None", "integers"),
        "mix": ("rlsd_loss", lambda w: {"mix": 1.5}, "mix", "[0, 1]", "1.5"),
        "weight_clip": ("rlsd_loss", lambda w: {"weight_clip": -0.1}, "weight_clip", "[0, 1]", "-0.1"),
        "no_teacher_at_all": (ANCHORED, lambda w: {"teacher_logp": None}, "teacher_logp", "None"),
    },
    "dtype": {
        "hidden": (SWEEPS, lambda w: {"hidden": w.hidden.bfloat16()}, "hidden", "bfloat16", "weight", "float32"),
        "integers": (PLAIN, lambda w: {"hidden": w.hidden.int()}, "hidden", "float32", "int32"),
        "target_float": (TARGETS, lambda w: {"target": w.target.float()}, "target", "integers", "float32"),
        "target_bool": (TARGETS, lambda w: {"target": w.target > 3}, "target", "integers", "bool"),
        "topk_ids_float": (IDS, lambda w: {"topk_ids": w.ids.float()}, "topk_ids", "integers", "float32"),
        "group_ids_float": ("hdpo_loss", lambda w: {"group_ids": w.a}, "group_ids", "integers", "float32"),
        "ids_float": ("linear_gather", lambda w: {"ids": w.ids.float()}, "ids", "integers", "float32"),
        "teacher_ids_float": (TOPK_KL, lambda w: {"teacher": rk.TopK(w.ids.float(), w.lq)}, "ids", "integers", "float32"),
    },
    "device": {
        "hidden": (SWEEPS, lambda w: {"hidden": w.hidden.to("meta")}, "hidden", "meta", "weight"),
        "target": (TARGETS, lambda w: {"target": w.target.to("meta")}, "target", "meta"),
        "mask": (MASKS, lambda w: {"mask": torch.ones(B, T, device="meta")}, "mask", "meta"),
        "old_logp": (RATIOS, lambda w: {"old_logp": w.o.to("meta")}, "old_logp", "meta"),
    },
}
TABLE = {
    f"{function}-{kind}-{case}": (function, spoil, fragments)
    for kind, cases in CASES.items()
    for case, (functions, spoil, *fragments) in cases.items()
    for function in ([functions] if isinstance(functions, str) else functions)
}


@pytest.mark.parametrize("function", CALLS)
def test_the_calls_are_right_before_they_are_spoiled(function: str) -> None:
    with rk.set_checks(True):
        CALLS[function](world())


@pytest.mark.parametrize("case", TABLE)
def test_message(case: str) -> None:
    function, spoil, fragments = TABLE[case]
    w = world()
    with pytest.raises(ValueError, match=f"^{function}: ") as error, rk.set_checks(True):
        CALLS[function](w, **spoil(w))
    rest = str(error.value)
    for fragment in fragments:
        assert fragment in rest, f"{fragment!r} is missing, or not in its place, in {str(error.value)!r}"
        rest = rest.split(fragment, 1)[1]


@pytest.mark.parametrize("name", ["rows", "cols"])
@pytest.mark.parametrize("size", [0, -2, 2.5, True, "8"], ids=str)
def test_set_tile(name: str, size: Any) -> None:
    with pytest.raises(ValueError, match=f"^set_tile: {name} must be a positive int or None, got {size!r}"):
        rk.set_tile(**{name: size})
