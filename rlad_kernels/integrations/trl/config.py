"""RLADConfig: the options of TRL's GRPO trainer and RLAD's, each of them used, or refused when the trainer is made."""

from __future__ import annotations

import math
import warnings
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
# Options of metrics that GRPOTrainer does not compute, or of images: what they would change does not happen.
NOTHING_TO_DO = _words(
    """
    prediction_loss_only include_for_metrics batch_eval_metrics eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps label_names do_predict average_tokens_across_devices log_multimodal
    """
)
# Everything else that GRPOConfig has in the versions that were tested: TRL and transformers use it, or the loss does.
USED = _words(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
    max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
    liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
    eval_delay per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint
    full_determinism seed data_seed use_cpu accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order remove_unused_columns ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval resume_from_checkpoint local_rank
    model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 num_generations
    num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset pad_to_multiple_of generation_batch_size
    steps_per_generation temperature top_p top_k min_p generation_kwargs chat_template_kwargs repetition_penalty
    cache_implementation use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
    vllm_max_model_length vllm_tensor_parallel_size beta num_iterations epsilon delta epsilon_high reward_weights
    multi_objective_aggregation scale_rewards loss_type mask_truncated_completions sync_ref_model ref_model_mixup_alpha
    ref_model_sync_steps max_tool_calling_iterations vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min log_completions num_completions_to_print log_unique_prompts
    log_completions_hub_repo use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
    vllm_importance_sampling_cap
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
    unknown = {f.name for f in fields(GRPOConfig)} - NO_PLACE - NOTHING_TO_DO - USED
    if changed := sorted(x for x in unknown if getattr(args, x) != _default(known[x])):
        warnings.warn(f"{NAME}: {', '.join(changed)} came with a TRL that was not tested; RLAD's loss may ignore it", stacklevel=3)
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
    check_eps(NAME, args.filter_eps, "")
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
