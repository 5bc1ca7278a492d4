"""Runs of TRL's trainers on tiny models and fixed completions, recorded for comparison."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny

os.environ["HF_HUB_OFFLINE"] = "1"
MISSING = [x for x in ("trl", "datasets", "peft") if importlib.util.find_spec(x) is None]
needs_trl = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install -r requirements-dev.txt")
COMMON: dict[str, Any] = {
    "use_cpu": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "optim": "sgd", "learning_rate": 0.1,
    "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 5, "per_device_train_batch_size": 4, "seed": 3,
    "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip
WORDS = ["the cat", "a dog ran", "one", "two birds sing", "red", "blue sky", "three", "so it goes"]


def config_and_trainer(kind: str) -> tuple[Any, Any]:
    import trl

    from rlad_kernels.integrations import trl as ours

    module = ours if kind == "RLAD" else trl
    return getattr(module, f"{kind}Config"), getattr(module, f"{kind}Trainer")


def dataset(kind: str) -> Any:
    from datasets import Dataset

    rows = [{"prompt": w, "completion": f" {w[::-1]}!", "label": i % 2 == 0} for i, w in enumerate(WORDS * 3)]
    if kind == "DPO":
        rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " no"} for r in rows]
    keep = {"DPO": ("prompt", "chosen", "rejected"), "KTO": ("prompt", "completion", "label"), "SFT": ("prompt", "completion")}
    return Dataset.from_list([{k: r[k] for k in keep.get(kind, ("prompt",))} for r in rows])


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, c)) % 7) for c in completions]


def stub_generate(model: Any, length: int) -> None:
    """Completions of random bytes with an end at random, the same for each run."""
    made = torch.Generator().manual_seed(11)

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        new = torch.randint(0, 257, (len(input_ids), length), generator=made)
        new[torch.rand(new.shape, generator=made) < 0.1] = tiny.EOS
        return torch.cat([input_ids, new], 1)

    model.generate = generate


def train(
    kind: str, tmp_path: Path, *, model: Any = None, peft_config: Any = None, teacher: Any = None, **options: Any
) -> dict[str, Any]:
    """Five steps of SGD: the parameters before and after, the gradient of the first step, the logs."""
    from transformers import TrainerCallback

    config, trainer_type = config_and_trainer(kind)
    rl = kind in ("GRPO", "RLOO", "RLAD", "Distillation")
    if rl:
        options = {"max_completion_length": 9, "temperature": 0.8, **options}
        if kind != "Distillation":
            options = {"num_generations": 4, "beta": 0.0, **options}
    found: dict[str, Any] = {"grads": {}}

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 0:
                found["grads"] = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    args = config(output_dir=str(tmp_path), **{**COMMON, **options})
    more: dict[str, Any] = {"reward_funcs": reward} if rl and kind != "Distillation" else {}
    if kind == "Distillation":
        more["teacher_model"] = tiny.model(seed=1, hidden_size=48)
    if kind == "RLAD":
        more["teacher"] = teacher
    if kind in ("DPO", "KTO"):
        more["ref_model"] = tiny.model(seed=1)
    trainer = trainer_type(
        model=tiny.model() if model is None else model, args=args, train_dataset=dataset(kind), processing_class=tiny.tokenizer(),
        callbacks=[Recorder()], peft_config=peft_config, **more,
    )  # fmt: skip
    if rl:
        stub_generate(trainer.model, 9)
    inputs: list[Any] = []
    if kind == "RLAD":
        loss = trainer._compute_loss
        trainer._compute_loss = lambda model, batch: inputs.append(batch) or loss(model, batch)
    found["inputs"] = inputs
    found["before"] = {k: p.detach().clone() for k, p in trainer.model.named_parameters()}
    trainer.train()
    found["after"] = {k: p.detach().clone() for k, p in trainer.model.named_parameters()}
    found["logs"] = trainer.state.log_history
    return found


def assert_same_training(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Step-1 gradients within 1e-5 relative; parameters after the steps within 1e-4 of their change, all together."""
    assert ours["grads"].keys() == theirs["grads"].keys() and theirs["grads"]
    gap = torch.cat([(ours["grads"][k] - g).flatten() for k, g in theirs["grads"].items()])
    assert gap.norm() <= 1e-5 * torch.cat([g.flatten() for g in theirs["grads"].values()]).norm()
    change = torch.cat([(theirs["after"][k] - p).flatten() for k, p in theirs["before"].items()])
    gap = torch.cat([(ours["after"][k] - p).flatten() for k, p in theirs["after"].items()])
    assert change.norm() > 1e-3
    assert gap.norm() <= 1e-4 * change.norm()


def lora() -> dict[str, Any]:
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "learning_rate": 0.5}
