"""Every causal LM of transformers, as docs/wiring.md's table says; and that every way into the library asks the model first."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rlad_kernels as rk
from tests import every_model, tiny
from tests.trl_runs import needs_trl

FOUND = importlib.util.find_spec("transformers") is not None
pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not FOUND, reason="transformers not installed")]
ROWS = every_model.rows()


@pytest.fixture(autouse=True)
def _pinned() -> None:
    import transformers

    wanted = re.search(r"transformers (\d+\.\d+\.\d+)", every_model.PAGE.read_text())
    if wanted is None or wanted[1] != transformers.__version__:
        pytest.skip(f"docs/wiring.md is about another transformers than {transformers.__version__}")


def test_the_table_has_every_causal_lm():
    assert sorted(ROWS) == sorted(every_model.names())
    assert sum(kind == "agrees" for kind, _ in ROWS.values()) >= 200


@pytest.mark.parametrize("name", ROWS)
def test_the_head_of_every_causal_lm(name: str):
    assert every_model.outcome(name) == ROWS[name], "if this is right, python -m tests.every_model writes the table"


def no_head() -> Any:
    """A model whose logits no head gives."""
    model = tiny.model()
    theirs = type(model).forward

    class Shifted(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = theirs(self, *args, **kwargs)
            out.logits[..., 5] += 1
            return out

    model.__class__ = Shifted
    return model


def test_use_rlad_loss_asks():
    from rlad_kernels.integrations.transformers import use_rlad_loss

    with pytest.raises(ValueError, match=r"^use_rlad_loss: Shifted makes other .* at id 5, and more at 1 of 264 ids"):
        use_rlad_loss(no_head(), check=False)
    peft = pytest.importorskip("peft", reason="peft not installed: pip install -r requirements-dev.txt")
    adapted = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"^use_rlad_loss: .*a PEFT adapter on its head"):
        use_rlad_loss(adapted)
    whole = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert rk.LMHead.from_model(whole).weight is whole.get_base_model().lm_head.modules_to_save["default"].weight


def test_head_call_asks():
    from rlad_kernels.integrations.backbone import add_head_call

    with pytest.raises(ValueError, match=r"^mine: Shifted makes other logits of its head's output"):
        add_head_call("mine", no_head())


@needs_trl
def test_rlad_trainer_asks_student_and_teacher(tmp_path: Path):
    from rlad_kernels.integrations.trl import RLADConfig, RLADTrainer
    from tests.trl_runs import COMMON, dataset, reward

    options = {**COMMON, "max_steps": 1, "num_generations": 4, "max_completion_length": 6}
    for student, teacher in ((no_head(), tiny.model(seed=1)), (tiny.model(), no_head())):
        with pytest.raises(ValueError, match=r"^(RLADTrainer|LMHead.from_model): Shifted makes other logits"):
            RLADTrainer(
                student, reward, teacher=teacher, args=RLADConfig(str(tmp_path), **options), train_dataset=dataset("GRPO"),
                processing_class=tiny.tokenizer(),
            )  # fmt: skip


@needs_trl
def test_trls_patch_asks_and_compares_what_trl_reads():
    from trl.trainer import utils

    from rlad_kernels.integrations import trl as ours

    with ours.use_rlad_kernels():
        with pytest.raises(ValueError, match=r"^add_fused_lm_head: Shifted makes other logits"):
            utils.add_fused_lm_head(no_head())
        capped = every_model.build("Gemma3ForConditionalGeneration")  # its forward leaves the text configuration's cap out
        with pytest.raises(ValueError, match=r"^add_fused_lm_head: TRL takes .*'softcap': 3.0.*its forward does .*'softcap': None"):
            utils.add_fused_lm_head(capped)
        assert "forward" not in vars(capped)
        capped.config.text_config.final_logit_softcapping = None
        utils.add_fused_lm_head(capped)
        for name in ("HyperCLOVAXForCausalLM", "MuseGlimmerForConditionalGeneration", "MiniCPM3ForCausalLM", "Gemma2ForCausalLM"):
            utils.add_fused_lm_head(every_model.build(name))
        with pytest.raises(ValueError, match=r"TRL takes .*'softcap': None.*its forward does .*'softcap': 3.0"):
            utils.add_fused_lm_head(every_model.build("xLSTMForCausalLM"))


def test_an_offloaded_head_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = tiny.model()
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    assert rk.LMHead.from_model(model).weight is model.lm_head.weight  # hooks alone do not matter
    accelerate.cpu_offload(model.lm_head)
    with pytest.raises(
        ValueError, match="head without values, on the meta device; load it, or keep lm_head out of what is offloaded"
    ):
        rk.LMHead.from_model(model)


def test_logits_of_a_model_that_is_trained_later_are_still_the_heads():
    model = every_model.build("HyperCLOVAXForCausalLM")
    head = rk.LMHead.from_model(model)
    assert head.logit_scale == model.config.logits_scaling == 4  # multiplied, where Granite divides
    assert rk.LMHead.from_model(every_model.build("GraniteForCausalLM")).logit_scale == 0.25
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert every_model.gap(model, rk.LMHead.from_model(model))[0] <= 1


@pytest.mark.cpu
@pytest.mark.parametrize(
    "package, code, told",
    [
        (
            "trl",
            "import rlad_kernels.integrations.trl as t; t.use_rlad_kernels()",
            "use_rlad_kernels needs trl .*pip install trl==",
        ),
        ("trl", "from rlad_kernels.integrations.trl import RLADTrainer", "RLADTrainer needs trl .*pip install trl==.* peft"),
        ("transformers", "import rlad_kernels.integrations.transformers", "needs transformers .*pip install 'transformers>=5'"),
        ("verl", "import rlad_kernels.integrations.verl", "pip install 'verl==0.9.1'"),
    ],
)
def test_a_framework_that_is_not_here_names_its_pip_line(package: str, code: str, told: str) -> None:
    absent = f"import sys; sys.modules[{package!r}] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", absent], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and re.search(told, done.stderr.splitlines()[-1]), done.stderr
