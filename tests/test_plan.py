"""The planner's bytes against measured peaks, its models against transformers, its answers against themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlad_kernels as rk
from rlad_kernels.__main__ import main
from rlad_kernels.core.sizes import byte_size
from rlad_kernels.tools.plan import MODELS, PATHS, Plan, loss_bytes, model_of

ROOT = Path(__file__).parent.parent
CASES = [  # sizes at which what is counted is hundreds of megabytes
    ("naive", 2048, 64, 32_768, "float32", 8, 0),
    ("linear_loss", 1024, 64, 262_144, "float32", 8, 0),
    ("linear_loss", 1024, 640, 131_072, "bfloat16", 8, 0),
    ("linear_loss", 640, 64, 262_144, "bfloat16", 8, 0),
    ("linear_logp", 64, 640, 131_072, "float32", 8, 0),
    ("linear_logp", 64, 640, 262_144, "bfloat16", 8, 0),
    ("linear_logp", 1024, 64, 131_072, "float32", 8, 400 << 20),
    ("linear_topk", 100_000, 32, 1024, "float32", 72, 0),
    ("topk_kl", 70_000, 32, 4096, "float32", 100, 0),
]


@pytest.mark.cpu
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_measured_peaks_are_within_a_tenth_of_the_counted_bytes() -> None:
    """glibc is told to give freed memory back at once, so that the process holds what the tensors hold."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.peaks", json.dumps(CASES)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = []
    for (path, n, d, v, dtype, k, keep), measured in zip(CASES, json.loads(done.stdout), strict=True):
        counted = loss_bytes(path, n, d, v, dtype=getattr(torch, dtype), device="cpu", k=k, keep=keep)
        rows.append((path, dtype, round(measured / 1e6), round(counted / 1e6)))
        assert counted > 300e6, rows[-1]
    assert all(abs(measured - counted) <= 0.1 * counted for *_, measured, counted in rows), rows


def test_models_are_those_of_the_bench() -> None:
    from bench.plan import MODELS as BENCH

    assert {name: (m.hidden, m.vocab) for name, m in MODELS.items()} == BENCH


@pytest.mark.parametrize(
    "name, config", [("Qwen3-0.6B", "Qwen3Config"), ("Llama-3-8B", "LlamaConfig"), ("Gemma-3-270M", "Gemma3TextConfig")]
)
def test_parameters_are_those_that_transformers_makes(name: str, config: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    m = MODELS[name]
    made = getattr(transformers, config)(
        hidden_size=m.hidden, vocab_size=m.vocab, num_hidden_layers=m.blocks, num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads, head_dim=m.head_dim, intermediate_size=m.mlp, tie_word_embeddings=m.tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    assert m.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-3)
    made.save_pretrained(tmp_path)
    assert model_of(str(tmp_path)) == model_of(str(tmp_path / "config.json")) == m


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("checkpointing", (True, False))
def test_the_largest_number_of_tokens_fits_and_one_more_does_not(path: str, checkpointing: bool) -> None:
    made, memory = Plan(MODELS["Qwen3-1.7B"], checkpointing=checkpointing), 40 * 2**30
    most = made.most_tokens(path, memory)
    assert made.step(path, most) <= memory < made.step(path, most + 1)
    assert made.most_tokens(path, 2**20) == 0


def test_longer_contexts_fit_without_the_logits() -> None:
    made = Plan(MODELS["Qwen3-1.7B"])
    naive, ours = (made.most_tokens(path, 80 * 2**30) for path in ("naive", "linear_logp"))
    assert ours > 4 * naive
    assert loss_bytes("naive", 4096, 1024, 151_936, dtype=torch.float32) == 3 * 4 * 4096 * 151_936


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "Qwen3-8B", "--tokens", "32768", "--memory", "80GiB"]) == 0
    out = capsys.readouterr().out
    for memory, name in (("80", "qwen3-8b"), ("80G", "Qwen/Qwen3-8B"), ("80GB", "qwen/QWEN3-8b"), ("80 gib", "Qwen3-8B")):
        assert main(["plan", "--model", name, "--tokens", "32768", "--memory", memory]) == 0
        assert capsys.readouterr().out.replace(name, "Qwen3-8B") == out
    bars = {line.split()[0]: line.count("█") for line in out.splitlines() if "█" in line}
    assert bars["weights"] == bars["gradients"] == 6 and bars["optimizer"] == 11 and bars["naive"] == 30 > bars["linear_logp"]
    assert "▶" in next(line for line in out.splitlines() if line.startswith("naive"))
    assert all(path in out for path in PATHS) and "8.19 B parameters" in out and "32,768 tokens" in out
    assert [line.split()[5] for line in out.splitlines() if line.startswith(PATHS)][:2] == ["no", "fits"]
    for wrong, message in {
        ("--model", "Qwen9"): "model must be one of SmolLM2-135M",
        ("--tokens", "0"): "plan: tokens must be positive, got 0",
        ("--k", "-1"): "plan: k must be positive, got -1",
        ("--memory", "much"): "memory must be a number of GiB, or one with a unit such as 80GiB, got 'much'",
    }.items():
        with pytest.raises(SystemExit):
            main(["plan", "--model", "Qwen3-8B", "--tokens", "1", "--memory", "80GiB", *wrong])
        assert message in capsys.readouterr().err


def test_the_page_says_what_the_planner_does() -> None:
    page = (ROOT / "docs" / "long_context.md").read_text()
    made, memory = Plan(MODELS["Qwen3-8B"]), 80 << 30
    names = {"naive": "naive: all logits", "linear_logp": "`linear_logp`", "linear_loss": "`linear_loss`"}
    for path, name in (names | {"topk_kl": "`linear_loss` of `TopKKL`, renormalised, K 64"}).items():
        loss = loss_bytes(path, 32_768, 4096, 151_936, dtype=torch.bfloat16)
        step, most = made.step(path, 32_768), made.most_tokens(path, memory)
        row = (name, f"{loss / 2**30:.2f} GiB", f"{step / 2**30:.2f} GiB", "yes" if step <= memory else "no", f"{most:,}")
        assert f"| {' | '.join(row)} |" in page


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, told in ((["--help"], "{doctor,plan,methods}"), (["--version"], f"rlad_kernels {rk.__version__}")):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0 and told in capsys.readouterr().out
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    assert all(any(line.startswith(f"{name} ") for line in table.splitlines()) for name in rk.METHODS)
    assert main(["methods", "trrd"]) == 0
    told = capsys.readouterr().out
    assert "arXiv 2602.22495" in told and "teacher_logp" in told and "The clip is live at the first step" in told
    with pytest.raises(SystemExit):
        main(["methods", "grop"])
    assert "methods: name must be one of" in capsys.readouterr().err
    assert main(["doctor"]) == main([])
    assert capsys.readouterr().out.count("on Python") == 2


def test_the_doctor_still_answers_and_passes_plan_on() -> None:
    run = [sys.executable, "-m", "rlad_kernels", "plan", "--model", "Qwen3-0.6B", "--tokens", "1024", "--memory", "8GB"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert "most tokens" in subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout


def test_bad_arguments(tmp_path: Path) -> None:
    sizes = [byte_size("plan", "memory", text) for text in ("80GiB", "24 GB", "1.5kb", "7")]
    assert sizes == [80 << 30, 24 << 30, 1536, 7]
    for text in ("80 bananas", "GiB", "-1GB"):
        with pytest.raises(ValueError, match="memory must be a number of bytes, or one with a unit such as 80GiB"):
            byte_size("plan", "memory", text)
    moe = tmp_path / "config.json"
    moe.write_text(json.dumps({"hidden_size": 8, "num_experts": 4}))
    with pytest.raises(ValueError, match="mixture of experts"):
        model_of(str(moe))
    moe.write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ValueError, match="has no 'num_attention_heads'"):
        model_of(str(moe))
    with pytest.raises(ValueError, match="optimizer must be one of"):
        Plan(MODELS["Qwen3-8B"], optimizer="lion")
    with pytest.raises(ValueError, match="path must be one of"):
        loss_bytes("magic", 1, 1, 1, dtype=torch.float32)
