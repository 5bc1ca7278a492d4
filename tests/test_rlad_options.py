"""Every option of RLADTrainer is used or refused when it is made; a teacher by name; the temperature of both sides."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlad_kernels import LMHead, TopK, linear_topk
from tests import tiny
from tests.test_rlad_trainer import teacher_model
from tests.trl_runs import COMMON, config_and_trainer, dataset, needs_trl, reward, stub_generate, train

pytestmark = [pytest.mark.cpu, needs_trl]


def made(tmp_path: Path, teacher: Any, *, model: Any = None, options: dict[str, Any] | None = None, **more: Any) -> Any:
    config, trainer = config_and_trainer("RLAD")
    args = config(str(tmp_path), **{**COMMON, "num_generations": 4, "max_completion_length": 6, **(options or {})})
    for name, x in more.pop("after", {}).items():
        setattr(args, name, x)
    given = {"train_dataset": dataset("RLAD"), "processing_class": tiny.tokenizer(), **more}
    return trainer(tiny.model() if model is None else model, reward, teacher=teacher, args=args, **given)


def ask(ids: Tensor, attention_mask: Tensor, length: int) -> TopK:
    raise AssertionError("asked before the trainer is made")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


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
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache
    neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step
    log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
    eval_delay per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps save_on_each_node
    save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed debug skip_memory_metrics do_train do_eval resume_from_checkpoint local_rank
    model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 num_generations
    num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset pad_to_multiple_of
    generation_batch_size steps_per_generation temperature top_p top_k min_p generation_kwargs chat_template_kwargs
    repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode
    vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
    vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size beta num_iterations
    epsilon delta epsilon_high reward_weights multi_objective_aggregation scale_rewards loss_type
    mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps max_tool_calling_iterations
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min log_completions num_completions_to_print log_unique_prompts
    log_completions_hub_repo use_transformers_continuous_batching transformers_continuous_batching_config
    use_transformers_paged vllm_importance_sampling_cap
    """
)


def test_every_option_has_its_place():
    """A field that only a newer TRL or transformers has belongs into one of the three sets."""
    from trl import GRPOConfig, GRPOTrainer

    from rlad_kernels.integrations.trl import config

    places = (config.NO_PLACE, NOTHING_TO_DO, USED)
    assert sum(map(len, places)) == len(set().union(*places))
    assert {f.name for f in fields(GRPOConfig)} <= set().union(*places), "new options: decide, and add them to their set"
    assert set(config.WORDS) <= USED
    source = inspect.getsource(GRPOTrainer)
    assert all(f'"{word}"' in source for words in config.WORDS.values() for word in words)


def _other(value: Any) -> Any:
    return not value if isinstance(value, bool) else "another" if isinstance(value, str) else (value or 0) + 0.25


def _no_place() -> list[str]:
    try:
        from rlad_kernels.integrations.trl import config
    except ImportError:
        return []
    return sorted(config.NO_PLACE)


@pytest.mark.parametrize("name", _no_place())
def test_what_the_loss_has_no_place_for_is_refused(name: str, tmp_path: Path):
    config, _ = config_and_trainer("RLAD")
    wanted = getattr(config(str(tmp_path), **COMMON, num_generations=4), name)
    got = _other(wanted)
    with pytest.raises(ValueError, match=rf"^RLADTrainer: {name} must stay {wanted!r}, got {got!r}; RLAD's loss has no place"):
        made(tmp_path, ask, model="nowhere", after={name: got})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "cispo"}, r"loss_type must be one of .*'dr_grpo'\), got 'cispo'"),
        ({"scale_rewards": "sequence"}, r"scale_rewards must be one of .*, got 'sequence'"),
        ({"multi_objective_aggregation": "sum"}, r"multi_objective_aggregation must be one of .*, got 'sum'"),
        ({"vllm_importance_sampling_mode": "token"}, r"vllm_importance_sampling_mode must be one of .*, got 'token'"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "loss_type='dr_grpo' divides by max_completion_length, got None"),
        ({"num_iterations": 0}, "num_iterations must be a positive int, got 0"),
        ({"temperature": 0.0}, r"temperature must be in \(0, inf\), got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_k": -1}, r"top_k must be an int of at least 0 .*, got -1"),
        ({"min_p": 2.0}, r"min_p must be in \[0, 1\], got 2.0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be in \(0, inf\), got 0.0"),
        ({"generation_kwargs": {"temperature": 0.5}}, "generation_kwargs has temperature 0.5, the log-probs are read at"),
        ({"generation_kwargs": {"temperature": 2.0}}, "generation_kwargs has temperature 2.0, the log-probs are read at"),
        ({"topk": -1}, r"topk must be 0 \(no KL term\) or K > 0, got -1"),
        ({"topk": 2.5}, r"topk must be 0 .*, got 2.5"),
        ({"topk": 5000}, r"topk must have 1 <= K <= 1024, got K=5000"),
        ({"topk": 9, "vocab_size": 8}, r"topk must have 1 <= K <= min\(1024, vocab_size=8\), got K=9"),
        ({"topk": 0, "normalize": "tail"}, "topk=0 leaves the KL term out, but normalize='tail' is about it"),
        ({"topk": 0, "direction": "upwards"}, "^TopKKL: direction must be one of|topk=0 leaves .* direction='upwards'"),
        ({"filter_eps": 1.0}, r"filter_eps must be a probability in \[0, 1\), .*got 1.0"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "got DeepSpeed ZeRO-3, .* use ZeRO-2 or FSDP2"),
        ({"normalize": "all"}, "^TopKKL: normalize must be one of .*, got 'all'"),
        ({"alpha": 1.5}, r"^RLAD: alpha must be in \[0, 1\], got 1.5"),
        ({"teacher_clamp": -1.0}, "^RLAD: teacher_clamp must be positive or None, got -1.0"),
        ({"delta": 0.5}, "^RLAD: dual_clip .*0.5"),
        ({"epsilon": -0.1}, "^RLAD: clip .*-0.1"),
        ({"beta": float("nan")}, "^RLAD: reference.coef must be a finite number, got nan"),
        ({"topk_kl_coef": float("inf")}, "^RLAD: topk_coef must be a finite number, got inf"),
        ({"teacher_model_init_kwargs": {"dtype": "auto"}}, "teacher_model_init_kwargs loads a teacher by name, got function"),
    ],
)  # fmt: skip
def test_no_option_fails_after_the_first_rollout(changes: dict[str, Any], message: str, tmp_path: Path):
    """Before the model is loaded: it is nowhere."""
    with pytest.raises(ValueError, match=message if message.startswith("^") else f"^RLADTrainer: {message}"):
        made(tmp_path, ask, model="nowhere", after=changes)


def test_images_are_refused(tmp_path: Path):
    images = dataset("RLAD").add_column("image", [None] * 24)
    with pytest.raises(ValueError, match=r"^RLADTrainer: got images .column 'image'.; .* train on text"):
        made(tmp_path, ask, model="nowhere", train_dataset=images)
    with pytest.raises(ValueError, match="got images"):
        made(tmp_path, ask, model="nowhere", eval_dataset={"text": dataset("RLAD"), "both": images})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "a-teacher"
    teacher_model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_a_teacher_by_name_is_as_good_as_its_model(stored: Path, tmp_path: Path):
    """And the default topk uses it."""
    named, model = (train("RLAD", tmp_path, teacher=x, max_steps=1) for x in (str(stored), teacher_model()))
    assert named["inputs"][0]["teacher_ids"].shape[-1] == 16 and named["logs"][0]["rlad/teacher_mass"] > 0
    for name, gradient in model["grads"].items():
        assert torch.equal(named["grads"][name], gradient)


def test_a_name_alone_is_enough(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """args=None, as GRPOTrainer has it; the teacher is loaded as its options say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # TRL's default is bf16
    config, trainer_type = config_and_trainer("RLAD")
    trainer = trainer_type(str(stored), reward, teacher=str(stored), train_dataset=dataset("RLAD"))
    assert trainer.args.output_dir == "a-teacher-RLAD" and isinstance(trainer.args, config)
    assert trainer.teacher.dtype == torch.float32 and not trainer.teacher.training
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    options = {"teacher_model_init_kwargs": '{"dtype": "bfloat16"}'}  # as the command line gives them
    assert made(tmp_path, stored, options=options).teacher.dtype == torch.bfloat16


def test_a_teacher_that_does_not_fit_is_refused(stored: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    tiny.model(vocab_size=300).save_pretrained(other)
    with pytest.raises(ValueError, match=r"^RLADTrainer: the student's head has 264 ids, the teacher's 300; if one head"):
        made(tmp_path, str(other))
    tiny.model().save_pretrained(other)
    made(tmp_path, str(other))  # weights alone
    swapped = AutoTokenizer.from_pretrained(stored)
    state = swapped.backend_tokenizer.to_str().replace('"a":', '"?":').replace('"b":', '"a":').replace('"?":', '"b":')
    swapped.backend_tokenizer.from_str(state).save(str(other / "tokenizer.json"))
    (other / "tokenizer_config.json").write_text((stored / "tokenizer_config.json").read_text())
    with pytest.raises(ValueError, match=r"^RLADTrainer: id \d+ is '[ab]' in the student's tokenizer, '[ab]' in that of teacher"):
        made(tmp_path, str(other))
    for teacher in (3, None):
        with pytest.raises(ValueError, match=rf"teacher must be a causal LM, .* or a callable .*{type(teacher).__name__}"):
            made(tmp_path, teacher, model="nowhere")
    with pytest.raises(ValueError, match=r"^RLADTrainer: topk must have 1 <= K <= min\(1024, vocab_size=264\), got K=300"):
        made(tmp_path, teacher_model(), options={"topk": 300})


def test_both_sides_have_one_temperature(tmp_path: Path):
    """A model is read at the sampling temperature; a callable answers at it, and says so unless it is 1."""
    teacher = teacher_model()

    def at(temperature: float) -> Any:
        def answer(ids: Tensor, attention_mask: Tensor, length: int) -> TopK:
            hidden = teacher.model(input_ids=ids, attention_mask=attention_mask).last_hidden_state[:, -length - 1 : -1].detach()
            return linear_topk(hidden, LMHead.from_model(teacher, temperature=temperature), 16, target=ids[:, -length:])

        return answer

    served, tempered = at(1.0), at(0.8)
    with pytest.raises(ValueError, match=r"student is read at temperature=0.8, the callable teacher answers at 1.0 .* train at"):
        train("RLAD", tmp_path, teacher=served)
    tempered.temperature = 0.8
    with pytest.raises(ValueError, match=r"read at temperature=1.0, the callable teacher answers at 0.8"):
        train("RLAD", tmp_path, teacher=tempered, temperature=1.0)
    for temperature, answer in ((1.0, served), (0.8, tempered)):
        local, other = (train("RLAD", tmp_path, teacher=x, temperature=temperature, max_steps=1) for x in (teacher, answer))
        for name, gradient in local["grads"].items():
            torch.testing.assert_close(other["grads"][name], gradient, rtol=1e-4, atol=1e-6)


def test_many_options_at_once(tmp_path: Path):
    """Evaluation, checkpointing, a synchronised reference, dropped answers, dual clip, two rewards: finite, and all logged."""
    tiny.model().save_pretrained(tmp_path / "model")
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "gradient_checkpointing": True, "beta": 0.1, "delta": 4.0,
        "sync_ref_model": True, "ref_model_sync_steps": 1, "mask_truncated_completions": True, "epsilon_high": 0.28,
        "loss_type": "dr_grpo", "num_iterations": 2, "reward_weights": [1.0, 0.5], "disable_dropout": True, "normalize": "tail",
        "mask_special_tokens": True, "multi_objective_aggregation": "normalize_then_sum", "optim": "adamw_torch", "bf16": True,
        "neftune_noise_alpha": 0.1, "log_completions": True, "per_device_eval_batch_size": 4, "filter_eps": 1e-5,
    }  # fmt: skip
    config, trainer_type = config_and_trainer("RLAD")
    args = config(str(tmp_path), **{**COMMON, "num_generations": 4, "max_completion_length": 9, **options})
    trainer = trainer_type(
        str(tmp_path / "model"), [reward, reward], teacher=teacher_model(), args=args, train_dataset=dataset("RLAD"),
        eval_dataset=dataset("RLAD").select(range(2)), processing_class=tiny.tokenizer(),
    )  # fmt: skip
    stub_generate(trainer.model, 9)
    trainer.train()
    rows = [r for r in trainer.state.log_history if "rlad/kl_ref" in r or "eval_rlad/kl_ref" in r]
    assert len(rows) == 4 and any("eval_loss" in r for r in rows)
    assert all(abs(x) < float("inf") for r in rows for k, x in r.items() if "rlad" in k or k == "loss")
