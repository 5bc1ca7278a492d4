"""The contract of the row ops: their schemas and fakes, and which backend serves which device.

The *row ops* (``fold_`` …) are the kernels inside a sweep's loop: C++ on CPU, Triton on CUDA, and Triton on CPU too when
``TRITON_INTERPRET=1``. The *sweep ops* around them (``engine``) are what autograd, ``torch.compile`` and opcheck see. This file
imports torch only; kernels are imported when first used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlad_kernels.core.dtypes import acc_dtype
from rlad_kernels.core.modes import without_autocast

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_TILE = "Tensor logits, int col0, Tensor? bias, Tensor inv_temp, float logit_scale, float softcap, Tensor slots"

ROW_OPS = {
    "fold_": f"({_TILE}, Tensor(a!) stats, Tensor(b!) slot_logits, bool entropy, bool extras) -> ()",
    "fold_topk_": f"({_TILE}, Tensor(a!) stats, Tensor(b!) slot_logits, Tensor(c!) top_logits, Tensor(d!) top_ids, "
    "bool entropy) -> ()",
    "dlogits_": f"(Tensor(a!) out, {_TILE}, Tensor slot_dz, Tensor rows, Tensor target, Tensor(b!)? lost, bool entropy, bool tail) "
    "-> ()",
    "column_stats_": "(Tensor(a!) out, Tensor logits, Tensor? bias, Tensor inv_temp, float logit_scale, float softcap, Tensor lse, "
    "int block) -> ()",
    "divergence_": "(Tensor(a!) value, Tensor(b!)? out, Tensor logits, Tensor? bias, Tensor inv_temp, float logit_scale, "
    "float softcap, Tensor norm, Tensor(c!) teacher, Tensor? teacher_bias, Tensor teacher_inv_temp, float teacher_scale, "
    "float teacher_softcap, Tensor teacher_norm, Tensor rows, str family, float a, float b, float c, bool accumulate, "
    "Tensor(d!)? sums=None) -> ()",
    "gather_dot": "(Tensor hidden, Tensor weight, Tensor ids) -> Tensor",
    "gather_dhidden_": "(Tensor(a!) out, Tensor grad, Tensor weight, Tensor ids, bool add) -> ()",
    "gather_dweight_": "(Tensor(a!) d_weight, Tensor grad, Tensor hidden, Tensor order, Tensor sorted_ids, bool add, int col0=0) "
    "-> ()",
}
TOKEN_OPS = {  # on a few values a token: plain PyTorch on CPU, which on CUDA would be a launch a line
    "row_slots": "(Tensor? target, Tensor? ids, int vocab_size) -> Tensor",
    "row_outputs": "(Tensor stats, Tensor slot_logits, Tensor slots, int vocab_size, bool target, bool entropy, bool tail, "
    f"bool extras) -> ({', '.join(['Tensor'] * 9)})",  # engine.outputs.Outputs
    "row_cotangents": "(Tensor slots, Tensor logp, Tensor? topk_logp, Tensor lse, Tensor lse_error, Tensor? g_logp, Tensor? g_lse, "
    "Tensor? g_entropy, Tensor? g_topk, Tensor? g_tail, Tensor? entropy, Tensor? tail_logp) -> (Tensor, Tensor, Tensor)",
    "dropped_mass": "(Tensor keep, Tensor logits, Tensor? bias, Tensor inv_temp, float logit_scale, float softcap, Tensor lse, "
    "int block) -> Tensor",
    "scale_": "(Tensor(a!) x, Tensor factor) -> ()",
    "clipped_ratio": "(Tensor logp, Tensor old_logp, Tensor? teacher_logp, Tensor advantages, Tensor? ref_logp, "
    "Tensor numbers, str kl_estimator) -> (Tensor, Tensor, Tensor)",  # numbers: those of losses.ratio.ratio_tokens
    "topk_kl": "(Tensor topk_logp, Tensor ids, Tensor teacher_logp, Tensor? tail_logp, Tensor? teacher_tail, str direction, "
    "str normalize) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _late(name: str) -> Callable[..., Any]:
    """A row op of the Triton backend, imported on its first call."""

    @without_autocast
    def call(*args: Any) -> Any:
        return import_module("rlad_kernels.backends.triton").LAUNCHERS[name](*args)

    return call


def _missing(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise RuntimeError(
            f"rlad::{name}: the C++ CPU backend is not built; run `pip install --no-build-isolation -e .` "
            "(it needs g++), or set TRITON_INTERPRET=1 for the slow Triton interpreter"
        )

    return call


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


def _register() -> None:
    torch.library.define("rlad::cpu_isa", "() -> str")
    torch.library.define("rlad::has_bf16_mm", "() -> bool")
    torch.library.define("rlad::huge_pages_", "(Tensor(a!) x) -> ()")
    torch.library.register_fake("rlad::huge_pages_", lambda x: None)
    torch.library.define("rlad::bf16_mm_", "(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()")  # C++ only
    for name, schema in {**ROW_OPS, **TOKEN_OPS}.items():
        torch.library.define(f"rlad::{name}", schema)
        torch.library.impl(f"rlad::{name}", ("cuda", "cpu") if INTERPRET else ("cuda",), _late(name))
        if schema.endswith("-> ()"):
            torch.library.register_fake(f"rlad::{name}", lambda *args: None)
    if not (INTERPRET or has_cpp()):
        for name in (*ROW_OPS, "huge_pages_"):
            torch.library.impl(f"rlad::{name}", "cpu", _missing(name))


def on_cpu(name: str, function: Callable[..., Any]) -> None:
    """Give a token op its CPU implementation, plain PyTorch; under ``TRITON_INTERPRET=1`` the kernel serves the CPU."""
    if not INTERPRET:
        torch.library.impl(f"rlad::{name}", "cpu", without_autocast(function))


_register()


@torch.library.register_fake("rlad::row_slots")
def _(target, ids, vocab_size):
    given = [x for x in (target, ids) if x is not None]
    return given[0].new_empty((len(given[0]), sum(x.shape[1] if x.dim() > 1 else 1 for x in given)), dtype=torch.int32)


@torch.library.register_fake("rlad::row_outputs")
def _(stats, slot_logits, slots, vocab_size, target, entropy, tail, extras):
    (n, j), new = slots.shape, stats.new_empty
    k, some = j - target, n * extras
    rows = (new(n * target), new(n), new(n * entropy), new((n, k) if k else 0), new(n * tail), new(some))
    return *rows, new(some, dtype=torch.bool), new(some), new(n)


@torch.library.register_fake("rlad::row_cotangents")
def _(slots, logp, topk_logp, lse, *args):
    return torch.empty_like(slots), lse.new_empty(slots.shape), lse.new_empty(6, len(lse))


@torch.library.register_fake("rlad::dropped_mass")
def _(keep, logits, bias, inv_temp, logit_scale, softcap, lse, block):
    return torch.empty_like(lse)


@torch.library.register_fake("rlad::gather_dot")
def _(hidden, weight, ids):
    return hidden.new_empty(ids.shape, dtype=acc_dtype(hidden.dtype))


@torch.library.register_fake("rlad::clipped_ratio")
def _(logp, *args):
    return torch.empty_like(logp), torch.empty_like(logp), logp.new_empty((7, *logp.shape))


@torch.library.register_fake("rlad::topk_kl")
def _(topk_logp, *args):
    n = topk_logp.shape[0]
    return topk_logp.new_empty(n), torch.empty_like(topk_logp), topk_logp.new_empty(n), topk_logp.new_empty(4, n)


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
