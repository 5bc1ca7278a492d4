"""LMHead: everything between hidden states and tempered logits, bundled once."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlad_kernels.core.check import check_floats, is_integer, is_number
from rlad_kernels.core.headmap import refused
from rlad_kernels.core.probe import head_map, output_layer, unwrapped


def rows_of_ranks(group: dist.ProcessGroup, rows: int, device: torch.device) -> list[int]:
    """How many rows each rank has, told by one collective."""
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"LMHead: group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    counts = torch.zeros(group.size(), 1, dtype=torch.int64, device=device)
    dist.all_gather([*counts.unbind(0)], torch.full((1,), rows, device=device), group=group)
    return counts.flatten().tolist()


def _local(argument: str, x: Any, group: dist.ProcessGroup | None) -> Any:
    """A DTensor's part on this rank."""
    if not (isinstance(x, Tensor) and type(x) is not Tensor and hasattr(x, "to_local")):
        return x
    placements = x.placements  # pyright: ignore[reportAttributeAccessIssue]
    cut = [(mesh, p) for mesh, p in enumerate(placements) if not p.is_replicate()]
    if not cut and group is None:
        return x.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    if group is not None and len(cut) == 1 and cut[0][1].is_shard(0):
        mesh = x.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
        if dist.get_process_group_ranks(mesh.get_group(cut[0][0])) == dist.get_process_group_ranks(group):
            return x.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    raise ValueError(
        f"LMHead: {argument} is a DTensor with placements {tuple(placements)}, group is {'None' if group is None else 'given'}. "
        "Wanted rows sharded over the group of tensor parallelism, whose ranks have the same tokens: LMHead(weight, "
        "group=mesh.get_group()), or a replicated one without group. A head that FSDP has sharded is whole inside its module's "
        "forward: call there, or pass weight.full_tensor(grad_placements=[Partial('avg')] * mesh.ndim)"
    )


@dataclass(frozen=True, eq=False)
class LMHead:
    """z = softcap·tanh(logit_scale·(h·W_v + b_v)/softcap)/temperature; without ``softcap``, without the tanh.

    Args:
        weight: ``(V, D)`` float32, bfloat16 or float16 (float64 on CPU); never copied if its last dimension is contiguous
            (another layout is copied once, here: make the head anew after the weight has changed).
        bias: ``(V,)`` of the weight's dtype (any float type under autocast), or None.
        temperature: positive float, or a tensor in the target's shape. It never receives gradient.
        logit_scale: float factor on the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: positive float (Gemma 2's ``final_logit_softcapping``) or None.
        vocab_size: rows of ``weight`` beyond it do not exist; None means all V.
        group: the process group whose ranks hold the head's rows, in the order of its ranks (tensor parallelism: all of them
            have the same tokens and make the same calls). ``weight`` and ``bias`` are this rank's rows, any number of them, or
            DTensors that are sharded by rows over the group; ids and ``vocab_size`` are those of the whole head.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch, rlad_kernels as rk
        >>> head = rk.LMHead(torch.eye(4, 2), temperature=0.5, softcap=30.0, vocab_size=3)
        >>> rk.linear_logp(torch.zeros(1, 2), head, torch.tensor([0])).logp
        tensor([-1.0986])
    """

    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    temperature: float | Tensor = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    group: dist.ProcessGroup | None = None
    first: int = field(default=0, init=False)  # the row of the whole head that ``weight`` begins with

    def __post_init__(self) -> None:
        weight, bias, temperature, softcap = self.weight, self.bias, self.temperature, self.softcap
        if isinstance(weight, nn.Module):
            raise ValueError(
                f"LMHead: weight must be a torch.Tensor, got the module {type(weight).__name__}; pass LMHead(module.weight, "
                "module.bias), or LMHead.from_model(model)"
            )
        weight, bias = self.local()
        check_floats("LMHead", "weight", weight)
        if weight.is_meta:
            raise ValueError(
                "LMHead: weight is on the meta device and has no values: the head is offloaded, or not loaded yet; load it to a "
                "device (with accelerate: name the head's device in device_map)"
            )
        if weight.dim() != 2 or not (weight.shape[1] if self.group else weight.numel()):
            raise ValueError(f"LMHead: weight must be (V, D) with V and D at least 1, got shape {tuple(weight.shape)}")
        here = rows = weight.shape[0]
        if bias is not None:
            check_floats("LMHead", "bias", bias)
        if bias is not None and tuple(bias.shape) != (here,):
            raise ValueError(f"LMHead: bias must be (V,)=({here},), got shape {tuple(bias.shape)}")
        if bias is not None and bias.device != weight.device:
            raise ValueError(f"LMHead: bias is on {bias.device}, weight on {weight.device}; they must share a device")
        if isinstance(temperature, Tensor):
            if temperature.is_complex() or temperature.dtype == torch.bool:
                raise ValueError(f"LMHead: temperature must hold positive numbers, got {temperature.dtype}")
        elif not (is_number(temperature) and 0 < temperature < math.inf):
            raise ValueError(f"LMHead: temperature must be a positive float or a tensor, got {temperature!r}")
        if not (is_number(self.logit_scale) and 0 < abs(self.logit_scale) < math.inf):
            raise ValueError(f"LMHead: logit_scale must be a finite non-zero float, got {self.logit_scale!r}")
        if softcap is not None and not (is_number(softcap) and 0 < softcap < math.inf):
            raise ValueError(f"LMHead: softcap must be a positive float or None, got {softcap!r}")
        put = object.__setattr__
        if self.group is not None:
            counts = rows_of_ranks(self.group, here, weight.device)
            put(self, "first", sum(counts[: dist.get_rank(self.group)]))
            rows = sum(counts)
        size = self.vocab_size
        if size is not None and not (is_integer(size) and 1 <= size <= rows):
            raise ValueError(f"LMHead: vocab_size must be an int in [1, V={rows}], got {self.vocab_size!r}")
        put(self, "vocab_size", rows if size is None else size if isinstance(size, int) else int(size))
        if weight is self.weight and weight.stride(-1) != 1 and weight.shape[1] > 1:
            put(self, "weight", weight.contiguous())

    def local(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as this rank's own tensors; gradient finds its way back to a DTensor.

        Raises:
            ValueError: for a DTensor that is sharded otherwise than ``group`` says.
        """
        return _local("weight", self.weight, self.group), None if self.bias is None else _local("bias", self.bias, self.group)

    @classmethod
    def from_model(cls, model: Any, *, temperature: float | Tensor = 1.0, vocab_size: int | None = None) -> LMHead:
        """The head of a causal LM: its weight and bias, and the scale, softcap and vocabulary that one forward of it shows.

        The model is asked on four tokens, once while its configuration stays as it is. It comes out of that as it went in.

        Args:
            model: a model of transformers, or a module with ``get_output_embeddings()``, ``get_input_embeddings()`` and
                ``base_model`` whose call with ``input_ids`` gives ``.logits``. A PEFT model with no adapter on the head is fine.
            temperature: as in :class:`LMHead`.
            vocab_size: pass the tokenizer's size if the embedding is padded; padding is never guessed.

        Raises:
            ValueError: if the logits are not this class's function of the last hidden state, or the model cannot be asked.
        """
        model = unwrapped(model)
        linear = output_layer(model)
        weight, bias = linear.weight, getattr(linear, "bias", None)
        cls(weight, bias)  # what cannot be a head is refused before the model is asked
        found = head_map(model, linear)
        if found.factor != 1 and bias is not None:
            raise refused(
                model,
                f"multiplies its last hidden state by {found.factor:g} before a head with a bias",
                f"make the head by hand, LMHead(weight, bias / {found.factor:g}, logit_scale={found.factor * found.scale:g}, …)",
            )
        if vocab_size is not None and vocab_size > found.columns:
            raise refused(model, f"has logits of {found.columns} ids, got vocab_size={vocab_size}", "pass at most these, or None")
        return cls(
            weight,
            bias,
            temperature=temperature,
            logit_scale=found.factor * found.scale,
            softcap=found.softcap,
            vocab_size=found.columns if vocab_size is None else vocab_size,
        )
