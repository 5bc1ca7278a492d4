# Every target sets up what it needs: `make demo` and `make test` work from a clean clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
RUN := HF_HUB_OFFLINE=1 $(BIN)/python
# one thread a worker, unless the environment says otherwise: two workers fill two cores
SUITE := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest tests -q -n 2 --dist worksteal
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h')
OUT ?= out
# what a torch for CUDA brings on Linux
TORCH_CUDA := $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 \
	nccl-cu13 nvjitlink nvshmem-cu13 nvtx) cuda-bindings cuda-pathfinder cuda-toolkit

.PHONY: wheel lock sbom demo demo-smoke test test-cpp test-portable test-triton test-newest gate fuzz sanitize mutants lint format bench bench-full bench-smoke docs site gpu gpu-dry gpu-build gpu-test gpu-tune gpu-bench clean

# Everything but torch by hash, as PyPI has it; torch is the build that the machine's registry gives, and its CUDA packages with it.
PIP := -m pip install --quiet --disable-pip-version-check
.venv/.deps: requirements.lock requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) $$(grep '^torch==' requirements-dev.txt)
	$(BIN)/python $(PIP) --require-hashes --no-deps -r requirements.lock
	touch $@

.venv/.built: .venv/.deps $(SOURCES)
	$(BIN)/python $(PIP) --no-build-isolation --no-deps -e .
	touch $@

.venv/.peers: .venv/.deps requirements-bench.txt
	$(BIN)/python $(PIP) -r requirements-bench.txt
	touch $@

wheel: .venv/.built  ## one wheel for this platform, Python 3.11 and later and torch 2.11 and later, and the sources, in dist/
	$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' > /dev/null
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

.release/.done: requirements-release.txt
	$(PYTHON) -m venv .release
	.release/bin/python $(PIP) -r requirements-release.txt
	touch $@

lock: requirements-dev.txt requirements-alone.txt .release/.done  ## pin and hash all that they bring, for every Python from 3.11
	.release/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
		--custom-compile-command 'make lock' --no-emit-package torch $(addprefix --no-emit-package ,$(TORCH_CUDA)) \
		-o requirements.lock requirements-dev.txt
	.release/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --no-deps \
		requirements-alone.txt >> requirements.lock

sbom: .release/.done  ## what the suite and the demo run with, as CycloneDX, in dist/
	mkdir -p dist
	grep -h '^torch==' requirements-dev.txt | cat requirements.lock - | \
		.release/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o dist/rlad_kernels.cdx.json -

demo: .venv/.built  ## the main job on a real model: loss without logits, then a short RLAD training run
	$(RUN) examples/rlad_smollm2.py --out $(OUT)/demo

demo-smoke: .venv/.built  ## the demo and the TRL example, a few steps of each
	$(RUN) examples/rlad_smollm2.py --smoke --out $(OUT)/demo-smoke
	$(RUN) examples/trl_smollm2.py --steps 1 --held-out 8

test: test-cpp test-triton gate  ## the suite on the C++ backend and on the interpreted Triton kernels, then the compile gate

test-cpp: .venv/.built  ## the suite on the C++ backend
	$(SUITE) --ignore tests/test_compile_gate.py

# what is refused, traced or run as a script is the same on every CPU
PORTABLE := --ignore tests/test_bad_input.py --ignore tests/test_argument_kinds.py --ignore tests/test_own_loss.py \
	--ignore tests/test_example_scripts.py --ignore tests/test_bench.py --ignore tests/test_plan.py \
	--ignore tests/test_new_kernel.py --ignore tests/test_alignment.py --ignore tests/test_resume.py \
	--ignore tests/test_official_losses.py --ignore tests/test_data_parallel.py --ignore tests/test_shards.py \
	--ignore tests/test_long_runs.py --ignore tests/test_wheel.py --ignore tests/test_supply_chain.py --ignore tests/test_rlad_and_others.py \
	--ignore tests/test_reference.py --ignore tests/test_hub.py --ignore tests/test_notebooks.py --ignore tests/test_docstrings.py --ignore tests/test_rlad_options.py --ignore tests/test_context_parallel.py --ignore tests/test_engine_recipes.py --ignore tests/test_limits.py \
	--deselect tests/test_both_roads.py::test_both_roads_compile_for_any_number_of_tokens

test-portable: .venv/.built  ## the suite as on a CPU without vector instructions: PyTorch's and our own plain code
	ATEN_CPU_CAPABILITY=default RLAD_CPU_ISA=generic $(SUITE) --ignore tests/test_compile_gate.py $(PORTABLE)

test-newest: .venv/.built  ## the trainers' tests on the newest TRL, transformers and peft, beside the pinned ones
	$(BIN)/python -m venv --clear .venv-newest
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$(echo .venv-newest/lib/python*/site-packages)/pinned.pth
	.venv-newest/bin/python $(PIP) --upgrade trl transformers peft
	HF_HUB_OFFLINE=1 .venv-newest/bin/python -m pytest -q tests/test_trl*.py tests/test_rlad*.py tests/test_transformers.py \
		tests/test_patched_models.py tests/test_integration_docs.py

test-triton: .venv/.built  ## the suite on the interpreted Triton kernels
	TRITON_INTERPRET=1 $(SUITE)

gate: .venv/.built  ## compile every Triton kernel ahead of time for sm_80, sm_90 and sm_100; no GPU needed
	$(RUN) -m pytest tests/test_compile_gate.py -q

# random calls against float64; a failure prints how to repeat it, and becomes an @example or a test of its own
CASES ?= 20000
SEED ?= 0
fuzz: .venv/.built  ## CASES random calls from SEED; TRITON_INTERPRET=1 for the interpreted kernels, some 20 times slower
	RLAD_FUZZ_CASES=$(CASES) OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_fuzz.py -q -s --hypothesis-seed=$(SEED)

# what runs the row passes directly, each of them on every instruction set, and what reaches them through the public calls
SANITIZED_ROWS := tests/test_cpp_rows.py tests/test_cpp_gradients.py tests/test_divergence_rows.py tests/test_row_blocks.py \
	tests/test_bf16_products.py
SANITIZED_CALLS := tests/test_topk_and_gather.py tests/test_fuzz.py
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 RLAD_SANITIZED=$(OUT)/sanitize OMP_NUM_THREADS=1 \
	$(RUN) -m pytest -p tests.sanitized -q -x
sanitize: .venv/.built  ## csrc under AddressSanitizer and UndefinedBehaviorSanitizer, for every instruction set that this CPU has
	RLAD_SANITIZE=1 $(RUN) setup.py -q build_ext --build-lib $(OUT)/sanitize --build-temp $(OUT)/sanitize/objects
	$(SANITIZED) $(SANITIZED_ROWS)
	for isa in generic avx2 avx512 avx512_bf16 amx_bf16; do \
		export RLAD_CPU_ISA=$$isa; \
		$(RUN) -c 'import rlad_kernels, torch; torch.ops.rlad.cpu_isa()' 2> /dev/null || { echo "this CPU has no $$isa"; continue; }; \
		echo "$$isa"; $(SANITIZED) $(SANITIZED_CALLS) || exit 1; \
	done

.venv/.mutants: .venv/.deps requirements-mutants.txt
	$(BIN)/python $(PIP) -r requirements-mutants.txt
	touch $@

# goes on where it stopped; remove $(OUT)/mutants after a change
SAMPLE ?= 300
mutants: .venv/.built .venv/.mutants  ## SAMPLE changes, from SEED, to the Python of four rooms: which does no test see? an hour on two cores
	test -e $(OUT)/mutants/lines.json || $(RUN) -m tests.mutants map --out $(OUT)/mutants
	$(RUN) -m tests.mutants run --out $(OUT)/mutants --sample $(SAMPLE) --seed $(SEED)

lint: .venv/.deps  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.built .venv/.peers  ## time, memory and error beside the peers, ten minutes on two cores; writes bench/results/
	$(RUN) -m bench --out bench/results

bench-full: .venv/.built .venv/.peers  ## every provider at the shape of every model: hours
	$(RUN) -m bench --full --resume --out bench/results

bench-smoke: .venv/.built  ## the bench at toy size
	$(RUN) -m bench --smoke --out $(OUT)/bench

docs: .venv/.built  ## write the pages that the code knows (methods, calls, reference, versions, benchmarks), check that the rest is true
	$(RUN) docs/make_methods.py
	$(RUN) docs/make_calls.py
	$(RUN) docs/make_reference.py
	$(RUN) -m pytest tests/test_docs.py tests/test_reference.py -q

site: .venv/.built  ## the documentation as a site with its reference, in $(OUT)/site; a warning is an error
	$(RUN) -m sphinx -q -W --keep-going -b html -c docs . $(OUT)/site

# The GPU machine: nothing is installed, its own python has torch and triton. Each step ends within RLAD_GPU_SECONDS and ten more;
# called again it goes on: finished tests and measurements are remembered under $(OUT)/gpu and GPU_RESULTS.
# RLAD_COMMIT names the commit where there is no git.
GPU_PYTHON ?= python3
GPU_DEVICE ?= cuda
GPU_RESULTS ?= bench/results
GPU_WORKERS ?= 14
GPU_TESTS ?= tests
GPU_SANITIZED ?= tests/test_single_token.py tests/test_top1.py tests/test_compaction.py
gpu-test gpu-tune gpu-bench: export RLAD_GPU_SECONDS ?= 170
GPU_RUN := HF_HUB_OFFLINE=1 $(GPU_PYTHON)
ifeq ($(GPU_DEVICE),cpu)  # gpu-dry: the kernels interpreted
GPU_TESTS := tests/test_single_token.py
GPU_WORKERS := 2
GPU_RESULTS := $(OUT)/gpu
GPU_KERNELS := TRITON_INTERPRET=1
endif

gpu: gpu-build gpu-test gpu-tune gpu-bench

gpu-build:
	mkdir -p $(OUT)/gpu
	$(GPU_PYTHON) -c 'import torch, rlad_kernels._C' || $(GPU_PYTHON) setup.py build_ext --inplace
	$(GPU_PYTHON) -m rlad_kernels

gpu-test:  ## the suite on the GPU, all workers on one; a traceback as it happens in $(OUT)/gpu/failures
	mkdir -p $(OUT)/gpu
	$(GPU_KERNELS) RLAD_TEST_DEVICE=$(GPU_DEVICE) RLAD_TEST_DONE=$(OUT)/gpu/done.txt OMP_NUM_THREADS=1 \
		$(GPU_RUN) -m pytest $(GPU_TESTS) -q -n $(GPU_WORKERS) --dist worksteal -rfE --durations 8 --disable-warnings \
		$$($(GPU_PYTHON) -c 'import pytest_timeout; print("--timeout 60")' 2>/dev/null)

gpu-tune:  ## launch rows, tile sizes and thresholds: what is fastest here, beside what the tables have
	$(GPU_KERNELS) $(GPU_RUN) -m bench.tune --device $(GPU_DEVICE) --out $(GPU_RESULTS)

gpu-bench:  ## ours and the peers in one process, then compute-sanitizer over a few tests
	RLAD_GPU_SECONDS=$$((RLAD_GPU_SECONDS - 45)) $(GPU_RUN) -m bench --device $(GPU_DEVICE) --gpu --resume --out $(GPU_RESULTS)
	! command -v compute-sanitizer || RLAD_TEST_DEVICE=$(GPU_DEVICE) PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 45 \
		compute-sanitizer --error-exitcode 9 $(GPU_PYTHON) -m pytest $(GPU_SANITIZED) -q -x || test $$? = 124

gpu-dry: .venv/.built  ## the same steps on the CPU at toy size: interpreted kernels, a few tests, one process for the bench
	rm -rf $(OUT)/dry
	$(MAKE) gpu GPU_PYTHON=$(BIN)/python GPU_DEVICE=cpu OUT=$(OUT)/dry

clean:
	rm -rf build dist *.egg-info rlad_kernels/*.so .venv .venv-newest .release out .pytest_cache .ruff_cache .hypothesis
