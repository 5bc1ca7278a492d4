"""RLADTrainer: TRL's GRPO trainer with a teacher and RLAD's objective, from hidden states in one sweep (arXiv 2602.22495)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from trl import GRPOTrainer

from rlad_kernels.core.check import TOPK_MAX, check_k
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.probe import unwrapped
from rlad_kernels.core.reduction import Reduction
from rlad_kernels.core.types import LossOutput, TopK
from rlad_kernels.integrations.backbone import HeadOutput, add_head_call, head_of
from rlad_kernels.integrations.trl.config import NAME, RLADConfig, check_columns, check_config, objective
from rlad_kernels.integrations.wiring import check_head, check_version, check_vocab
from rlad_kernels.linear.logp import linear_logp
from rlad_kernels.linear.loss import linear_loss
from rlad_kernels.linear.topk import linear_topk

Teacher = Callable[[Tensor, Tensor, int], TopK]
_FIELDS = ("ids", "logp", "tail_logp", "target_logp")
_VOCAB_FIX = "if one head is only padded, set RLADConfig.vocab_size to len(tokenizer); else take a teacher with this tokenizer"


class RLADTrainer(GRPOTrainer):
    """GRPO's rollouts, rewards and advantages; the loss is TRRD plus topk_kl_coef × truncated KL to the teacher's top-K.

    One temperature: old, reference, new and teacher's log-probs are all at ``args.temperature``, the sampling temperature. A
    teacher that is a model is read at it; a callable must answer at it.

    Args:
        teacher: a causal LM with the student's vocabulary, its name or path (loaded by ``AutoModelForCausalLM`` with
            ``args.teacher_model_init_kwargs``; its tokenizer, where there is one, must give the student's ids the same tokens), or
            a callable ``(input_ids (B, L), attention_mask (B, L), T) → TopK`` whose fields are about the last T tokens, the
            completion: ids, logp ``(B, T, K)`` and target_logp ``(B, T)``, the teacher's log-prob of the sampled token; tail_logp
            for ``normalize="tail"``. It is asked once per rollout. An id of −1 is an empty slot; a token whose target_logp is not
            finite is trained by plain GRPO. Served log-probs are at temperature 1 (:func:`from_logprobs`): train at
            ``temperature=1.0``. For another one a callable says at which it answers, by an attribute ``temperature``.
        args: :class:`RLADConfig`; None has its defaults, and writes to ``<model's name>-RLAD``.
        everything else: as of ``trl.GRPOTrainer``.

    Logs, besides GRPO's: ``rlad/`` + the metrics of :class:`rlad_kernels.losses.RLAD`. Tokens without a teacher count in
    ``rlad/invalid_teacher``.

    Raises:
        ValueError: when it is made, for an option that RLAD's loss has no place for or that would fail later, a teacher of another
            vocabulary or temperature, images, or a head that carries an adapter; RuntimeError for a TRL without the methods that
            are overridden. All name the fix.
    """

    model: Any
    args: RLADConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, model: Any, reward_funcs: Any = None, *, teacher: Any, args: RLADConfig | None = None, **kwargs: Any
    ) -> None:
        check_version(NAME, "trl", _overridden())
        if args is None:
            args = RLADConfig(f"{(model if isinstance(model, str) else model.name_or_path).split('/')[-1]}-RLAD")
        if not isinstance(args, RLADConfig):
            raise ValueError(f"RLADTrainer: args must be an RLADConfig or None, got {type(args).__name__}")
        check_config(args)
        check_columns(kwargs.get(k) for k in ("train_dataset", "eval_dataset"))
        self.rlad = objective(args)
        teacher = os.fspath(teacher) if isinstance(teacher, os.PathLike) else teacher
        self._check_callable(teacher, args)
        super().__init__(model, reward_funcs, args=args, **kwargs)
        for policy in (self.model, self.ref_model):
            if policy is not None:
                _without_fused_head(unwrapped(policy))
                add_head_call(NAME, policy)
        size = self._ids(self.model)
        if isinstance(teacher, str):
            teacher = self._load(teacher)
        if isinstance(teacher, torch.nn.Module):
            if unwrapped(teacher) is unwrapped(self.model):
                raise ValueError("RLADTrainer: teacher is the student itself, which would be frozen; pass copy.deepcopy(model)")
            check_vocab(NAME, size, self._ids(teacher), _VOCAB_FIX)
            if args.topk:
                check_k(NAME, args.topk, size, "topk", most=TOPK_MAX)
            add_head_call(NAME, teacher)
            teacher = self.accelerator.prepare_model(teacher.requires_grad_(False).eval(), evaluation_mode=True)
        self.teacher = teacher

    @staticmethod
    def _check_callable(teacher: Any, args: RLADConfig) -> None:
        if not isinstance(teacher, str) and args.teacher_model_init_kwargs is not None:
            raise ValueError(f"RLADTrainer: teacher_model_init_kwargs loads a teacher by name, got {type(teacher).__name__}")
        if isinstance(teacher, str | torch.nn.Module):
            return
        if not callable(teacher):
            raise ValueError(
                "RLADTrainer: teacher must be a causal LM, its name or path, or a callable giving TopK, got "
                f"{type(teacher).__name__}"
            )
        answers = getattr(teacher, "temperature", 1.0)
        if answers != args.temperature:
            raise ValueError(
                f"RLADTrainer: the student is read at temperature={args.temperature!r}, the callable teacher answers at "
                f"{answers!r} (its attribute temperature; 1.0 where it has none, as servers do); answer at the student's, with "
                f"teacher.temperature = {args.temperature!r}, or train at temperature={answers!r}"
            )

    def _load(self, name: str) -> Any:
        """The teacher of a name or path, refused if its tokenizer gives an id of both another token."""
        options = dict(cast(dict[str, Any], self.args.teacher_model_init_kwargs) or {})
        options.setdefault("trust_remote_code", self.args.trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", **options})
        where = {k: options[k] for k in ("revision", "token", "cache_dir", "subfolder") if k in options}
        if not get_tokenizer_config(name, **where):  # weights alone, for which transformers makes an empty tokenizer
            return model
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options["trust_remote_code"], **where)
        theirs = {i: token for token, i in tokenizer.get_vocab().items()}
        for token, i in self._tokenizer.get_vocab().items():
            if theirs.get(i, token) != token:
                raise ValueError(
                    f"RLADTrainer: id {i} is {token!r} in the student's tokenizer, {theirs[i]!r} in that of teacher {name!r}; take "
                    "a teacher with this tokenizer (or pass the loaded model, if that id is never used)"
                )
        return model

    def _head(self, model: Any) -> LMHead:
        return head_of(model, temperature=self.temperature, vocab_size=self.args.vocab_size)

    def _ids(self, model: Any) -> int:
        return self._head(model).vocab_size or 0

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self._refuse_images(batch)
        found = [self._ask(batch, part) for part in self._parts(len(batch["prompt_ids"]))]
        for name in _FIELDS:
            if getattr(found[0], name) is not None:
                batch[f"teacher_{name}"] = torch.cat([getattr(x, name) for x in found])
        return batch

    @staticmethod
    def _refuse_images(batch: Mapping[str, Any]) -> None:
        if batch.get("pixel_values") is not None:
            raise ValueError("RLADTrainer: got images; teacher and loss read tokens only, train on text")

    def _parts(self, count: int, step: int | None = None) -> list[slice]:
        step = step or self.args.per_device_train_batch_size
        return [slice(r, r + step) for r in range(0, count, step)]

    @torch.no_grad()
    def _ask(self, batch: dict[str, Any], part: slice) -> TopK:
        """The teacher about one part of the rollout; no teacher at special tokens if they are to be masked."""
        ids, attention_mask, completion, mask = _tokens(batch, part)
        length, k = completion.shape[1], self.args.topk
        if isinstance(self.teacher, torch.nn.Module):

            def scores(hidden: Tensor, head: LMHead) -> TopK:
                if k:
                    return linear_topk(hidden, head, k, target=completion, mask=mask)
                logp = linear_logp(hidden, head, completion, mask=mask).logp
                return TopK(completion.new_full((*logp.shape, 1), -1), logp.new_zeros(*logp.shape, 1), target_logp=logp)

            found = self._read(self.teacher, ids, attention_mask, length, scores).result
        else:
            found = self._checked(self.teacher(ids, attention_mask, length), completion)
        if self.args.mask_special_tokens and found.target_logp is not None:
            special = torch.isin(completion, torch.tensor(self._tokenizer.all_special_ids, device=completion.device))
            found = found._replace(
                target_logp=found.target_logp.masked_fill(special, torch.nan),
                ids=found.ids.masked_fill(special.unsqueeze(-1), -1),
            )
        return found

    def _checked(self, found: Any, completion: Tensor) -> TopK:
        """A callable teacher's answer, refused with the fix if it does not fit."""
        size = self._ids(self.model)
        if not isinstance(found, TopK) or found.target_logp is None:
            raise ValueError(f"RLADTrainer: teacher must return a TopK with target_logp, got {type(found).__name__}")
        found = found._replace(**{k: x.to(completion.device) for k, x in found._asdict().items() if x is not None})
        if found.ids.shape[:-1] != completion.shape or found.target_logp.shape != completion.shape:
            raise ValueError(
                f"RLADTrainer: the teacher's ids have shape {tuple(found.ids.shape)}, target_logp "
                f"{tuple(found.target_logp.shape)}; wanted {(*completion.shape, 'K')} and {tuple(completion.shape)}: "
                "only the completion's tokens"
            )
        if found.ids.numel() and int(found.ids.max()) >= size:
            raise ValueError(
                f"RLADTrainer: the teacher gave id {int(found.ids.max())}, the student has {size}; map ids to its tokenizer"
            )
        return found

    def _read(
        self, model: Any, ids: Tensor, attention_mask: Tensor, length: int, read: Callable[[Tensor, LMHead], Any], **extra: Any
    ) -> HeadOutput:
        """``read(hidden (B, length, D), head)`` of the last tokens inside the model's forward: every log-prob is computed so."""

        def head_call(hidden: Tensor, model: Any) -> Any:
            head, hidden = self._head(model), hidden[:, -length - 1 : -1]
            check_head("RLADTrainer", hidden, head.weight)
            if not self.args.cast_lm_head_to_fp32:
                return read(hidden, head)
            with torch.autocast(hidden.device.type, enabled=False):  # TRL has made the policy's head float32
                return read(hidden.to(head.weight.dtype), head)

        with self.accelerator.autocast():
            return model(input_ids=ids, attention_mask=attention_mask, head_call=head_call, **extra)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """GRPO's old and reference log-probs, by the code and in the batches of the loss: equal weights, equal numbers."""
        if given := sorted(k for k, x in images.items() if x is not None):
            raise ValueError(f"RLADTrainer: got {', '.join(given)}; teacher and loss read tokens only, train on text")
        extra = {"output_router_logits": True} if compute_aux_loss else {}
        found: list[tuple[Tensor, Tensor | None]] = []
        aux: list[Tensor] = []
        for part in self._parts(len(input_ids), batch_size):
            ids, attention = input_ids[part], attention_mask[part]
            target, mask = ids[:, -logits_to_keep:], attention[:, -logits_to_keep:]

            def scores(hidden: Tensor, head: LMHead, target: Tensor = target, mask: Tensor = mask) -> tuple[Tensor, Tensor | None]:
                out = linear_logp(hidden, head, target, mask=mask, entropy=compute_entropy)
                return out.logp, out.entropy

            out = self._read(model, ids, attention, logits_to_keep, scores, **extra)
            found.append(out.result)
            aux += [] if out.aux_loss is None else [out.aux_loss]
        logp, entropy = zip(*found, strict=True)
        return torch.cat(logp), torch.cat(entropy) if compute_entropy else None, torch.stack(aux).mean() if aux else None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        ids, attention_mask, completion, mask = _tokens(inputs, slice(None))
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}

        def loss_call(hidden: Tensor, head: LMHead) -> LossOutput:
            return self._loss(hidden, head, completion, mask, inputs, mode)

        out = self._read(model, ids, attention_mask, completion.shape[1], loss_call, **extra)
        loss = out.result.loss
        if out.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * out.aux_loss / self._accumulated(mode)
        self._record(mode, out.result.metrics, mask.sum(), out.aux_loss)
        return loss

    def _loss(
        self, hidden: Tensor, head: LMHead, completion: Tensor, mask: Tensor, inputs: dict[str, Any], mode: str
    ) -> LossOutput:
        old_logp = inputs.get("old_per_token_logps")
        if old_logp is None:
            with torch.no_grad():
                old_logp = linear_logp(hidden, head, completion, mask=mask).logp
        advantages = inputs["advantages"]
        if "importance_sampling_ratio" in inputs:  # a weight w ≥ 0 on the token: w·min(rÂ, clip(r)Â) = min(r·wÂ, clip(r)·wÂ)
            wide = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
            advantages = (wide * inputs["importance_sampling_ratio"]).expand_as(old_logp)
        given = {"old_logp": old_logp, "advantages": advantages, "teacher_logp": inputs["teacher_target_logp"]}
        if self.rlad.topk:
            tail_logp = inputs.get("teacher_tail_logp")
            given["teacher"] = TopK(inputs["teacher_ids"], inputs["teacher_logp"], tail_logp=tail_logp)
        if self.beta:
            given["ref_logp"] = inputs["ref_per_token_logps"]
        reduction = self._reduction(mask, inputs, mode)
        return linear_loss(
            hidden, head, completion, self.rlad, mask=mask, reduction=reduction, filter_eps=self.args.filter_eps, **given
        )

    def _reduction(self, mask: Tensor, inputs: dict[str, Any], mode: str) -> Reduction:
        """TRL's normalisers, gradient accumulation included."""
        steps = self._accumulated(mode)
        if self.loss_type == "grpo":
            return Reduction("seq-mean-token-mean", denominator=len(mask) * steps)
        if self.loss_type == "bnpo":
            return Reduction("token-mean", denominator=mask.sum().clamp(min=1) * steps)
        if self.loss_type == "dr_grpo":
            return Reduction("token-mean", denominator=len(mask) * (self.max_completion_length or 1) * steps)
        share = self.args.steps_per_generation if mode == "train" else 1  # num_items_in_batch counts the whole rollout
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return Reduction("token-mean", denominator=tokens * steps / share)

    def _accumulated(self, mode: str) -> int:
        return self.current_gradient_accumulation_steps if mode == "train" else 1

    def _record(self, mode: str, metrics: Mapping[str, Tensor], kept: Tensor, aux_loss: Tensor | None) -> None:
        """Log means over the kept tokens of all ranks, as GRPO does, and maxima: one collective, whatever a rank's tokens are."""
        names = sorted(metrics)
        values = (kept, *(metrics[k] for k in names), kept if aux_loss is None else aux_loss)
        mine = torch.stack([x.detach().float() for x in values])
        tokens, *columns, aux = cast(Tensor, self.accelerator.gather(mine)).view(-1, len(mine)).unbind(1)
        for name, x in zip(names, columns, strict=True):
            value = x.max() if name.endswith("_max") else (x * tokens).sum() / tokens.sum().clamp(min=1)
            self._metrics[mode]["entropy" if name == "entropy" else f"rlad/{name}"].append(value.item())
        if aux_loss is not None:
            self._metrics[mode]["aux_loss"].append(aux.mean().item())


def _without_fused_head(model: Any) -> None:
    """Take off TRL's fused head, which a copy of the model would run with the original's weights; nothing here calls it."""
    forward = vars(model).get("forward")
    if getattr(forward, "__func__", None) is not None:
        below = inspect.getclosurevars(forward.__func__).nonlocals.get("original_forward")
        if getattr(below, "__func__", None) is type(model).forward:
            del model.forward


def _tokens(batch: dict[str, Any], part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompt and completion ids, their attention mask, the completion's ids, and which of these are trained on."""
    completion, mask = batch["completion_ids"][part], batch["completion_mask"][part]
    ids = torch.cat([batch["prompt_ids"][part], completion], 1)
    attention_mask = torch.cat([batch["prompt_mask"][part], mask], 1)
    return ids, attention_mask, completion, mask * batch["tool_mask"][part] if "tool_mask" in batch else mask


def _overridden() -> dict[str, tuple[str, ...]]:
    """The methods of GRPOTrainer that ours stand for, with the parameters that ours read."""
    ours = (RLADTrainer._generate_and_score_completions, RLADTrainer._compute_loss)
    read = {f.__name__: tuple(inspect.signature(f).parameters) for f in ours}
    logps = RLADTrainer._get_per_token_logps_and_entropies
    read[logps.__name__] = (*list(inspect.signature(logps).parameters)[:-1], "…")
    return {f"trl:GRPOTrainer.{name}": parameters for name, parameters in read.items()}
