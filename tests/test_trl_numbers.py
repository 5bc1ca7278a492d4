"""TRL's own trainers on our head: one code for old, reference and new log-probs, a float32 head where asked, versions."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from rlad_kernels.integrations.wiring import TESTED, check_version
from tests import tiny
from tests.trl_runs import lora, needs_trl, train

pytestmark = [pytest.mark.cpu, needs_trl]


def scored(tmp_path: Path, *, ours: bool, kind: str = "GRPO", **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run of GRPO, and of each loss the new log-probs and what they are compared with, on the kept tokens."""
    import trl

    from rlad_kernels.integrations.trl import use_rlad_kernels

    cls = trl.GRPOTrainer
    compute, scores = cls._compute_loss, cls._get_per_token_logps_and_entropies
    new: list[torch.Tensor] = []
    losses: list[dict[str, Any]] = []

    def see(self: Any, *args: Any, **more: Any) -> Any:
        out = scores(self, *args, **more)
        new[:] = [out[0].detach()]
        return out

    def loss(self: Any, model: Any, inputs: Any) -> Any:
        value, keep = compute(self, model, inputs), inputs["completion_mask"].bool()
        named = {"new": new[0], "old": inputs.get("old_per_token_logps"), "ref": inputs.get("ref_per_token_logps")}
        losses.append({k: None if x is None else x[keep] for k, x in named.items()})
        return value

    with pytest.MonkeyPatch.context() as patch, use_rlad_kernels() if ours else nullcontext():
        patch.setattr(cls, "_compute_loss", loss)
        patch.setattr(cls, "_get_per_token_logps_and_entropies", see)
        return train(kind, tmp_path, **options), losses


@pytest.mark.parametrize("autocast", [False, True])
def test_equal_weights_have_equal_log_probs(autocast: bool, tmp_path: Path):
    """Learning rate 0, in bfloat16: old policy, reference and policy are one, in other batches as well, to the last bit."""
    tiny.model().save_pretrained(tmp_path / "model")
    _, losses = scored(
        tmp_path, ours=True, model=str(tmp_path / "model"), learning_rate=0.0, beta=0.1, num_iterations=2, max_steps=3,
        bf16=autocast, model_init_kwargs={"dtype": "float32" if autocast else "bfloat16"}, gradient_accumulation_steps=2,
        steps_per_generation=4,
        cast_lm_head_to_fp32=autocast,
    )  # fmt: skip
    assert len(losses) == 6
    for x in losses:
        assert len(x["new"]) and torch.equal(x["new"], x["old"]) and torch.equal(x["new"], x["ref"])


CASTS: dict[str, Any] = {
    "bfloat16": lambda: {"model": tiny.model().bfloat16()},
    "autocast": lambda: {"bf16": True},
    "bfloat16, tied": lambda: {"model": tiny.model(tie_word_embeddings=True).bfloat16()},
    "autocast, tied": lambda: {"model": tiny.model(tie_word_embeddings=True), "bf16": True},
    "bfloat16, LoRA": lambda: {"model": tiny.model().bfloat16(), **lora()},
}


@pytest.mark.parametrize("case", CASTS)
def test_the_head_is_read_in_float32_where_asked(case: str, tmp_path: Path):
    """As by TRL itself, and by RLADTrainer; autocast would have rounded the head's weights."""
    from rlad_kernels.integrations.trl import trainer

    options = {"cast_lm_head_to_fp32": True, "max_steps": 1}
    theirs, wanted = scored(tmp_path, ours=False, **options, **CASTS[case]())
    mine, found = scored(tmp_path, ours=True, **options, **CASTS[case]())
    torch.testing.assert_close(found[0]["new"], wanted[0]["new"], rtol=1e-5, atol=4e-6)
    assert {k: g.dtype for k, g in mine["grads"].items()} == {k: g.dtype for k, g in theirs["grads"].items()}
    if "autocast" in case:
        _, rounded = scored(tmp_path, ours=True, max_steps=1, **CASTS[case]())
        assert (rounded[0]["new"] - wanted[0]["new"]).abs().max() > 1e-4
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    loss = trainer.linear_loss

    def watched(hidden: torch.Tensor, head: Any, *args: Any, **more: Any) -> Any:
        seen.append((hidden.dtype, head.weight.dtype))
        return loss(hidden, head, *args, **more)

    plain = {"teacher": tiny.model(seed=1), "alpha": 1.0, "topk": 0, "loss_type": "dapo"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "linear_loss", watched)
        rlad = train("RLAD", tmp_path, **plain, **options, **CASTS[case]())
    assert seen == [(torch.float32, torch.float32)]
    assert rlad["logs"][0]["entropy"] == pytest.approx(theirs["logs"][0]["entropy"], rel=1e-6)
    assert {k: g.dtype for k, g in rlad["grads"].items()} == {k: g.dtype for k, g in theirs["grads"].items()}


def test_the_names_decide_and_not_the_version(monkeypatch: pytest.MonkeyPatch):
    import trl
    import trl.kernels.chunked_divergence as divergence
    from trl.trainer import utils

    from rlad_kernels.integrations.trl import patch as ours

    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.warns(UserWarning, match=r"^use_rlad_kernels: trl 1\.17\.0 has the names that are replaced, but the tests ran on"):
        patch = ours.use_rlad_kernels()
    try:
        assert trl.kernels.ChunkedLogProbFunction is ours.ChunkedLogProbFunction
    finally:
        patch.undo()
    was = utils.add_fused_lm_head
    monkeypatch.setattr(utils, "add_fused_lm_head", lambda model, temperature: None)
    monkeypatch.delattr(divergence, "ChunkedDivergenceFunction")
    gone = re.escape("no trl.kernels.chunked_divergence.ChunkedDivergenceFunction.forward")
    other = re.escape("trl.trainer.utils.add_fused_lm_head(model, temperature), wanted (model, temperature, cast_lm_head_to_fp32, ")
    with pytest.raises(
        RuntimeError, match=rf"^use_rlad_kernels: trl 1\.17\.0 has not what it takes: {gone}; {other}.*; pip install trl=="
    ):
        ours.use_rlad_kernels()
    assert trl.trainer.grpo_trainer.add_fused_lm_head is was  # nothing was replaced


def test_the_trainer_asks_for_the_methods_it_overrides(monkeypatch: pytest.MonkeyPatch):
    import trl

    from rlad_kernels.integrations.trl import RLADTrainer, trainer

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, inputs, return_outputs: None)
    with pytest.raises(
        RuntimeError, match=r"^RLADTrainer: .*GRPOTrainer\._compute_loss\(self, model, inputs, return_outputs\), wanted"
    ):
        RLADTrainer("nowhere", teacher="nowhere")
    monkeypatch.undo()
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.warns(UserWarning, match=r"^RLADTrainer: trl 1\.17\.0 has the names"):
        check_version("RLADTrainer", "trl", trainer._overridden())


def test_the_pages_name_the_tested_versions():
    root = Path(__file__).parents[1]
    for package, versions in TESTED.items():
        page = (root / "docs" / f"{package}.md").read_text()
        assert all(v in page for v in versions), f"docs/{package}.md should name {versions}"
        assert any(f"{package}=={v}" in (root / "requirements-dev.txt").read_text() for v in versions)
