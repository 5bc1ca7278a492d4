"""RLADConfig: the options of TRL's GRPO trainer and RLAD's, each of them used, or refused when the trainer is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

from trl import GRPOConfig

from rlad_kernels.core.check import TOPK_MAX, check_choice, check_eps, check_k, check_range, is_integer
from rlad_kernels.losses.ratio.kl import Reference
from rlad_kernels.losses.rlad import RLAD
from rlad_kernels.losses.support.topk_kl import TopKKL

NAME = "RLADTrainer"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# RLAD's loss, and TRL's sampling of whole groups, have no place for these: they keep the values that RLADConfig gives them.
NO_PLACE = _words(
    """
    importance_sampling_level top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max
    entropy_coef_delta entropy_target off_policy_mask_threshold use_bias_correction_kl sapo_temperature_neg sapo_temperature_pos
    vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg label_smoothing_factor train_sampling_strategy length_column_name
    """
)
WORDS = {  # TRL looks at these when the first answers are there
    "loss_type": ("grpo", "bnpo", "dapo", "dr_grpo"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}


@dataclass
class RLADConfig(GRPOConfig):
    """GRPOConfig (``top_p=0.9`` for top-p rollouts, ``epsilon``, ``beta``, …) and what RLAD adds.

    ``loss_type`` chooses the reduction: ``grpo`` (mean of sequence means, the paper's), ``bnpo``, ``dapo`` or ``dr_grpo``.
    ``temperature`` is the one of every log-prob: policy, reference and teacher are all read at it.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    loss_type: str = field(default="grpo", metadata={"help": "grpo, bnpo, dapo or dr_grpo."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Must stay False."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of the old policy in the ratio's anchor; 1 is GRPO."})
    teacher_clamp: float | None = field(default=None, metadata={"help": "Clamp log π − log π_T to ± this before mixing."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Of from_pretrained, for a teacher given by name; dtype is the checkpoint's by default."}
    )
    topk: int = field(default=16, metadata={"help": "K of a model's top-K, a callable's is its own; 0 leaves the KL term out."})
    topk_kl_coef: float = field(default=1.0, metadata={"help": "Factor of the truncated KL, when topk > 0."})
    direction: str = field(default="reverse", metadata={"help": "reverse KL(student‖teacher) or forward."})
    normalize: str = field(default="both", metadata={"help": "both, teacher, none or tail: see TopKKL."})
    filter_eps: float = field(default=0.0, metadata={"help": "Sparse backward; 0 is exact."})
    vocab_size: int | None = field(default=None, metadata={"help": "Ids that exist, where a head has rows of padding."})
    mask_special_tokens: bool = field(default=False, metadata={"help": "No teacher at the tokenizer's special tokens."})


def objective(args: RLADConfig) -> RLAD:
    """The loss that the options describe; it refuses what it cannot be."""
    kl = TopKKL(args.direction, normalize=args.normalize)
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    return RLAD(
        alpha=args.alpha,
        teacher_clamp=args.teacher_clamp,
        clip=(args.epsilon, high),
        dual_clip=args.delta,
        reference=Reference(args.beta),
        topk=kl if args.topk else None,
        topk_coef=args.topk_kl_coef if args.topk else None,
    )


def check_config(args: RLADConfig) -> None:
    """Hold every option to what the trainer can do, before anything is loaded.

    Raises:
        ValueError: naming the option, what came and what was wanted.
    """
    known = {f.name: f for f in fields(RLADConfig)}
    for name in sorted(NO_PLACE & known.keys()):
        if getattr(args, name) != (wanted := _default(known[name])):
            raise ValueError(f"{NAME}: {name} must stay {wanted!r}, got {getattr(args, name)!r}; RLAD's loss has no place for it")
    for name, words in WORDS.items():
        check_choice(NAME, name, getattr(args, name), words)
    _check_sampling(args)
    if args.loss_type == "dr_grpo" and args.max_completion_length is None:
        raise ValueError(f"{NAME}: loss_type='dr_grpo' divides by max_completion_length, got None; wanted an int")
    if not (is_integer(args.num_iterations) and args.num_iterations > 0):
        raise ValueError(f"{NAME}: num_iterations must be a positive int, got {args.num_iterations!r}")
    if not (is_integer(args.topk) and args.topk >= 0):
        raise ValueError(f"{NAME}: topk must be 0 (no KL term) or K > 0, got {args.topk!r}")
    if args.topk:
        check_k(NAME, args.topk, args.vocab_size, "topk", most=TOPK_MAX)
    if args.topk == 0 and (
        idle := [x for x in ("topk_kl_coef", "direction", "normalize") if getattr(args, x) != _default(known[x])]
    ):
        raise ValueError(f"{NAME}: topk=0 leaves the KL term out, but {idle[0]}={getattr(args, idle[0])!r} is about it; set topk")
    check_eps(NAME, args.filter_eps)
    if getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0) == 3:
        raise ValueError(f"{NAME}: got DeepSpeed ZeRO-3, which would have the LM head gone in the backward; use ZeRO-2 or FSDP2")


def _default(known: Field[Any]) -> Any:
    return known.default if known.default_factory is MISSING else known.default_factory()


def _check_sampling(args: RLADConfig) -> None:
    """What generate() would refuse at the first rollout, and a second temperature, which the log-probs would not have."""
    check_range(NAME, "temperature", args.temperature, 0, math.inf, "()")
    check_range(NAME, "top_p", args.top_p, 0, 1, "(]")
    check_range(NAME, "repetition_penalty", args.repetition_penalty, 0, math.inf, "()")
    if args.min_p is not None:
        check_range(NAME, "min_p", args.min_p, 0, 1)
    if not (is_integer(args.top_k) and args.top_k >= 0):
        raise ValueError(f"{NAME}: top_k must be an int of at least 0 (all tokens), got {args.top_k!r}")
    more = args.generation_kwargs or {}
    if isinstance(more, dict) and more.get("temperature", args.temperature) != args.temperature:
        raise ValueError(
            f"{NAME}: generation_kwargs has temperature {more['temperature']!r}, the log-probs are read at temperature="
            f"{args.temperature!r}; set RLADConfig.temperature alone"
        )


def check_columns(datasets: Iterable[Any]) -> None:
    """Raise a ValueError for a data set of images, or a dict with one: teacher and loss read tokens only."""
    for given in datasets:
        for dataset in given.values() if isinstance(given, dict) else (given,):
            if found := {"image", "images"}.intersection(getattr(dataset, "column_names", None) or ()):
                raise ValueError(f"{NAME}: got images (column {min(found)!r}); teacher and loss read tokens only, train on text")
