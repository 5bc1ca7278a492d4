"""RLADTrainer's log-probs come from one code, in the precision that is asked for."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import tiny
from tests.test_rlad_trainer import plain_loss, teacher_model
from tests.trl_runs import needs_trl, train

pytestmark = [pytest.mark.cpu, needs_trl]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cast_head", [False, True])
def test_equal_weights_have_equal_log_probs(autocast: bool, cast_head: bool, tmp_path: Path):
    """Learning rate 0: old policy, reference and policy are one, so every ratio is 1 and every KL 0, in bfloat16."""
    tiny.model().save_pretrained(tmp_path / "model")
    run = train(
        "RLAD", tmp_path, model=str(tmp_path / "model"), teacher=teacher_model(), alpha=1.0, beta=0.1, num_iterations=2,
        learning_rate=0.0, bf16=autocast, model_init_kwargs={"dtype": "float32" if autocast else "bfloat16"},
        cast_lm_head_to_fp32=cast_head, max_steps=4, mask_truncated_completions=True, topk=0,
    )  # fmt: skip
    assert all("old_per_token_logps" in x and "ref_per_token_logps" in x for x in run["inputs"])
    rows = [row for row in run["logs"] if "rlad/ratio_max" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["rlad/ratio_max"] == 1.0 and row["rlad/kl_old"] == 0 and row["rlad/kl_ref"] == 0
        assert row["rlad/kl_teacher"] != 0


def test_equal_weights_in_other_batches_and_under_an_adapter(tmp_path: Path):
    """The rollout's 16 answers are scored four by four, then shuffled; the reference is the model without its adapter.

    Beside a support the new log-probs' sum is added in another order: a rounding of float32.
    """
    from peft import LoraConfig

    run = train(
        "RLAD", tmp_path, model=tiny.model().bfloat16(), teacher=teacher_model(), alpha=1.0, beta=0.1, num_iterations=2,
        learning_rate=0.0, gradient_accumulation_steps=2, steps_per_generation=4, max_steps=4,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
    )  # fmt: skip
    assert len(run["inputs"]) == 8 and all("old_per_token_logps" in x for x in run["inputs"])
    for row in [row for row in run["logs"] if "rlad/ratio_max" in row]:
        assert abs(row["rlad/ratio_max"] - 1) <= 1e-6 and row["rlad/kl_old"] <= 1e-6 and row["rlad/kl_ref"] <= 1e-6


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_head_is_read_in_float32_where_asked(autocast: bool, peft: bool, tmp_path: Path):
    """A bfloat16 backbone and a float32 head, or autocast around float32 weights: the head's gradient is float32's."""
    dtype = torch.float32 if autocast else torch.bfloat16
    more: dict[str, Any] = {}
    if peft:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    run = train(
        "RLAD", tmp_path, model=tiny.model().to(dtype), teacher=teacher_model(), alpha=0.3, topk=8, topk_kl_coef=0.5, max_steps=1,
        bf16=autocast, cast_lm_head_to_fp32=True, **more,
    )  # fmt: skip

    def forward(self: Any, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(hidden.float(), self.weight)

    student, teacher = tiny.model().to(dtype), teacher_model()
    for model in (student, teacher):
        model.lm_head.float()
        model.lm_head.forward = types.MethodType(forward, model.lm_head)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = plain_loss(student, teacher, run["inputs"][0], 0.3, 0.5, 8)
    loss.backward()
    wanted = student.lm_head.weight.grad
    found = next(g for k, g in run["grads"].items() if "lm_head" in k)
    assert found.dtype == torch.float32
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_two_ranks_go_on_where_one_has_no_kept_token(tmp_path: Path):
    """And what is logged are the means over the tokens of both. A rank that waits for the other fails after a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root, command = Path(__file__).parents[1], [sys.executable, "-m", "tests.rlad_ranks"]
    ranks = [
        subprocess.Popen([*command, str(i), port, str(tmp_path / str(i))], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs[0][1].decode()[-2000:] + outputs[1][1].decode()[-2000:]
    found = [json.loads(out.decode().split("FOUND ")[1]) for out, _ in outputs]
    rows = [row for row in found[0]["logs"] if "entropy" in row]
    assert len(rows) == 2 and found[1]["steps"][0]["kept"] == 0 < found[1]["steps"][1]["kept"] < found[0]["steps"][1]["kept"]
    for row, one, two in zip(rows, found[0]["steps"], found[1]["steps"], strict=True):
        assert one.keys() == two.keys()
        n, m = one.pop("kept"), two.pop("kept")
        for name, x in one.items():
            wanted = max(x, two[name]) if name.endswith("_max") else (n * x + m * two[name]) / (n + m)
            assert row["entropy" if name == "entropy" else f"rlad/{name}"] == pytest.approx(wanted, rel=1e-5)
