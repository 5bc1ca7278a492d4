"""Arguments of the wrong kind: errors name the public function, the argument, what came and the fix. Numpy's numbers are fine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rlad_kernels as rk
from rlad_kernels.integrations.served import from_logprobs
from tests.test_bad_input import CALLS, MASKS, RATIOS, SAMPLED, SWEEPS, TARGETS, TOPK_KL, B, D, K, T, V, world

Spoil = Callable[[Any], dict[str, Any]]
W = torch.ones(V, D)
HEADS: dict[str, tuple[Callable[[], Any], str]] = {
    "module": (lambda: rk.LMHead(nn.Linear(D, V)), r"weight must be a torch.Tensor, got the module Linear; .*module.weight"),
    "list": (lambda: rk.LMHead([[1.0]]), r"weight must be a torch.Tensor, got list; torch.as_tensor\(weight\)"),
    "array": (lambda: rk.LMHead(np.ones((V, D))), "weight must be a torch.Tensor, got ndarray"),
    "none": (lambda: rk.LMHead(None), "weight must be a torch.Tensor, got None"),
    "no vocabulary": (lambda: rk.LMHead(torch.ones(0, D)), r"weight must be \(V, D\) with V and D at least 1, got shape \(0, 8\)"),
    "no width": (lambda: rk.LMHead(torch.ones(V, 0)), r"weight must be \(V, D\) with V and D at least 1, got shape \(16, 0\)"),
    "sparse": (lambda: rk.LMHead(torch.ones(V, D).to_sparse()), r"weight has layout torch.sparse_coo, .*weight.to_dense\(\)"),
    "meta": (lambda: rk.LMHead(torch.ones(V, D, device="meta")), "weight is on the meta device .*offloaded.* load it"),
    "bias list": (lambda: rk.LMHead(torch.ones(V, D), [0.0] * V), "bias must be a torch.Tensor, got list"),
    "no temperature": (lambda: _head(temperature=None), "temperature must be a positive float or a tensor, got None"),
    "temperature text": (lambda: _head(temperature="1"), "temperature must be a positive float or a tensor, got '1'"),
    "temperature bool": (lambda: _head(temperature=True), "temperature must be a positive float or a tensor, got True"),
    "temperatures bool": (lambda: _head(temperature=torch.ones(3) > 0), "temperature must hold positive numbers, got torch.bool"),
    "no logit_scale": (lambda: _head(logit_scale=None), "logit_scale must be a finite non-zero float, got None"),
    "softcap text": (lambda: _head(softcap="30"), "softcap must be a positive float or None, got '30'"),
    "vocab_size float": (lambda: _head(vocab_size=9.0), r"vocab_size must be an int in \[1, V=16\], got 9.0"),
}


def _head(**options: Any) -> rk.LMHead:
    return rk.LMHead(torch.ones(V, D), **options)


@pytest.mark.parametrize("case", HEADS)
def test_heads(case: str) -> None:
    make, message = HEADS[case]
    with pytest.raises(ValueError, match=f"^LMHead: {message}"):
        make()


def test_a_distributed_head() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_tensor

        weight = distribute_tensor(torch.ones(V, D, device="cpu"), init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"^LMHead: weight is a DTensor, wanted a whole tensor; pass weight.full_tensor\(\)"):
            rk.LMHead(weight)
        assert rk.LMHead(weight.full_tensor()).vocab_size == V
    finally:
        torch.distributed.destroy_process_group()


ON_LOGP = ("grpo_loss", "trrd_loss", *SAMPLED)
CASES: dict[str, tuple[tuple[str, ...] | str, Spoil, str]] = {
    "hidden list": (SWEEPS, lambda w: {"hidden": w.hidden.tolist()}, "hidden must be a torch.Tensor, got list"),
    "hidden array": (SWEEPS, lambda w: {"hidden": np.ones((B, T, D))}, r"hidden must be a torch.Tensor, got ndarray; torch.as_"),
    "head module": (SWEEPS, lambda w: {"head": nn.Linear(D, V)}, "head must be an LMHead, got Linear; .*LMHead.from_model"),
    "head tensor": (SWEEPS, lambda w: {"head": w.weight}, r"head must be an LMHead, got Tensor; pass LMHead\(weight, bias\)"),
    "target list": (TARGETS, lambda w: {"target": w.target.tolist()}, "target must be a torch.Tensor, got list"),
    "no target": (TARGETS, lambda w: {"target": None}, "target must be a torch.Tensor, got None"),
    "mask list": (MASKS, lambda w: {"mask": [[1, 0, 1]] * B}, "mask must be a torch.Tensor, got list"),
    "topk_ids list": (("linear_logp", "fused_linear_loss"), lambda w: {"topk_ids": w.ids.tolist()}, "topk_ids must be a torch.Te"),
    "ids array": ("linear_gather", lambda w: {"ids": np.zeros((B, T, K), dtype=int)}, "ids must be a torch.Tensor, got ndarray"),
    "k float": ("linear_topk", lambda w: {"k": 2.0}, "k must be an int, got 2.0"),
    "k bool": ("linear_topk", lambda w: {"k": True}, "k must be an int, got True"),
    "k text": ("linear_topk", lambda w: {"k": "4"}, "k must be an int, got '4'"),
    "filter_eps text": (TARGETS, lambda w: {"filter_eps": "0"}, r"filter_eps must be a probability in \[0, 1\)"),
    "filter_eps bool": (TARGETS, lambda w: {"filter_eps": False}, r"filter_eps must be a probability in \[0, 1\)"),
    "advantages list": (RATIOS, lambda w: {"advantages": [1.0, 2.0]}, "advantages must be a torch.Tensor, got list"),
    "advantages number": (RATIOS, lambda w: {"advantages": 1.0}, "advantages must be a torch.Tensor, got float"),
    "no advantages": (RATIOS, lambda w: {"advantages": None}, "advantages is None, wanted a tensor"),
    "no old_logp": ((*RATIOS, "cispo_loss", "gspo_loss", "opd_loss"), lambda w: {"old_logp": None}, "old_logp is None, wanted"),
    "logp list": (ON_LOGP, lambda w: {"logp": w.s.tolist()}, "logp must be a torch.Tensor, got list"),
    "logp ids": (ON_LOGP, lambda w: {"logp": w.target}, "logp must be floats, got torch.int64"),
    "teacher tuple": ((*TOPK_KL, "rlad_loss"), lambda w: _teacher((w.ids, w.lq)), r"teacher must be a TopK, got tuple; .*TopK\("),
    "teacher lists": (TOPK_KL, lambda w: {"teacher": rk.TopK(w.ids.tolist(), w.lq)}, "teacher.ids must be a torch.Tensor, got"),
    "alpha text": (("trrd_loss", "rlad_loss"), lambda w: {"alpha": "0.5"}, r"alpha must be in \[0, 1\], got '0.5'"),
    "clip text": (RATIOS, lambda w: {"clip": ("0.2", "0.2")}, r"clip must be \(low, high\) .*'0.2'"),
    "no kl_coef": (RATIOS, lambda w: {"kl_coef": None}, "kl_coef must be a finite number, got None"),
    "kl_coef nan": (RATIOS, lambda w: {"kl_coef": torch.nan}, "kl_coef must be a finite number, got nan"),
    "kl_estimator list": (RATIOS, lambda w: {"kl_estimator": ["k3"]}, r"kl_estimator must be one of .*\['k3'\]"),
    "dual_clip text": (RATIOS, lambda w: {"dual_clip": "3"}, "dual_clip must be greater than 1 or None, got '3'"),
    "scale text": (TOPK_KL, lambda w: {"scale": "1"}, "scale must be a finite number, got '1'"),
    "beta text": (TOPK_KL, lambda w: {"beta": "0.5"}, r"beta must be inside \(0, 1\) .*'0.5'"),
    "reduction number": (RATIOS, lambda w: {"reduction": 1}, r"reduction must be one of \('token-mean', .*got 1"),
    "seq_ids list": (RATIOS, lambda w: {"seq_ids": [0, 0, 1], **_seq()}, "seq_ids must be a torch.Tensor, got list"),
    "seq_ids floats": (RATIOS, lambda w: {"seq_ids": w.s, **_seq()}, "seq_ids must be integers, got torch.float32"),
    "denominator text": (RATIOS, lambda w: {"denominator": "3"}, "denominator must be positive, got '3'"),
    "inputs list": ("fused_linear_loss", lambda w: {"inputs": [w.a]}, "inputs must be a dict of token_loss's arguments, got list"),
    "token_loss name": ("fused_linear_loss", lambda w: {"token_loss": "grpo"}, r"token_loss must be a function of \(scores, "),
    "token_loss of none": ("fused_linear_loss", lambda w: {"token_loss": lambda scores: None}, "token_loss must return .* None"),
    "coef text": ("opd_loss", lambda w: {"coef": "1"}, "coef must be a finite number, got '1'"),
    "gamma text": ("opd_loss", lambda w: {"gamma": "1"}, r"gamma must be in \[0, 1\], got '1'"),
    "kd_coef": (("kdrl_loss", "hdpo_loss", "sdar_loss"), lambda w: {"kd_coef": None}, "kd_coef must be a finite number, got None"),
    "rollout low": ("grpo_loss", lambda w: {"rollout_logp": w.o, "rollout": rk.Rollout(low="0")}, "rollout must have 0 <= low"),
}  # fmt: skip


def _teacher(x: Any) -> dict[str, Any]:
    return {"teacher": x}


def _seq() -> dict[str, str]:
    return {"reduction": "seq-mean-token-mean"}


TABLE = {
    f"{f}-{case}": (f, spoil, message)
    for case, (functions, spoil, message) in CASES.items()
    for f in ((functions,) if isinstance(functions, str) else functions)
}


@pytest.mark.parametrize("case", TABLE)
def test_calls(case: str) -> None:
    function, spoil, message = TABLE[case]
    w = world()
    given = spoil(w) | ({"topk_kl_coef": 0.5} if case == "rlad_loss-teacher tuple" else {})
    with pytest.raises(ValueError, match=f"^{function}: {message}"):
        CALLS[function](w, **given)


FORWARDING = [
    name for name in rk.__all__ if inspect.isfunction(f := getattr(rk, name)) and any(
        p.kind == p.VAR_KEYWORD for p in inspect.signature(f).parameters.values()
    )
]  # fmt: skip
MISSPELT = {
    "reductoin": "reduction", "kl_ceof": "kl_coef", "seqids": "seq_ids", "denominators": "denominator",
}  # fmt: skip


def test_which_functions_pass_options_on() -> None:
    assert set(FORWARDING) == {*SAMPLED, "topk_advantage_loss"}


@pytest.mark.parametrize("wrong", MISSPELT)
@pytest.mark.parametrize("name", SAMPLED)
def test_a_misspelt_option(name: str, wrong: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}: got an unexpected option '{wrong}'; did you mean '{MISSPELT[wrong]}'"):
        SAMPLED[name](world(), **{wrong: None})


def test_options_that_a_function_does_not_have() -> None:
    w = world()
    for options, message in (
        ({"dual_clip": 3.0}, "cispo_loss: got an unexpected option 'dual_clip'"),
        ({"name": "x"}, "cispo_loss: got an unexpected option 'name'; it has logp, old_logp, advantages, mask, clip, ref_logp"),
    ):
        with pytest.raises(TypeError, match=f"^{message}"):
            rk.cispo_loss(w.s, w.o, w.a, **options)
    with pytest.raises(TypeError, match=r"^opd_loss: got an unexpected option 'gama'; did you mean 'gamma'"):
        rk.opd_loss(w.s, w.o, w.t, gama=0.9)
    with pytest.raises(TypeError, match=r"^topk_advantage_loss: got an unexpected option 'diretcion'; did you mean 'direction'"):
        rk.topk_advantage_loss(w.s, w.o, w.lq, w.teacher, diretcion="forward")


def test_a_misspelt_option_of_a_method() -> None:
    w = world()
    with pytest.raises(TypeError, match=r"^METHODS\['dapo'\]: got an unexpected option 'cilp'; did you mean 'clip'"):
        rk.METHODS["dapo"](w.s, w.o, w.a, cilp=(0.2, 0.3))
    with pytest.raises(TypeError, match=r"^METHODS\['forward_kl'\]: got an unexpected option 'sclae'; did you mean 'scale'"):
        rk.METHODS["forward_kl"](w.hidden, w.head, w.hidden, w.head, sclae=2.0)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'advantages'"):
        rk.METHODS["dapo"](w.s, w.o)


@pytest.mark.parametrize("kept", [True, False])
def test_a_misspelt_input(kept: bool) -> None:
    """Also where no token is kept, so that the loss would not run."""
    w = world()
    inputs = {"old_logp": w.o, "advantges": w.o}
    message = r"^fused_linear_loss: token_loss does not take inputs \['advantges', 'old_logp'\]: .*'advantages'"
    with pytest.raises(TypeError, match=message):
        rk.fused_linear_loss(
            w.hidden, w.head, w.target, rk.TOKEN_LOSSES["grpo"], inputs=inputs, mask=torch.full((B, T), kept)
        )  # fmt: skip


def test_an_error_inside_a_token_loss_is_left_alone() -> None:
    def broken(scores: rk.TokenScores) -> Tensor:
        return scores.logp + None

    w = world()
    with pytest.raises(TypeError, match="unsupported operand"):
        rk.fused_linear_loss(w.hidden, w.head, w.target, broken, inputs={})


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16], ids=lambda x: x.__name__)
def test_numbers_of_numpy(number: Any) -> None:
    w, x = world(), number(0.5)
    head = [
        rk.LMHead(w.weight, temperature=n, logit_scale=n, softcap=n, vocab_size=size) for n, size in ((x, np.int64(9)), (0.5, 9))
    ]
    ids, target = w.ids % 9, w.target % 9
    teacher = rk.TopK(ids, w.lq)
    calls: list[Callable[[Any, Any, Any], Any]] = [
        lambda h, n, i: rk.linear_logp(w.hidden, h, target, filter_eps=n).logp,
        lambda h, n, i: rk.linear_topk(w.hidden, h, i).logp,
        lambda h, n, i: rk.rlad_loss(
            w.hidden, h, target, old_logp=w.o, advantages=w.a, teacher_logp=w.t, teacher=teacher, topk_kl_coef=n, alpha=n,
            clip=(n, n), teacher_clamp=n, kl_coef=n, ref_logp=w.t, scale=n, denominator=n, filter_eps=n,
        ).loss,
        lambda h, n, i: rk.opd_loss(w.s, w.o, w.t, gamma=n, coef=n, reward_clamp=n, clip=(n, n), dual_clip=n + 1).loss,
        lambda h, n, i: rk.topk_kl_loss(w.lq, teacher, direction="jsd", beta=n, scale=n).loss,
        lambda h, n, i: rk.grpo_loss(w.s, w.o, w.a, rollout_logp=w.t, rollout=rk.Rollout(low=n, high=n + 1)).loss,
        lambda h, n, i: rk.linear_divergence(w.hidden, h, w.hidden * 2, h, divergence="jsd", beta=n, scale=n),
        lambda h, n, i: rk.linear_cross_entropy_loss(w.hidden, h, target, z_loss=n).loss,
    ]  # fmt: skip
    for call in calls:
        assert torch.equal(call(head[0], x, np.int32(3)), call(head[1], 0.5, 3))


OTHERS: dict[str, Callable[[Any], Any]] = {
    "linear_divergence: head must be an LMHead, got Tensor": lambda w: rk.linear_divergence(w.hidden, w.weight, w.hidden, w.head),
    "linear_divergence .teacher.: head must be an LMHead": lambda w: rk.linear_divergence(w.hidden, w.head, w.hidden, w.weight),
    "linear_divergence .teacher.: hidden must be a torch": lambda w: rk.linear_divergence(w.hidden, w.head, np.ones(3), w.head),
    "linear_divergence_loss: scale must be finite, got '2'": lambda w: _divergence(w, scale="2"),
    "linear_divergence_loss: divergence must be a callable or one of .*got 3": lambda w: _divergence(w, divergence=3),
    "linear_divergence_loss: teacher_weights must hold floats": lambda w: _divergence(w, teacher_weights=["1"]),
    "linear_divergence_loss: teacher_weights must have one entry": lambda w: _divergence(w, teacher_weights=1.0),
    "linear_support: head must be an LMHead, got Tensor": lambda w: rk.linear_support(w.hidden, w.weight, w.ids),
    "topk_pg_loss: old_topk_logp is None": lambda w: rk.topk_pg_loss(w.lq, None, w.teacher),
    "topk_advantage_loss: scale must be a finite": lambda w: rk.topk_advantage_loss(w.s, w.o, w.lq, w.teacher, scale="1"),
    "topk_sampled_tail_loss: iw_clip must be": lambda w: rk.topk_sampled_tail_loss(w.lq, w.s, w.target, w.tail, iw_clip=2.0),
    "eopd_loss: logp must be a torch.Tensor, got list": lambda w: rk.eopd_loss(w.s.tolist(), w.lq, w.o, w.teacher),
    "union: other must be a TopK, got tuple": lambda w: rk.union(w.teacher, (w.ids, w.lq)),
    "with_sampled: target must be integers, got torch.float32": lambda w: rk.with_sampled(w.teacher, w.s, w.t),
    "probability_band: low must be a number": lambda w: rk.probability_band(w.teacher, "0", 1.0),
    "special_token_mask: tokens must be a torch.Tensor, got list": lambda w: rk.special_token_mask([[1]], [1]),
    "final_eos_mask: eos_ids must be a list of ints, got 2": lambda w: rk.final_eos_mask(w.target, 2),
    "response_mask: lengths must be integers, got torch.float32": lambda w: rk.response_mask(w.g, w.a, 3),
    "top_entropy_mask: fraction must be in": lambda w: rk.top_entropy_mask(w.s, "0.2"),
    "spread: responses must be a torch.Tensor, got list": lambda w: rk.spread([1.0, 2.0], w.target),
    "sequence_stat: x must be a torch.Tensor, got list": lambda w: rk.sequence_stat([1.0]),
    "combine_teachers: weights must be a torch.Tensor, got list": lambda w: rk.combine_teachers([w.s, w.t], [0.5, 0.5]),
    "from_logprobs: k must be a positive int or None, got 2.0": lambda w: from_logprobs((w.ids, w.lq), k=2.0),
}


def _divergence(w: Any, **options: Any) -> rk.LossOutput:
    return rk.linear_divergence_loss(w.hidden, w.head, w.hidden, w.head, **options)


@pytest.mark.parametrize("message", OTHERS)
def test_other_calls(message: str) -> None:
    w = world()
    w.tail = w.teacher._replace(target_logp=w.t)
    with pytest.raises(ValueError, match=f"^{message}"):
        OTHERS[message](w)
