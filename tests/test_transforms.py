"""Forward-mode AD, torch.func and double backward: right, or an error that says so; never a derivative of zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import rlad_kernels as rk
from tests.sweeps import problem

N, V = 6, 23


def _teacher() -> rk.TopK:
    torch.manual_seed(3)
    logp = torch.randn(N, 5).log_softmax(1)
    return rk.TopK(torch.arange(4, dtype=torch.int32).repeat(N, 1), logp[:, :4], None, logp[:, 4], logp[:, 0])


def _old() -> Tensor:
    return torch.linspace(-3, -1, N)


def from_hidden() -> dict[str, Callable[[Tensor], Tensor]]:
    p = problem(n=N, v=V)
    head, other = rk.LMHead(p.weight.detach(), p.bias.detach()), rk.LMHead(p.weight.detach().roll(1, 0))
    teacher, kl = _teacher(), rk.losses.ForwardKL()
    rlad = rk.losses.RLAD(topk=rk.losses.TopKKL(), topk_coef=1.0, reduction="token-mean")
    near = {"old_logp": _old(), "advantages": _old()}
    return {
        "linear_logp": lambda h: rk.linear_logp(h, head, p.target, topk_ids=p.ids, entropy=True).logp.sum(),
        "linear_topk": lambda h: rk.linear_topk(h, head, 3).logp.sum(),
        "linear_support": lambda h: rk.linear_support(h, head, p.ids).logp.sum(),
        "linear_gather": lambda h: rk.linear_gather(h, head, p.ids).sum(),
        "linear_loss": lambda h: rk.linear_loss(h, head, p.target, rk.losses.CrossEntropy()).loss,
        "linear_loss rlad": lambda h: rk.linear_loss(h, head, p.target, rlad, **near, teacher=teacher).loss,
        "linear_loss gspo": lambda h: rk.linear_loss(
            h, head, p.target, rk.losses.GSPO(), **near, reduction=rk.Reduction(seq_ids=p.target * 0)
        ).loss,
        "linear_loss on a support": lambda h: rk.linear_loss(h, head, p.target, rk.losses.TopKKL(), teacher=teacher).loss,
        "linear_divergence": lambda h: rk.linear_divergence(h, head, p.hidden.detach(), other, kl).sum(),
        "linear_divergence_loss": lambda h: rk.linear_divergence_loss(h, head, p.hidden.detach(), other, kl).loss,
    }  # fmt: skip


def dual(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], object]] = {
    "dual": dual,
    "dual of a leaf": lambda f, x, v: dual(f, x.clone().requires_grad_(), v),
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,)),
    "grad": lambda f, x, v: torch.func.grad(f)(x),
    "vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
    "vmap of grad": lambda f, x, v: torch.func.vmap(torch.func.grad(f))(torch.stack([x, v])),
    "jvp of vmap": lambda f, x, v: torch.func.jvp(torch.func.vmap(f), (torch.stack([x, v]),), (torch.stack([v, x]),)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", from_hidden())
def test_calls_from_hidden_states_refuse_transforms(name: str, transform: str) -> None:
    f, (x, v) = from_hidden()[name], torch.randn(2, N, 16)
    with pytest.raises(NotImplementedError, match=rf"^{name.split()[0]}: hidden or the head is followed by forward-mode AD"):
        TRANSFORMS[transform](f, x, v)


def test_a_tensor_without_a_tangent_passes_inside_a_dual_level() -> None:
    f, x = from_hidden()["linear_logp"], torch.randn(N, 16)
    with forward_ad.dual_level():
        forward_ad.make_dual(x, x)
        assert torch.equal(f(x), f(x.clone()))


def test_a_compiled_jvp_is_refused_too() -> None:
    f, (x, v) = from_hidden()["linear_logp"], torch.randn(2, N, 16)
    with pytest.raises(Exception, match="forward-mode AD"):
        torch.compile(lambda x: torch.func.jvp(f, (x,), (v,))[1], backend="eager", fullgraph=True)(x)


def on_logp() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    teacher, old, adv = _teacher(), _old(), torch.linspace(-1, 2, N)
    s, q = old + 0.1 * torch.randn(N), torch.randn(N, 5).log_softmax(1)[:, :4]
    near = {"old_logp": old, "advantages": adv}
    seq = rk.Reduction(seq_ids=torch.tensor([0, 0, 0, 1, 1, 1]))
    reference = rk.losses.Reference(0.1)
    return {
        "grpo": (lambda s: rk.losses.GRPO(reference=reference)(s, **near, ref_logp=old).loss, s),
        "trrd": (lambda s: rk.losses.TRRD()(s, **near, teacher_logp=old - 0.2, reduction=seq).loss, s),
        "gspo": (lambda s: rk.losses.GSPO(clip=(0.9, 9.0))(s, **near, reduction=seq).loss, s),
        "cispo": (lambda s: rk.losses.CISPO()(s, **near).loss, s),
        "topk_kl": (lambda q: rk.losses.TopKKL()(q, teacher=teacher).loss, q),
        "topk_kl tail": (lambda q: rk.losses.TopKKL("forward", normalize="tail")(q, teacher=teacher).loss, q),
        "topk_kl jsd": (lambda q: rk.losses.TopKKL("jsd")(q, teacher=teacher).loss, q),
    }


@pytest.mark.parametrize("name", on_logp())
def test_losses_on_log_probs_are_right_under_transforms(name: str) -> None:
    """The same derivative as reverse mode, to a few roundings of its terms."""
    f, x = on_logp()[name]
    v = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(leaf), leaf)
    bound = 32 * torch.finfo(x.dtype).eps
    want, size = (slope * v).sum(), (slope * v).abs().sum()
    for tangent in (dual(f, x, v), torch.func.jvp(f, (x,), (v,))[1]):
        assert tangent is not None
        assert (tangent - want).abs() <= bound * size
    assert (torch.func.grad(f)(x) - slope).abs().max() <= bound * slope.abs().max()
    both = torch.func.vmap(f)(torch.stack([x, x + v]))
    assert (both - torch.stack([f(x), f(x + v)])).abs().max() <= bound * both.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", ["grpo", "trrd", "gspo", "topk_kl", "topk_kl tail"])
def test_double_backward_raises(name: str) -> None:
    f, x = on_logp()[name]
    leaf = x.clone().requires_grad_()
    for value, match in ((f(leaf), "once_differentiable|does not require grad"), (f(leaf).square(), "once_differentiable")):
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=match):
            slope.square().sum().backward()
