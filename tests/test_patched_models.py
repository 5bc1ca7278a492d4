"""Patched transformers models as objects: copies run the copy, undoing goes in any order, what wraps a model still can."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers not installed"),
]


def ids() -> Tensor:
    return torch.arange(18).view(2, 9) * 5


def use_rlad_loss(model: Any) -> Any:
    from rlad_kernels.integrations.transformers import use_rlad_loss

    return use_rlad_loss(model)


def add_head_call(model: Any) -> Any:
    from rlad_kernels.integrations.backbone import add_head_call

    return add_head_call("test", model)


def averaged(model: Any) -> Any:
    made = torch.optim.swa_utils.AveragedModel(model)
    made.n_averaged += 1
    return made


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "AveragedModel": averaged,
    "a copy's copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@pytest.mark.parametrize("patch", [use_rlad_loss, add_head_call])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_runs_the_copys_weights(how: str, patch: Callable[[Any], Any]):
    model, other = tiny.model(), tiny.model(seed=1)
    patch(model)
    made = COPIES[how](model)
    inner = made.module if how == "AveragedModel" else made
    inner.load_state_dict(other.state_dict())
    made.eval()
    other.eval()
    assert torch.equal(made(ids()).logits, other(ids()).logits)
    made(ids()).logits.sum().backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in inner.parameters())
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(inner.generate(ids(), **greedy), other.generate(ids(), **greedy))
    if patch is use_rlad_loss:
        ours, theirs = (m.train()(ids(), labels=ids()) for m in (inner, other))
        assert ours.logits is None and abs(ours.loss - theirs.loss) <= 2e-6 * theirs.loss
    else:
        found = made(input_ids=ids(), head_call=lambda hidden, model: (hidden, model))
        assert found.result[1] is inner
        torch.testing.assert_close(found.result[0], other.model(ids()).last_hidden_state)


def test_a_peft_model_and_its_copy():
    peft = pytest.importorskip("peft", reason="peft not installed: pip install -r requirements-dev.txt")
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    patch = use_rlad_loss(model)
    made = copy.deepcopy(model)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(1.5)
    wanted = copy.deepcopy(made)
    patch.undo()
    assert model.train()(input_ids=ids(), labels=ids()).logits is not None
    found = made.train()(input_ids=ids(), labels=ids())
    logits = wanted.eval()(input_ids=ids()).logits[:, :-1].log_softmax(-1)
    assert found.logits is None
    assert abs(found.loss + logits.gather(-1, ids()[:, 1:, None]).mean()) <= 2e-6 * found.loss


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_patches_come_off_in_any_order(order: tuple[int, ...]):
    model = tiny.model()
    kind = type(model)
    patches = [use_rlad_loss(model) for _ in range(3)]
    for left, i in zip((2, 1, 0), order, strict=True):
        patches[i].undo()
        patches[i].undo()
        out = model.train()(ids(), labels=ids())
        assert (out.logits is None) == (left > 0)
    assert type(model) is kind and not {"forward", "_rlad_losses", "_rlad_below"} & vars(model).keys()


def test_head_call_outlives_a_loss_around_it():
    model = tiny.model()
    first = use_rlad_loss(model)
    add_head_call(model)
    second = use_rlad_loss(model)
    first.undo()
    second.undo()
    assert model.train()(ids(), labels=ids()).logits is not None
    assert model(ids(), head_call=lambda hidden, model: hidden.shape).result == (2, 9, 32)


def test_a_factor_before_the_head_is_in_the_hidden_states_already():
    from rlad_kernels import LMHead, linear_logp
    from rlad_kernels.integrations.backbone import head_of
    from tests.test_transformers import build

    model = build("MiniCPM3").eval()
    assert LMHead.from_model(model).logit_scale == 10 / 32 and head_of(model).logit_scale == 1
    add_head_call(model)
    target = ids().flip(1)
    out = model(ids(), head_call=lambda hidden, model: linear_logp(hidden, head_of(model), target).logp)
    wanted = model(ids()).logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.result, wanted, atol=2e-6, rtol=0)


def test_another_patch_below_and_above():
    """As accelerate, TRL and PEFT do: a forward of the instance, around the one that it found."""
    model, calls = tiny.model(), []

    def wrap(name: str) -> None:
        function = model.forward.__func__ if isinstance(model.forward, types.MethodType) else model.forward

        @functools.wraps(function)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(self, *args, **kwargs)

        model.forward = types.MethodType(forward, model)

    def seen() -> list[str]:
        calls.clear()
        assert (model.train()(ids(), labels=ids()).logits is None) == on
        return list(calls)

    wrap("below")
    first, on = use_rlad_loss(model), True
    calls.clear()
    wrap("above")
    assert seen() == ["above", "below"]
    first.undo()
    on = False
    assert seen() == ["above", "below"]
    second, on = use_rlad_loss(model), True
    assert seen() == ["above", "below"]
    second.undo()
    on = False
    assert seen() == ["above", "below"]
    assert model.eval().generate(ids(), max_new_tokens=1).shape == (2, 10)


def test_data_parallel_replicas_run_themselves():
    model = tiny.model()
    use_rlad_loss(model)
    replica = model._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica and not {"forward", "_rlad_below"} & vars(replica).keys()


def test_it_saves_under_its_own_name(tmp_path: Path):
    import transformers

    model = tiny.model()
    use_rlad_loss(model)
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == ["Qwen3ForCausalLM"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(ids()).logits, model.eval()(ids()).logits)


def test_compiled_it_is_one_graph_for_all_steps():
    model = tiny.model().train()
    wanted = model(ids(), labels=ids())
    wanted.loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    use_rlad_loss(compiled)
    for _ in range(3):
        model.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=True) if _ else torch.enable_grad():
            out = compiled(input_ids=ids(), labels=ids())
        out.loss.backward()
        assert abs(out.loss - wanted.loss) <= 2e-6 * wanted.loss
        assert (model.lm_head.weight.grad - gradient).norm() <= 1e-5 * gradient.norm()
    assert not {"forward", "_loss_function"} & {*vars(model), *vars(model.model), *vars(model.lm_head)}


def test_mixed_precision_of_accelerate():
    state = pytest.importorskip("accelerate.state", reason="accelerate not installed: pip install -r requirements-dev.txt")
    from accelerate import Accelerator

    state.AcceleratorState._reset_state(True)
    try:
        model = tiny.model().train()
        use_rlad_loss(model)
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        prepared = accelerator.prepare_model(model)
        found = prepared(input_ids=ids(), labels=ids())
        assert found.logits is None and found.loss.isfinite()
        plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert plain(input_ids=ids(), labels=ids()).logits is None
    finally:
        state.AcceleratorState._reset_state(True)
