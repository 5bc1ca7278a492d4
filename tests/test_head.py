"""LMHead: what from_model reads out of transformers models, per-token temperature, padding, views, checks."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad_kernels as rk
from tests.oracles import gradient, hold

EPS = torch.finfo(torch.float32).eps
V, D = 97, 32
SMALL = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.5,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # class prefix and what its head has beyond a matrix
    "Qwen3": ("Qwen3", {}),
    "SmolLM2": ("Llama", {"tie_word_embeddings": True}),
    "Gemma2": ("Gemma2", {"final_logit_softcapping": 3.0}),
    "Gemma3": ("Gemma3", {"final_logit_softcapping": 3.0}),
    "Cohere": ("Cohere", {"logit_scale": 0.25}),
    "Granite": ("Granite", {"logits_scaling": 4.0}),
    "HyperCLOVAX": ("HyperCLOVAX", {"logits_scaling": 4.0}),  # where Granite divides, it multiplies
    "Phi_bias": ("Phi", {}),
    "FalconH1": ("FalconH1", {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16,
                              "mamba_d_state": 8, "mamba_chunk_size": 8}),
}  # fmt: skip
PLAIN, TIED = {"Qwen3", "SmolLM2"}, {"SmolLM2", "Gemma2"}


def build(name: str) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    prefix, more = MODELS[name]
    config = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")(**SMALL | more)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        if model.lm_head.bias is not None:
            model.lm_head.bias.normal_()
    return model


def product_error(hidden: Tensor, head: rk.LMHead) -> Tensor:
    """How far two float32 computations of the same logits may be apart: D products and sums, then scale, cap and bias round."""
    size = hidden.abs().double() @ head.weight.abs().double().T + (0 if head.bias is None else head.bias.abs())
    return (D + 8) * EPS * size * abs(head.logit_scale)


@pytest.mark.parametrize("name", MODELS)
def test_from_model_reproduces_the_models_own_logits(name: str) -> None:
    model = build(name)
    ids = torch.randint(3, V, (2, 5))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    hidden, logits = out.hidden_states[-1], out.logits
    head = rk.LMHead.from_model(model)
    assert head.weight is model.get_output_embeddings().weight
    assert head.vocab_size == V
    found = rk.linear_gather(hidden, head, torch.arange(V).expand(2, 5, V))
    bound = product_error(hidden, head)
    assert ((found - logits).abs() <= bound).all()
    bare = hidden @ head.weight.T
    if name not in PLAIN:  # the model's own scale, cap or bias is large enough to be missed
        assert (bare - logits).abs().max() > 100 * bound.max()
    target = torch.randint(V, (2, 5))
    scores = rk.linear_logp(hidden, head, target)
    expected = logits.double().log_softmax(2).gather(2, target[..., None])[..., 0]
    # lse moves by at most the largest logit's error; exp, V sums and log round
    assert ((scores.logp - expected).abs() <= 2 * bound.amax(2) + V * EPS + 4 * EPS * expected.abs()).all()
    tempered = rk.linear_logp(hidden, rk.LMHead.from_model(model, temperature=0.5), target).logp
    expected = (logits.double() / 0.5).log_softmax(2).gather(2, target[..., None])[..., 0]
    assert ((tempered - expected).abs() <= 4 * bound.amax(2) + V * EPS + 4 * EPS * expected.abs()).all()


@pytest.mark.parametrize("name", sorted(TIED))
def test_tied_weights_stay_one_tensor(name: str) -> None:
    model = build(name)
    assert rk.LMHead.from_model(model).weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["SmolLM2", "Gemma2", "Phi_bias", "Granite"])
def test_gradient_is_that_of_the_models_own_logits(name: str) -> None:
    model = build(name)
    ids, target = torch.randint(3, V, (2, 5)), torch.randint(V, (2, 5))
    head, found = rk.LMHead.from_model(model), []
    for ours in (True, False):
        out = model(ids, output_hidden_states=True)
        hidden = out.hidden_states[-1]
        own = out.logits.log_softmax(2).gather(2, target[..., None])[..., 0]
        logp = rk.linear_logp(hidden, head, target).logp if ours else own
        found.append(torch.autograd.grad(logp.sum(), (hidden, head.weight)))
    # The probabilities of both differ by the error of the logits; d_hidden is their sum times W.
    weight = head.weight.abs().sum(0).max() * abs(head.logit_scale)
    bound = (2 * product_error(hidden.detach(), head).max() + V * EPS) * weight
    assert (found[0][0] - found[1][0]).abs().max() <= bound < found[1][0].abs().max() / 100
    if name not in TIED:  # there the embedding's gradient comes on top; d_weight alone sums ten tokens' hidden states
        bound = 10 * bound / weight * hidden.abs().max() * abs(head.logit_scale)
        assert (found[0][1] - found[1][1]).abs().max() <= bound < found[1][1].abs().max() / 100


def test_padding_is_never_guessed() -> None:
    model = build("Qwen3")
    model.config.vocab_size = V - 7  # a config that speaks of fewer tokens than the matrix has rows
    assert rk.LMHead.from_model(model).vocab_size == V
    assert rk.LMHead.from_model(model, vocab_size=V - 7).vocab_size == V - 7


def test_rows_beyond_vocab_size_do_not_exist() -> None:
    weight, hidden, target = torch.randn(20, D), torch.randn(5, D), torch.randint(13, (5,))
    weight[13:] = torch.nan
    weight.requires_grad_()
    head = rk.LMHead(weight, vocab_size=13)
    scores = rk.linear_logp(hidden, head, target)
    scores.logp.sum().backward()
    same = rk.linear_logp(hidden, rk.LMHead(weight.detach()[:13]), target)
    assert torch.equal(scores.logp, same.logp)
    assert weight.grad is not None
    assert not weight.grad[13:].any()
    with pytest.raises(ValueError, match=r"target .*vocab_size=13.* 13"), rk.set_checks(True):
        rk.linear_logp(hidden, head, target * 0 + 13)
    with pytest.raises(ValueError, match=r"vocab_size=13.*K=14"):
        rk.linear_topk(hidden, head, 14)


@pytest.mark.parametrize("shape", [(12,), (3, 4)], ids=["packed", "padded"])
def test_temperature_of_each_token(shape: tuple[int, ...]) -> None:
    hidden, target = torch.randn(*shape, D, requires_grad=True), torch.randint(V, shape)
    weight, bias = torch.randn(V, D), torch.randn(V)
    temperature = torch.linspace(0.3, 2.0, 12).view(shape).requires_grad_()
    head = rk.LMHead(weight, bias, temperature=temperature, logit_scale=0.5, softcap=4.0)

    def row(x: Tensor) -> Tensor:
        z = 4 * torch.tanh(0.5 * (x @ weight.to(x.dtype).T + bias.to(x.dtype)) / 4)
        return z / temperature.detach()[..., None].to(x.dtype)

    def logits(x: Tensor) -> Tensor:
        return row(x).gather(-1, target[..., None])[..., 0]

    def logp(x: Tensor) -> Tensor:
        return row(x).log_softmax(-1).gather(-1, target[..., None])[..., 0]

    scores, gathered = rk.linear_logp(hidden, head, target), rk.linear_gather(hidden, head, target[..., None])[..., 0]
    for actual, formula in ((scores.logp, logp), (gathered, logits)):
        hold(actual.detach(), formula, hidden.detach())
        grads = torch.autograd.grad(actual.sum(), (hidden, temperature), allow_unused=True)
        hold(grads[0], gradient(formula), hidden)
        assert grads[1] is None
    found = rk.linear_topk(hidden, head, V, target=target).target_logp
    assert found is not None
    hold(found, logp, hidden.detach())


def test_one_temperature_in_a_tensor() -> None:
    hidden, target, weight = torch.randn(6, D), torch.randint(V, (6,)), torch.randn(V, D)
    for t in (torch.tensor(0.5), torch.tensor([0.5])):
        one = rk.linear_logp(hidden, rk.LMHead(weight, temperature=t), target)
        assert torch.equal(one.logp, rk.linear_logp(hidden, rk.LMHead(weight, temperature=0.5), target).logp)


VIEWS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(V, D),
    "columns_of_a_wider_matrix": lambda: torch.randn(V, D + 5)[:, :D],
    "every_other_row": lambda: torch.randn(2 * V, D)[::2],
    "offset": lambda: torch.randn(V * D + 3)[3:].view(V, D),
    "transposed": lambda: torch.randn(D, V).T,
    "every_other_column": lambda: torch.randn(V, 2 * D)[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_weights_of_any_layout_and_no_copy_where_the_last_dimension_is_contiguous(view: str) -> None:
    weight = VIEWS[view]().requires_grad_()
    head = rk.LMHead(weight)
    if weight.stride(1) == 1:
        assert head.weight is weight
    hidden, target, ids = torch.randn(7, D), torch.randint(V, (7,)), torch.randint(V, (7, 3))
    found = []
    for w in (weight, weight.detach().clone(memory_format=torch.contiguous_format).requires_grad_()):
        scores = rk.linear_logp(hidden, rk.LMHead(w), target, topk_ids=ids)
        gathered = rk.linear_gather(hidden, rk.LMHead(w), ids)
        assert scores.topk_logp is not None
        grad = torch.autograd.grad((scores.logp + scores.topk_logp.sum(1) + gathered.sum(1)).sum(), w)[0]
        found.append((scores.logp, scores.topk_logp, gathered, grad, rk.linear_topk(hidden, rk.LMHead(w), 4).logp))
    for actual, expected in zip(*found, strict=True):
        # leading dimensions may choose another order of summation in the products: D terms, logits of size ≤ 5·√D
        assert (actual - expected).abs().max() <= D * EPS * expected.abs().max().clamp_min(5 * D**0.5)


def test_from_model_names_what_it_needs() -> None:
    for wrong in (
        SimpleNamespace(),
        SimpleNamespace(get_output_embeddings=lambda: torch.nn.Linear(3, 5), config=SimpleNamespace()),
    ):
        with pytest.raises(ValueError, match=r"^LMHead.from_model: model .*get_output_embeddings.*SimpleNamespace"):
            rk.LMHead.from_model(wrong)


CHECKS: dict[str, tuple[dict[str, Any], str]] = {
    "weight_1d": ({"weight": torch.zeros(3)}, r"weight .*\(V, D\).*\(3,\)"),
    "weight_3d": ({"weight": torch.zeros(1, 2, 3)}, r"weight .*\(V, D\).*\(1, 2, 3\)"),
    "bias_shape": ({"bias": torch.zeros(4)}, r"bias .*\(5,\).*\(4,\)"),
    "temperature_0": ({"temperature": 0.0}, "temperature .*positive.*0.0"),
    "temperature_negative": ({"temperature": -1.0}, "temperature .*positive.*-1.0"),
    "temperature_nan": ({"temperature": float("nan")}, "temperature .*positive.*nan"),
    "logit_scale_0": ({"logit_scale": 0.0}, "logit_scale .*non-zero.*0.0"),
    "logit_scale_inf": ({"logit_scale": float("inf")}, "logit_scale .*finite.*inf"),
    "softcap_0": ({"softcap": 0.0}, "softcap .*positive.*0.0"),
    "softcap_negative": ({"softcap": -30.0}, "softcap .*positive.*-30.0"),
    "vocab_size_0": ({"vocab_size": 0}, r"vocab_size .*5.* 0"),
    "vocab_size_too_large": ({"vocab_size": 6}, r"vocab_size .*5.* 6"),
    "vocab_size_float": ({"vocab_size": 3.5}, r"vocab_size .*3\.5"),
}


@pytest.mark.parametrize("case", CHECKS)
def test_arguments_are_checked(case: str) -> None:
    given, wanted = CHECKS[case]
    with pytest.raises(ValueError, match=f"^LMHead: {wanted}"):
        rk.LMHead(**{"weight": torch.zeros(5, 3)} | given)


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        rk.LMHead(torch.zeros(5, 3), None, 0.7)  # type: ignore[misc]
