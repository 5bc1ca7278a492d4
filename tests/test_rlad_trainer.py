"""RLADTrainer: RLAD's loss and gradient written again in plain float64, GRPO at α = 1, and that it learns."""

from __future__ import annotations

import copy
import importlib.util
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlad_kernels import LMHead, TopK, linear_topk
from tests import tiny
from tests.trl_runs import COMMON, assert_same_training, config_and_trainer, dataset, lora, needs_trl, reward, train

pytestmark = [pytest.mark.cpu, needs_trl]


def teacher_model() -> Any:
    return tiny.model(seed=1, hidden_size=48)


def plain_loss(student: Any, teacher: Any, inputs: dict[str, Tensor], alpha: float, coef: float, k: int) -> Tensor:
    """TRRD + coef·KL(student‖teacher) renormalised over the teacher's top-K; means of sequence means; temperature 0.8."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    y, mask = inputs["completion_ids"], inputs["completion_mask"].double()

    def log_probs(model: Any) -> Tensor:
        z = model(input_ids=ids, attention_mask=attention).logits.double() / 0.8
        return z[:, -y.shape[1] - 1 : -1].log_softmax(-1)

    s = log_probs(student)
    with torch.no_grad():
        t = log_probs(teacher)
    st, tt = (x.gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (s, t))
    ratio = (alpha * (st - st.detach()) + (1 - alpha) * (st - tt)).exp()
    advantage = inputs["advantages"].unsqueeze(1)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    top = t.topk(k).indices
    q, p = (x.gather(-1, top).log_softmax(-1) for x in (s, t))
    loss = loss + coef * (q.exp() * (q - p)).sum(-1)
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def test_the_gradient_is_rlads(tmp_path: Path):
    run = train("RLAD", tmp_path, teacher=teacher_model(), alpha=0.3, topk=8, topk_kl_coef=0.5, max_steps=1)
    student = tiny.model()
    plain_loss(student, teacher_model(), run["inputs"][0], 0.3, 0.5, 8).backward()
    wanted = torch.cat([p.grad.flatten() for p in student.parameters()])
    gap = torch.cat([run["grads"][k].flatten() for k, _ in student.named_parameters()]) - wanted
    assert gap.norm() <= 1e-5 * wanted.norm()
    row = run["logs"][0]
    assert row["rlad/clip_frac_high"] + row["rlad/clip_frac_low"] > 0 and row["rlad/invalid_teacher"] == 0
    assert {"entropy", "rlad/kl_teacher", "rlad/teacher_mass", "rlad/ratio_max"} < row.keys()
    assert "rlad/student_mass" not in row  # normalize="both" does not read it


def test_the_divisor_is_trls():
    """Of each loss type, with accumulated steps and more than one process; alone in evaluation."""
    _, trainer = config_and_trainer("RLAD")
    mask, items = torch.arange(5) < torch.tensor([[5], [2], [4]]), {"num_items_in_batch": torch.tensor(31)}
    for kind, train_by, eval_by in (("grpo", 6, 3), ("bnpo", 22, 11), ("dr_grpo", 54, 27), ("dapo", 31 / 3 * 2 / 4, 31 / 3)):
        fake = SimpleNamespace(
            loss_type=kind, max_completion_length=9, current_gradient_accumulation_steps=2,
            args=SimpleNamespace(steps_per_generation=4), accelerator=SimpleNamespace(num_processes=3),
        )  # fmt: skip
        fake._accumulated = partial(trainer._accumulated, fake)
        for mode, want in (("train", train_by), ("eval", eval_by)):
            found = trainer._reduction(fake, mask, items, mode)
            assert float(found.denominator) == pytest.approx(want), (kind, mode)
            assert found.kind == ("seq-mean-token-mean" if kind == "grpo" else "token-mean")


def test_a_callable_teacher_is_as_good_as_its_model(tmp_path: Path):
    teacher = teacher_model()

    def ask(ids: Tensor, attention_mask: Tensor, length: int) -> TopK:
        hidden = teacher.model(input_ids=ids, attention_mask=attention_mask).last_hidden_state[:, -length - 1 : -1].detach()
        return linear_topk(hidden, LMHead.from_model(teacher, temperature=0.8), 8, target=ids[:, -length:])

    ask.temperature = 0.8
    runs = [train("RLAD", tmp_path, teacher=x, topk=8, normalize="tail", max_steps=2) for x in (teacher_model(), ask)]
    assert_same_training(*runs)
    assert all({"rlad/student_mass", "rlad/teacher_mass"} < run["logs"][0].keys() for run in runs)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_without_a_teacher_it_is_grpo(loss_type: str, tmp_path: Path):
    options = {"gradient_accumulation_steps": 2, "loss_type": loss_type, "max_steps": 3}
    rlad = train("RLAD", tmp_path, teacher=teacher_model(), alpha=1.0, topk=0, **options)
    assert_same_training(rlad, train("GRPO", tmp_path, **options))


def test_a_mixture_of_experts_keeps_its_loss(tmp_path: Path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    options = {"loss_type": "grpo", "router_aux_loss_coef": 0.3, "max_steps": 2}
    plain = {"teacher": teacher_model(), "alpha": 1.0, "topk": 0}
    rlad = train("RLAD", tmp_path, model=tiny.model("Qwen3Moe", **sizes), **plain, **options)
    grpo = train("GRPO", tmp_path, model=tiny.model("Qwen3Moe", **sizes), **options)
    assert_same_training(rlad, grpo)
    assert rlad["logs"][0]["aux_loss"] == pytest.approx(grpo["logs"][0]["aux_loss"], rel=1e-5)
    assert rlad["logs"][0]["entropy"] == pytest.approx(grpo["logs"][0]["entropy"], rel=1e-5)


def test_a_copy_of_the_policy_runs_the_copy(tmp_path: Path):
    config, trainer = config_and_trainer("RLAD")
    policy = trainer(
        model=tiny.model(), reward_funcs=reward, teacher=teacher_model(), args=config(str(tmp_path), num_generations=4, **COMMON),
        train_dataset=dataset("RLAD"), processing_class=tiny.tokenizer(),
    ).model  # fmt: skip
    copied, other, ids = copy.deepcopy(policy), tiny.model(seed=1), torch.arange(8).view(1, 8)
    copied.load_state_dict(other.state_dict())
    assert torch.equal(copied.eval()(ids).logits, other.eval()(ids).logits)
    assert copied(input_ids=ids, head_call=lambda hidden, model: model).result is copied


def test_lora_and_special_tokens(tmp_path: Path):
    options = {"topk": 4, "mask_special_tokens": True, "max_steps": 2, **lora()}
    run = train("RLAD", tmp_path, teacher=teacher_model(), **options)
    assert all("lora" in k for k in run["grads"])
    assert any((run["after"][k] - p).norm() > 1e-4 for k, p in run["before"].items())
    batch = run["inputs"][0]
    special = batch["completion_ids"] == tiny.EOS
    assert special.any() and batch["teacher_target_logp"][special].isnan().all() and (batch["teacher_ids"][special] == -1).all()
    assert 0 < run["logs"][0]["rlad/invalid_teacher"] < 1


def test_wrong_wiring_names_the_fix(tmp_path: Path):
    with pytest.raises(ValueError, match=r"264 ids, the teacher's 300; .*RLADConfig.vocab_size"):
        train("RLAD", tmp_path, teacher=tiny.model(vocab_size=300))
    with pytest.raises(ValueError, match="must return a TopK with target_logp, got Tensor"):
        train("RLAD", tmp_path, teacher=lambda ids, mask, length: ids, temperature=1.0)
    with pytest.raises(ValueError, match="the teacher gave id 264, the student has 264; map ids"):
        train("RLAD", tmp_path, teacher=lambda ids, mask, n: TopK(*_constant(ids[:, -n:], 264)), temperature=1.0)
    student = tiny.model()
    with pytest.raises(ValueError, match="teacher is the student itself"):
        train("RLAD", tmp_path, model=student, teacher=student)


def _constant(completion: Tensor, id: int) -> tuple[Tensor, Tensor, None, None, Tensor]:
    wide = torch.zeros(*completion.shape, 1)
    return (wide + id).int(), wide, None, None, wide.squeeze(-1)


def test_the_example_raises_reward_and_lowers_kl():
    path = Path(__file__).parents[1] / "examples" / "trl_rlad.py"
    spec = importlib.util.spec_from_file_location("trl_rlad", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(["--steps", "20"])
    assert found["after"]["reward"] > found["before"]["reward"] + 0.1
    assert found["after"]["reverse_kl"] < 0.5 * found["before"]["reverse_kl"]
