"""Arguments of the wrong kind: errors name the public function, the argument, what came and the fix. Numpy's numbers are fine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rlad_kernels as rk
from rlad_kernels.integrations.served import from_logprobs
from rlad_kernels.losses import GRPO, LossOutput, Reference, Rollout
from rlad_kernels.losses.cross_entropy import CrossEntropy
from rlad_kernels.losses.ratio.opd import OPD
from rlad_kernels.losses.rlad import RLAD
from rlad_kernels.losses.support.topk_kl import TopKKL
from rlad_kernels.losses.vocab.kl import JSD
from tests.test_bad_input import (
    CALLED,
    CALLS,
    GATHERED,
    LOSSES,
    ON_LOGP,
    SWEEPS,
    TARGETS,
    TAUGHT,
    B,
    D,
    K,
    T,
    V,
    known,
    with_scores,
    world,
)  # fmt: skip

pytestmark = pytest.mark.slow_interpreted  # what is refused is the same on every backend

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
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(torch.ones(V, D, device="cpu"), mesh, [Shard(0)])
        with pytest.raises(ValueError, match=r"^LMHead: weight is a DTensor with placements .*Shard.* LMHead\(weight, group="):
            rk.LMHead(weight)
        assert rk.LMHead(weight, group=mesh.get_group()).vocab_size == V
        assert rk.LMHead(weight.full_tensor()).vocab_size == V
        assert rk.LMHead(distribute_tensor(torch.ones(V, D, device="cpu"), mesh)).vocab_size == V  # replicated
    finally:
        torch.distributed.destroy_process_group()


# what is wrong → calls, the spoiled arguments, the message after the call's name …
OF_THE_CALL: dict[str, tuple[tuple[str, ...] | str, Spoil, str]] = {
    "hidden list": (SWEEPS, lambda w: {"hidden": w.hidden.tolist()}, "hidden must be a torch.Tensor, got list"),
    "hidden array": (SWEEPS, lambda w: {"hidden": np.ones((B, T, D))}, r"hidden must be a torch.Tensor, got ndarray; torch.as_"),
    "head module": (SWEEPS, lambda w: {"head": nn.Linear(D, V)}, "head must be an LMHead, got Linear; .*LMHead.from_model"),
    "head tensor": (SWEEPS, lambda w: {"head": w.weight}, r"head must be an LMHead, got Tensor; pass LMHead\(weight, bias\)"),
    "target list": (TARGETS, lambda w: {"target": w.target.tolist()}, "target must be a torch.Tensor, got list"),
    "no target": (TARGETS, lambda w: {"target": None}, "target must be a torch.Tensor, got None"),
    "mask list": (tuple(CALLS), lambda w: {"mask": [[1, 0, 1]] * B}, "mask must be a torch.Tensor, got list"),
    "topk_ids list": ("linear_logp", lambda w: {"topk_ids": w.ids.tolist()}, "topk_ids must be a torch.Te"),
    "ids array": (GATHERED, lambda w: {"ids": np.zeros((B, T, K), dtype=int)}, "ids must be a torch.Tensor, got ndarray"),
    "k float": ("linear_topk", lambda w: {"k": 2.0}, "k must be an int, got 2.0"),
    "k bool": ("linear_topk", lambda w: {"k": True}, "k must be an int, got True"),
    "k text": ("linear_topk", lambda w: {"k": "4"}, "k must be an int, got '4'"),
    "filter_eps text": (TARGETS, lambda w: {"filter_eps": "0"}, r"filter_eps must be a probability in \[0, 1\)"),
    "filter_eps bool": (TARGETS, lambda w: {"filter_eps": False}, r"filter_eps must be a probability in \[0, 1\)"),
}  # fmt: skip
# … or the name of the loss's class; tensors and options of every loss are in test_bad_input
OF_THE_LOSS: dict[str, tuple[tuple[str, ...] | str, Spoil, str]] = {
    "scores list": (tuple(ON_LOGP), lambda w: {"scores": w.s.tolist()}, "scores must be TokenScores (or|with) .*, got list"),
    "no scores": (tuple(ON_LOGP), lambda w: {"scores": None}, "scores must be TokenScores (or|with) .*, got NoneType"),
    "one tensor for two scores": (with_scores("logp", "topk_logp"), lambda w: {"scores": w.s}, "scores .* with logp, topk_logp"),
    "logp list": (with_scores("logp"), lambda w: {"logp": w.s.tolist()}, "logp must be a torch.Tensor, got list"),
    "topk_logp array": (with_scores("topk_logp"), lambda w: {"topk_logp": np.ones((B, T, K))}, "topk_logp must be a torch.Tens"),
    "teacher tuple": (TAUGHT, lambda w: {"teacher": (w.ids, w.lq)}, r"teacher must be a TopK, got tuple; .*TopK\("),
    "teacher lists": (TAUGHT, lambda w: {"teacher": rk.TopK(w.ids.tolist(), w.lq)}, "teacher.ids must be a torch.Tensor, got"),
    "teacher's list": (
        TAUGHT, lambda w: {"teacher": w.teacher._replace(target_logp=w.t.tolist())}, "teacher.target_logp must be a torch.Tensor",
    ),
    "reduction number": (CALLED, lambda w: {"reduction": 1}, r"reduction must be a Reduction or one of \('token-mean', .*got 1"),
    "reduction list": (CALLED, lambda w: {"reduction": ["token-mean"]}, r"reduction must be a Reduction or one of .*\['token-m"),
    "seq_ids list": (CALLED, lambda w: _seq([0, 0, 1]), "seq_ids must be a torch.Tensor, got list"),
    "seq_ids floats": (CALLED, lambda w: _seq(w.s), "seq_ids must be integers, got torch.float32"),
    "denominator text": (CALLED, lambda w: {"reduction": rk.Reduction(denominator="3")}, "denominator must be positive, got '3'"),
    "denominator bool": (CALLED, lambda w: {"reduction": rk.Reduction(denominator=True)}, "denominator must be positive, got True"),
}  # fmt: skip


def _seq(ids: Any) -> dict[str, rk.Reduction]:
    return {"reduction": rk.Reduction("seq-mean-token-mean", seq_ids=ids)}


TABLE = {
    f"{call}-{case}": (call, call.split()[prefix], spoil, message)
    for prefix, cases in ((0, OF_THE_CALL), (-1, OF_THE_LOSS))
    for case, (calls, spoil, message) in cases.items()
    for call in ((calls,) if isinstance(calls, str) else calls)
}


@pytest.mark.parametrize("case", TABLE)
def test_calls(case: str) -> None:
    call, prefix, spoil, message = TABLE[case]
    w = world()
    with pytest.raises(ValueError, match=f"^{prefix}: {message}"):
        CALLS[call](w, **spoil(w))


MISSPELT = {
    "reductoin": "reduction", "masks": "mask", "old_lopg": "old_logp", "advantges": "advantages", "ref_logprob": "ref_logp",
    "teacher_lopg": "teacher_logp", "teachers": "teacher",
}  # fmt: skip


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("wrong", MISSPELT)
@pytest.mark.parametrize("call", CALLED)
def test_a_misspelt_argument(call: str, wrong: str, kept: bool) -> None:
    """Also where no token is kept, so that the loss would not run."""
    name, right = call.split()[-1], MISSPELT[wrong]
    hint = "it takes|did you mean"
    if right in (*known(LOSSES[name]), "mask", "reduction"):
        hint = f"did you mean '{right}'"
    with pytest.raises(TypeError, match=rf"^{name}: got an unexpected argument '{wrong}'; ({hint})"):
        CALLS[call](world(), mask=torch.full((B, T), kept), **{wrong: None})


@pytest.mark.parametrize("call", CALLED)
def test_options_are_no_arguments_of_the_call(call: str) -> None:
    name = call.split()[-1]
    for option in (f.name for f in fields(LOSSES[name]) if f.name not in ("reduction", "value", "scores")):
        with pytest.raises(
            TypeError, match=rf"^{name}: {option} is an option, not a tensor of the call; wanted {name}\({option}=…"
        ):
            CALLS[call](world(), **{option: 1.0})


@pytest.mark.parametrize("name", LOSSES)
def test_a_misspelt_option(name: str) -> None:
    kind = type(LOSSES[name])
    for option in ("reductoin", "cilp", "mask", "old_logp"):
        with pytest.raises(TypeError, match=rf"{name}.__init__\(\) got an unexpected keyword argument '{option}'"):
            kind(**{option: None})
    with pytest.raises(TypeError, match=rf"{name}.__init__\(\) takes "):
        kind((0.2, 0.2), 3.0)


def test_tensors_have_names() -> None:
    w = world()
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3"):
        rk.losses.GRPO()(w.s, w.o)
    with pytest.raises(TypeError, match="takes 4 positional arguments but 5"):
        rk.linear_loss(w.hidden, w.head, w.target, rk.losses.CrossEntropy(), w.s)


def test_methods() -> None:
    w = world()
    dapo, dr_grpo = rk.METHODS["dapo"], rk.METHODS["dr_grpo"]
    with pytest.raises(TypeError, match=r"^GRPO: clip is an option, .* wanted GRPO\(clip=…\)"):
        dapo(w.s, old_logp=w.o, advantages=w.a, clip=(0.2, 0.3))
    with pytest.raises(TypeError, match=r"^GRPO: got an unexpected argument 'old_lopg'; did you mean 'old_logp'"):
        dapo(w.s, old_lopg=w.o, advantages=w.a)
    with pytest.raises(ValueError, match=r"^GRPO: advantages is None, wanted a tensor in logp's shape or \(B,\)"):
        dapo(w.s, old_logp=w.o)
    for reduction in (None, "token-mean", rk.Reduction()):
        with pytest.raises(ValueError, match=r"^dr_grpo: Reduction\(denominator=…\) is required \(B·L_max, .*, got "):
            dr_grpo(w.s, old_logp=w.o, advantages=w.a, reduction=reduction)
    with pytest.raises(TypeError, match=r"^METHODS\['forward_kl'\] compares two heads: linear_divergence_loss\("):
        rk.METHODS["forward_kl"](w.hidden)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sclae'"):
        _divergence(w, sclae=2.0)


@dataclass(frozen=True, kw_only=True)
class Broken(rk.TokenLoss):
    def tokens(self, scores: rk.TokenScores) -> Any:
        return scores.logp + None


@dataclass(frozen=True, kw_only=True)
class Forgetful(rk.TokenLoss):
    needs = ("w",)

    def tokens(self, scores: rk.TokenScores) -> Any:
        return scores.logp, {}


class Unwritten(rk.TokenLoss):
    pass


OWN_ERRORS: dict[type[rk.TokenLoss], tuple[type[Exception], str]] = {
    Broken: (TypeError, "^unsupported operand"),
    Forgetful: (TypeError, r"^Forgetful: tokens does not take \['w'\]: .*'w'"),
    Unwritten: (NotImplementedError, r"^Unwritten: tokens\(scores, \*\*tensors\) must be defined"),
}


@pytest.mark.parametrize("kind", OWN_ERRORS)
@pytest.mark.parametrize("fused", [False, True])
def test_own_losses_that_are_wrong(kind: type[rk.TokenLoss], fused: bool) -> None:
    """An error inside a loss is left alone."""
    w, loss, (error, message) = world(), kind(), OWN_ERRORS[kind]
    given = {k: w.pool[k] for k in loss.needed()}
    with pytest.raises(error, match=message):
        rk.linear_loss(w.hidden, w.head, w.target, loss, **given) if fused else loss(w.s, **given)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16], ids=lambda x: x.__name__)
def test_numbers_of_numpy(number: Any) -> None:
    w, x = world(), number(0.5)
    head = [
        rk.LMHead(w.weight, temperature=n, logit_scale=n, softcap=n, vocab_size=size) for n, size in ((x, np.int64(9)), (0.5, 9))
    ]
    ids, target = w.ids % 9, w.target % 9
    teacher, sampled = rk.TopK(ids, w.lq), {"old_logp": w.o, "advantages": w.a}
    calls: list[Callable[[Any, Any, Any], Any]] = [
        lambda h, n, i: rk.linear_logp(w.hidden, h, target, filter_eps=n).logp,
        lambda h, n, i: rk.linear_topk(w.hidden, h, i).logp,
        lambda h, n, i: rk.linear_loss(
            w.hidden, h, target,
            RLAD(
                alpha=n, clip=(n, n), teacher_clamp=n, reference=Reference(n), topk=TopKKL("mixed", scale=n, beta=n), topk_coef=n
            ),
            **sampled, teacher_logp=w.t, ref_logp=w.t, teacher=teacher, reduction=rk.Reduction(denominator=n), filter_eps=n,
        ).loss,
        lambda h, n, i: OPD(gamma=n, coef=n, reward_clamp=n, clip=(n, n), dual_clip=n + 1)(
            w.s, old_logp=w.o, teacher_logp=w.t
        ).loss,
        lambda h, n, i: TopKKL("jsd", beta=n, scale=n)(w.lq, teacher=teacher).loss,
        lambda h, n, i: GRPO(rollout=Rollout(low=n, high=n + 1))(w.s, **sampled, rollout_logp=w.t).loss,
        lambda h, n, i: rk.linear_loss(w.hidden, h, target, GRPO(clip=(n, n)), **sampled).loss,
        lambda h, n, i: rk.linear_divergence(w.hidden, h, w.hidden * 2, h, JSD(n), scale=n),
        lambda h, n, i: rk.linear_loss(w.hidden, h, target, CrossEntropy(z_loss=n)).loss,
    ]  # fmt: skip
    for call in calls:
        assert torch.equal(call(head[0], x, np.int32(3)), call(head[1], 0.5, 3))


OTHERS: dict[str, Callable[[Any], Any]] = {
    "linear_divergence: head must be an LMHead, got Tensor": lambda w: rk.linear_divergence(
        w.hidden, w.weight, w.hidden, w.head, JSD()
    ),
    "linear_divergence .teacher.: head must be an LMHead": lambda w: rk.linear_divergence(
        w.hidden, w.head, w.hidden, w.weight, JSD()
    ),
    "linear_divergence .teacher.: hidden must be a torch": lambda w: rk.linear_divergence(
        w.hidden, w.head, np.ones(3), w.head, JSD()
    ),
    "linear_divergence: divergence must be a Divergence .rk.losses.ForwardKL.*got 'jsd'": lambda w: rk.linear_divergence(
        w.hidden, w.head, w.hidden, w.head, "jsd"
    ),
    "linear_divergence_loss: scale must be finite, got '2'": lambda w: _divergence(w, scale="2"),
    "linear_divergence_loss: divergence must be a Divergence .*got 3": lambda w: _divergence(w, 3),
    "linear_divergence_loss: divergence must be a Divergence .*got <class": lambda w: _divergence(w, JSD),
    "linear_divergence_loss: divergence must be a Divergence .*got GRPO": lambda w: _divergence(w, GRPO()),
    "linear_divergence_loss: divergence must be a Divergence .*got <function": lambda w: _divergence(w, lambda q, p: q.sum(1)),
    "linear_divergence_loss: reduction must be a Reduction or one of .*'mean'": lambda w: _divergence(w, reduction="mean"),
    "linear_divergence_loss: teacher_weights must hold floats": lambda w: _divergence(w, teacher_weights=["1"]),
    "linear_divergence_loss: teacher_weights must have one entry": lambda w: _divergence(w, teacher_weights=1.0),
    "linear_support: head must be an LMHead, got Tensor": lambda w: rk.linear_support(w.hidden, w.weight, w.ids),
    "union: other must be a TopK, got tuple": lambda w: rk.supports.union(w.teacher, (w.ids, w.lq)),
    "with_sampled: target must be integers, got torch.float32": lambda w: rk.supports.with_sampled(w.teacher, w.s, w.t),
    "probability_band: low must be a number": lambda w: rk.supports.probability_band(w.teacher, "0", 1.0),
    "special_token_mask: tokens must be a torch.Tensor, got list": lambda w: rk.masks.special_token_mask([[1]], [1]),
    "final_eos_mask: eos_ids must be a list of ints, got 2": lambda w: rk.masks.final_eos_mask(w.target, 2),
    "response_mask: lengths must be integers, got torch.float32": lambda w: rk.masks.response_mask(w.g, w.a, 3),
    "top_entropy_mask: fraction must be in": lambda w: rk.masks.top_entropy_mask(w.s, "0.2"),
    "spread: responses must be a torch.Tensor, got list": lambda w: rk.masks.spread([1.0, 2.0], w.target),
    "sequence_stat: x must be a torch.Tensor, got list": lambda w: rk.spans.sequence_stat([1.0]),
    "combine_teachers: weights must be a torch.Tensor, got list": lambda w: rk.supports.combine_teachers([w.s, w.t], [0.5, 0.5]),
    "from_logprobs: k must be a positive int or None, got 2.0": lambda w: from_logprobs((w.ids, w.lq), k=2.0),
}


def _divergence(w: Any, divergence: Any = JSD(), **options: Any) -> LossOutput:  # noqa: B008
    return rk.linear_divergence_loss(w.hidden, w.head, w.hidden, w.head, divergence, **options)


@pytest.mark.parametrize("message", OTHERS)
def test_other_calls(message: str) -> None:
    w = world()
    with pytest.raises(ValueError, match=f"^{message}"):
        OTHERS[message](w)
