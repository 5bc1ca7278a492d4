"""from_model: heads that are more than a weight, and a model that comes out of the question as it went in."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlad_kernels import LMHead
from tests.toy import D, Map, Toy, V, agrees, capped, logits_of


class Casting(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.double(), self.weight.double()).to(input.dtype)


class Scaling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.1


class Adapted(nn.Linear):
    """As PEFT's layers: what it adds is 0 until it is trained."""

    base_layer = None


def test_a_head_of_its_own_class_counts_by_what_it_gives():
    agrees(model := Toy(head=Casting(D, V, bias=False)).eval(), LMHead.from_model(model))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(D, V, bias=False))
    with torch.no_grad():
        normed.parametrizations.weight.original0.mul_(3)
    agrees(model := Toy(head=normed).eval(), LMHead.from_model(model))
    with pytest.raises(ValueError, match=r"a head \(Scaling\) whose output is not hidden·weightᵀ \+ bias; merge or remove"):
        LMHead.from_model(Toy(head=Scaling(D, V)))
    with pytest.raises(ValueError, match=r"a PEFT adapter on its head \(Adapted\).*remove it from target_modules"):
        LMHead.from_model(Toy(head=Adapted(D, V)))


def test_hooks_on_the_head_count_by_what_they_do():
    model, seen = Toy().eval(), []
    watch = model.head.register_forward_hook(lambda *args: seen.append(args))
    agrees(model, LMHead.from_model(model))
    watch.remove()
    model.head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert LMHead.from_model(model).logit_scale == 2  # asked again: there is another hook now
    agrees(model, LMHead.from_model(model))
    model.head.register_forward_hook(lambda module, args, out: out + 0.5)
    with pytest.raises(ValueError, match="whose output is not hidden·weightᵀ"):
        LMHead.from_model(model)


def test_what_cannot_be_read_is_refused_with_the_fix():
    model = Toy(head=nn.Linear(D, V, bias=False, device="meta"))
    with pytest.raises(ValueError, match="head without values, on the meta device; load it, or keep lm_head out of"):
        LMHead.from_model(model)
    model.head.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised head \(torch.int8\); keep the head out of the quantisation"):
        LMHead.from_model(model)
    model.head.weight = nn.Parameter(torch.zeros(0))
    model.head.weight.ds_id = 3
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 has partitioned; use ZeRO-2 or FSDP2"):
        LMHead.from_model(model)
    model.head.weight = nn.Parameter(torch.zeros(V, D))
    model.head.weight.placements = ()  # type: ignore[attr-defined]  # as a DTensor has
    with pytest.raises(ValueError, match=r"a sharded head \(DTensor\); read it before fully_shard, or in a head_call"):
        LMHead.from_model(model)
    alone = Toy()
    alone.base_model = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="has no backbone"):
        LMHead.from_model(alone)


def test_a_factor_before_a_head_with_a_bias_is_refused_with_the_head_to_make():
    model = Toy(lambda h: h / 4, capped(9.0), head=nn.Linear(D, V)).eval()
    with pytest.raises(ValueError, match=r"by 0.25 before a head with a bias; .*LMHead\(weight, bias / 0.25, logit_scale=0.25"):
        LMHead.from_model(model)
    agrees(model, LMHead(model.head.weight, model.head.bias / 0.25, logit_scale=0.25, softcap=9.0))


def test_the_vocabulary_is_what_the_forward_leaves_of_it():
    model = Toy(after=lambda z: z[..., :50])
    assert LMHead.from_model(model, vocab_size=40).vocab_size == 40
    with pytest.raises(ValueError, match="has logits of 50 ids, got vocab_size=51"):
        LMHead.from_model(model, vocab_size=51)


@pytest.mark.parametrize("after", [capped(3.0), lambda z: z.flip(-1), lambda z: 1 / 0])
def test_the_model_comes_out_as_it_went_in(after: Map):
    model = Toy(after=after, head=nn.Linear(D, V)).train()
    model.base_model.layer.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    state, kept = torch.get_rng_state(), model.base_model.cache
    with contextlib.suppress(ValueError):
        LMHead.from_model(model)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert model.base_model.cache is kept and not hasattr(model.base_model, "length")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_the_model_is_asked_once_and_its_weights_are_read_each_time():
    model = Toy(after=capped(3.0))
    LMHead.from_model(model)
    with torch.no_grad():
        model.head.weight.mul_(7)
    model.config.pad_token_id = 5
    assert LMHead.from_model(model, temperature=0.5).softcap == 3.0
    assert model.asked == [1]
    model.head = nn.Linear(D, V, bias=False)
    assert LMHead.from_model(model).weight is model.head.weight
    twin = copy.deepcopy(model)
    assert LMHead.from_model(twin).weight is twin.head.weight
    assert twin.asked == model.asked == [1]
    model.after, model.config.cap = capped(2.0), 2.0
    assert LMHead.from_model(model).softcap == 2.0
    assert model.asked == [2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_finds_exact_numbers(dtype: torch.dtype):
    model = Toy(after=lambda z: capped(30.0, 0.3)(z.float())).to(dtype)
    head = LMHead.from_model(model)
    assert (head.logit_scale, head.softcap) == (pytest.approx(0.3, rel=1e-7), 30.0)
    head = LMHead.from_model(Toy(after=lambda z: (0.3 * z).to(dtype)).to(dtype))  # rounded by the model
    assert head.logit_scale == pytest.approx(0.3, rel=torch.finfo(dtype).eps / 4)
    with pytest.raises(ValueError, match="a layer between"):
        LMHead.from_model(Toy(before=lambda h: F.rms_norm(h, (D,))).to(dtype))
    with pytest.raises(ValueError, match="Scaling"):
        LMHead.from_model(Toy(head=Scaling(D, V)).to(dtype))


def test_dtypes_that_only_meet_under_autocast():
    model = Toy(after=capped(3.0)).bfloat16()
    model.head.float()
    head = LMHead.from_model(model)
    assert (head.softcap, head.weight.dtype) == (3.0, torch.float32)


def test_a_compiled_model_keeps_none_of_the_values():
    model = Toy(after=capped(3.0)).eval()
    ids = torch.arange(8).unsqueeze(0)
    want = model(ids).logits
    for compiled in (torch.compile(copy.deepcopy(model), backend="eager"), copy.deepcopy(model)):
        if compiled.__class__ is Toy:
            compiled.compile(backend="eager")
        assert LMHead.from_model(compiled).softcap == 3.0
        assert torch.equal(compiled(ids).logits, want)
        assert torch.equal(compiled(ids).logits, want)


def test_from_model_traces_once_the_model_has_been_asked():
    model, hidden = Toy(after=capped(3.0)).eval(), torch.randn(8, D)

    def logits(hidden: Tensor) -> Tensor:
        return logits_of(LMHead.from_model(model), hidden)

    want = logits(hidden)
    assert torch.equal(torch.compile(logits, backend="eager", fullgraph=True)(hidden), want)
