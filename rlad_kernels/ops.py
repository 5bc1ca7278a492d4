"""The contract: torch.library schemas, fakes, autograd, and which backend serves which device.

Two layers. The *sweep ops* (``linear_logp`` …) are what autograd, ``torch.compile`` and opcheck see; ``sweep.py`` runs
them as a loop over tiles. The *row ops* (``fold_`` …) are the kernels inside that loop: C++ on CPU, Triton on CUDA,
and Triton on CPU too when ``TRITON_INTERPRET=1``. This file imports torch only; kernels are imported when first used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlad_kernels.modes import without_autocast

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_CALL = "Tensor inv_temp, float logit_scale, float softcap, int vocab_size"
_TILE = "Tensor logits, int col0, Tensor? bias, Tensor inv_temp, float logit_scale, float softcap, Tensor slots"
_TEACHERS = "Tensor[] teachers, float[] teacher_heads, Tensor weights, str divergence, Tensor params"
_DIVERGENCE = f"{_HEAD}, Tensor? mask, {_CALL}, {_TEACHERS}"

ROW_OPS = {
    "fold_": f"({_TILE}, bool exclude, Tensor(a!) stats, Tensor(b!) slot_logits, bool entropy, bool extras) -> ()",
    "fold_topk_": f"({_TILE}, Tensor(a!) stats, Tensor(b!) slot_logits, Tensor(c!) top_logits, Tensor(d!) top_ids, "
    "bool entropy) -> ()",
    "dlogits_": f"(Tensor(a!) out, {_TILE}, Tensor slot_dz, Tensor rows, bool entropy, bool tail) -> ()",
    "column_stats_": "(Tensor(a!) out, Tensor logits, Tensor? bias, Tensor inv_temp, float logit_scale, float softcap, Tensor lse, "
    "int block) -> ()",
    "divergence_": "(Tensor(a!) value, Tensor(b!)? out, Tensor logits, Tensor? bias, Tensor inv_temp, float logit_scale, "
    "float softcap, Tensor norm, Tensor teacher, Tensor? teacher_bias, Tensor teacher_inv_temp, float teacher_scale, "
    "float teacher_softcap, Tensor teacher_norm, Tensor rows, str family, float a, float b, float c, bool accumulate) -> ()",
    "gather_dot": "(Tensor hidden, Tensor weight, Tensor ids) -> Tensor",
    "gather_dhidden": "(Tensor grad, Tensor weight, Tensor ids) -> Tensor",
    "gather_dweight_": "(Tensor(a!) d_weight, Tensor grad, Tensor hidden, Tensor order, Tensor sorted_ids, bool add) -> ()",
    "score_partials": f"({_HEAD}, Tensor inv_temp, float logit_scale, float softcap, Tensor slots, bool entropy, bool extras, "
    "bool column_max) -> (Tensor, Tensor, Tensor)",
}
LOSS_OPS = {
    "clipped_ratio": "(Tensor logp, Tensor old_logp, Tensor? teacher_logp, Tensor advantages, Tensor? ref_logp, "
    "Tensor numbers, str kl_estimator) -> (Tensor, Tensor, Tensor)",  # numbers: those of losses.ratio.ratio_tokens
    "topk_kl": "(Tensor topk_logp, Tensor ids, Tensor teacher_logp, Tensor? tail_logp, Tensor? teacher_tail, str direction, "
    "str normalize) -> (Tensor, Tensor, Tensor, Tensor)",
}
SWEEP_OPS = {
    "linear_logp": f"({_HEAD}, Tensor target, Tensor? topk_ids, Tensor? mask, {_CALL}, bool entropy, bool tail, bool extras, "
    "float filter_eps, bool ahead, str caller) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "linear_logp_bwd": f"({_HEAD}, Tensor target, Tensor? topk_ids, Tensor? mask, {_CALL}, Tensor logp, Tensor topk_logp, "
    "Tensor lse, Tensor lse_error, Tensor entropy, Tensor tail_logp, Tensor slope, Tensor keep_columns, Tensor mean, "
    "Tensor g_logp, Tensor g_lse, Tensor? g_entropy, Tensor? g_topk, Tensor? g_tail, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    "linear_topk": f"({_HEAD}, Tensor? target, Tensor? mask, {_CALL}, int k, bool entropy) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "linear_gather": f"({_HEAD}, Tensor ids, Tensor? mask, Tensor inv_temp, int vocab_size, str caller) -> Tensor",
    "linear_gather_bwd": f"(Tensor grad, {_HEAD}, Tensor ids, Tensor? mask, int vocab_size, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)",
    "linear_divergence": f"({_DIVERGENCE}, bool ahead, str caller) -> (Tensor, Tensor)",
    "linear_divergence_bwd": f"({_DIVERGENCE}, Tensor slope, Tensor g, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    "linear_divergence_loss": f"({_DIVERGENCE}, Tensor row_weight, bool need_hidden, bool need_weight, bool need_bias, str caller) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fused_linear_loss": f"({_HEAD}, Tensor target, Tensor? topk_ids, Tensor? mask, {_CALL}, Tensor row_weight, float filter_eps, "
    "str caller, str loss, str[] names, Tensor[] tensors, Tensor numbers, str[] words, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype logits, sums and outputs are held in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a fused loss's finished gradients wait for the loss's own: float16 loses them before a loss scale."""
    return torch.float32 if dtype == torch.float16 else dtype


def _late(module: str, name: str) -> Callable[..., Any]:
    """A function that imports ``rlad_kernels.<module>`` on its first call, so that contracts cost no kernel import."""

    @without_autocast
    def call(*args: Any) -> Any:
        return getattr(import_module(f"rlad_kernels.{module}"), name)(*args)

    return call


def _missing(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise RuntimeError(
            f"rlad::{name}: the C++ CPU backend is not built; run `pip install --no-build-isolation -e .` "
            "(it needs g++), or set TRITON_INTERPRET=1 for the slow Triton interpreter"
        )

    return call


def _register() -> None:
    torch.library.define("rlad::cpu_isa", "() -> str")
    torch.library.define("rlad::has_bf16_mm", "() -> bool")
    torch.library.define("rlad::huge_pages_", "(Tensor(a!) x) -> ()")
    torch.library.define("rlad::checked", "(Tensor x, str rule, str what) -> Tensor")
    torch.library.define("rlad::bf16_mm_", "(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()")  # C++ only
    for name, schema in {**ROW_OPS, **LOSS_OPS, **SWEEP_OPS}.items():
        torch.library.define(f"rlad::{name}", schema)
    triton_devices = ("cuda", "cpu") if INTERPRET else ("cuda",)
    for name in (*ROW_OPS, *LOSS_OPS):
        torch.library.impl(f"rlad::{name}", triton_devices, _late("kernels", name))
    for name in SWEEP_OPS:
        module = "divergence" if name.startswith("linear_divergence") else "sweep"
        where = ("fused", "fused_linear_loss_op") if name == "fused_linear_loss" else (module, name)
        torch.library.impl(f"rlad::{name}", ("cpu", "cuda"), _late(*where))
    torch.library.impl("rlad::checked", ("cpu", "cuda"), _late("rows", "checked"))
    if INTERPRET:
        return
    torch.library.impl("rlad::clipped_ratio", "cpu", _late("losses.ratio", "clipped_ratio_cpu"))
    torch.library.impl("rlad::topk_kl", "cpu", _late("losses.topk_kl", "topk_kl_cpu"))
    if not has_cpp():
        for name in (*ROW_OPS, "huge_pages_"):
            torch.library.impl(f"rlad::{name}", "cpu", _missing(name))


def numbers(*values: float) -> Tensor:
    """An op's numbers, float64 on the CPU. An op that took a float would be compiled anew for each value of it.

    Under ``torch.compile`` by arithmetic on a tensor: what fills one with a number is compiled for its value, too.
    """
    if not (torch.compiler.is_compiling() and values):
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([x.to(one) if isinstance(x, Tensor) else one * x for x in values])


def has_cpp() -> bool:
    """Whether the C++ CPU backend is built; importing it registers its kernels."""
    try:
        import_module("rlad_kernels._C")
    except ModuleNotFoundError:  # any other ImportError is a build that does not load: that must be seen
        return False
    return True


def has_bf16_mm() -> bool:
    """Whether CPU products of bfloat16 matrices go to ``bf16_mm_``: the C++ backend, on a CPU with instructions for them."""
    return not INTERPRET and has_cpp() and torch.ops.rlad.has_bf16_mm()


_register()
_rlad = torch.ops.rlad


def _empty(like: Tensor, shape: Sequence[int] | torch.Size, wanted: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape if wanted else (0,), dtype=dtype or acc_dtype(like.dtype))


@torch.library.register_fake("rlad::linear_logp")
def _(
    hidden, weight, bias, target, topk_ids, mask, inv_temp, scale, softcap, vocab_size, entropy, tail, extras, eps, ahead, caller
):
    from rlad_kernels.sparse import blocks_of

    rows = target.shape
    blocks = blocks_of(rows[0])
    topk = topk_ids.shape if topk_ids is not None else (0,)
    return (
        _empty(hidden, rows),
        _empty(hidden, rows),
        _empty(hidden, rows, entropy),
        _empty(hidden, topk),
        _empty(hidden, rows, tail),
        _empty(hidden, rows, extras),
        _empty(hidden, rows, extras, torch.bool),
        _empty(hidden, rows, extras),
        _empty(hidden, rows),
        _empty(hidden, hidden.shape, ahead),
        _empty(hidden, rows, eps > 0),
        _empty(hidden, (blocks, vocab_size), eps > 0, torch.bool),
        _empty(hidden, (blocks, hidden.shape[1]), eps > 0),
    )


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need: Sequence[bool], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    given = zip((hidden, weight, bias), need, strict=True)
    return tuple(weight.new_empty(0) if x is None or not n else x.new_empty(x.shape, dtype=dtype) for x, n in given)


@torch.library.register_fake("rlad::linear_logp_bwd")
def _(hidden, weight, bias, *args):
    return _gradients(hidden, weight, bias, args[-3:])


@torch.library.register_fake("rlad::linear_topk")
def _(hidden, weight, bias, target, mask, inv_temp, scale, softcap, vocab_size, k, entropy):
    n = hidden.shape[0]
    return (
        _empty(hidden, (n, k), dtype=torch.int32),
        _empty(hidden, (n, k)),
        _empty(hidden, (n,)),
        _empty(hidden, (n,)),
        _empty(hidden, (n,), target is not None),
        _empty(hidden, (n,), entropy),
    )


@torch.library.register_fake("rlad::checked")
def _(x, rule, what):
    return torch.empty_like(x)


@torch.library.register_fake("rlad::linear_gather")
def _(hidden, weight, bias, ids, mask, inv_temp, vocab_size, caller):
    return _empty(hidden, ids.shape)


@torch.library.register_fake("rlad::linear_gather_bwd")
def _(grad, hidden, weight, bias, ids, mask, vocab_size, *need):
    return _gradients(hidden, weight, bias, need)


@torch.library.register_fake("rlad::clipped_ratio")
def _(logp, *args):
    return torch.empty_like(logp), torch.empty_like(logp), logp.new_empty((7, *logp.shape))


@torch.library.register_fake("rlad::topk_kl")
def _(topk_logp, *args):
    n = topk_logp.shape[0]
    return topk_logp.new_empty(n), torch.empty_like(topk_logp), topk_logp.new_empty(n), topk_logp.new_empty(4, n)


@torch.library.register_fake("rlad::fused_linear_loss")
def _(hidden, weight, bias, target, topk_ids, mask, inv_temp, *args):
    from rlad_kernels.losses.metrics import METRICS

    gradients = _gradients(hidden, weight, bias, args[-3:], held_dtype(weight.dtype))
    return _empty(hidden, ()), _empty(hidden, target.shape), _empty(hidden, (len(METRICS),)), *gradients


@torch.library.register_fake("rlad::linear_divergence")
def _(hidden, weight, bias, mask, inv_temp, scale, softcap, vocab_size, *args):
    return _empty(hidden, hidden.shape[:1]), _empty(hidden, hidden.shape, args[-2])


@torch.library.register_fake("rlad::linear_divergence_bwd")
def _(hidden, weight, bias, *args):
    return _gradients(hidden, weight, bias, args[-3:])


@torch.library.register_fake("rlad::linear_divergence_loss")
def _(hidden, weight, bias, *args):
    gradients = _gradients(hidden, weight, bias, args[-4:-1], held_dtype(weight.dtype))
    return _empty(hidden, ()), _empty(hidden, hidden.shape[:1]), *gradients


def _no_double_backward(name: str) -> None:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"rlad::{name}: double backward is not supported")

    torch.library.register_autograd(f"rlad::{name}", backward)


_no_double_backward("linear_logp_bwd")
_no_double_backward("linear_gather_bwd")
_no_double_backward("linear_divergence_bwd")


def _wanted(ctx: Any, bias: Tensor | None) -> tuple[bool, bool, bool]:
    return ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]


def _given(grads: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
    return [g if wanted else None for g, wanted in zip(grads, need, strict=True)]


def _logp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, topk_ids, mask, inv_temp, *ctx.head, ctx.entropy, ctx.tail, _, _, _, _ = inputs
    made = (output[0], output[3], output[1], output[8], output[2], output[4], output[9], *output[11:])
    ctx.save_for_backward(hidden, weight, bias, target, topk_ids, mask, inv_temp, *made)


def _logp_backward(ctx: Any, g_logp: Tensor, g_lse: Tensor, g_entropy: Tensor, g_topk: Tensor, g_tail: Tensor, *_: Tensor) -> Any:
    hidden, weight, bias, target, topk_ids, mask, inv_temp, *saved = ctx.saved_tensors
    need = _wanted(ctx, bias)
    grads = _rlad.linear_logp_bwd(
        hidden, weight, bias, target, topk_ids, mask, inv_temp, *ctx.head, *saved, g_logp, g_lse,
        g_entropy if ctx.entropy else None, g_topk if topk_ids is not None else None, g_tail if ctx.tail else None, *need,
    )  # fmt: skip
    return *_given(grads, need), *[None] * 13


torch.library.register_autograd("rlad::linear_logp", _logp_backward, setup_context=_logp_setup)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.vocab_size, _ = inputs
    ctx.save_for_backward(*tensors)


def _gather_backward(ctx: Any, grad: Tensor) -> Any:
    hidden, weight, bias, ids, mask = ctx.saved_tensors
    need = _wanted(ctx, bias)
    grads = _rlad.linear_gather_bwd(grad, hidden, weight, bias, ids, mask, ctx.vocab_size, *need)
    return *_given(grads, need), *[None] * 5


torch.library.register_autograd("rlad::linear_gather", _gather_backward, setup_context=_gather_setup)


def _ratio_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])


@once_differentiable
def _ratio_backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> Any:
    return g_loss * ctx.saved_tensors[0], *[None] * 6


def _topk_kl_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[2])


@once_differentiable
def _topk_kl_backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> Any:
    d_topk, d_tail = ctx.saved_tensors
    return g_loss.unsqueeze(-1) * d_topk, None, None, g_loss * d_tail if ctx.needs_input_grad[3] else None, None, None, None


torch.library.register_autograd("rlad::clipped_ratio", _ratio_backward, setup_context=_ratio_setup)
torch.library.register_autograd("rlad::topk_kl", _topk_kl_backward, setup_context=_topk_kl_setup)


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.need, ctx.tensors = inputs[0].dtype, tuple(inputs[-3:]), len(inputs[15])
    ctx.lists = [None if x else [] for x in (inputs[14], inputs[17])]  # an empty list counts as one of tensors: it wants one back
    ctx.save_for_backward(*output[3:])


def _fused_backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> Any:
    grads = [(g_loss * d).to(ctx.dtype) if need else None for need, d in zip(ctx.need, ctx.saved_tensors, strict=True)]
    names, words = ctx.lists
    return *grads, *[None] * 11, names, [None] * ctx.tensors, None, words, *[None] * 3


torch.library.register_autograd("rlad::fused_linear_loss", _fused_backward, setup_context=_fused_setup)


def _no_gradient(ctx: Any) -> list[Any]:
    """For mask, call and teachers' arguments."""
    return [*[None] * 5, [None] * ctx.teachers, *[None] * 4]


def _divergence_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *head, teachers, ctx.teacher_heads, weights, ctx.divergence, params, _, _ = inputs
    ctx.head, ctx.teachers = head[5:], len(teachers)
    ctx.save_for_backward(*head[:5], weights, params, output[1], *teachers)


def _divergence_backward(ctx: Any, g: Tensor, _: Tensor) -> Any:
    hidden, weight, bias, mask, inv_temp, weights, params, slope, *teachers = ctx.saved_tensors
    need = _wanted(ctx, bias)
    given = (teachers, ctx.teacher_heads, weights, ctx.divergence, params)
    grads = _rlad.linear_divergence_bwd(hidden, weight, bias, mask, inv_temp, *ctx.head, *given, slope, g, *need)
    return *_given(grads, need), *_no_gradient(ctx), None, None


def _divergence_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.need, ctx.teachers = inputs[0].dtype, tuple(inputs[-4:-1]), len(inputs[8])
    ctx.save_for_backward(*output[2:])


def _divergence_loss_backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> Any:
    grads = [(g_loss * d).to(ctx.dtype) if need else None for need, d in zip(ctx.need, ctx.saved_tensors, strict=True)]
    return *grads, *_no_gradient(ctx), *[None] * 5


torch.library.register_autograd("rlad::linear_divergence", _divergence_backward, setup_context=_divergence_setup)
torch.library.register_autograd("rlad::linear_divergence_loss", _divergence_loss_backward, setup_context=_divergence_loss_setup)
