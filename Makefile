# Two commands do all the set-up on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
# Exact versions that were tested together. Empty (`make install CONSTRAINTS=`) takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
TORCH ?= $(if $(CONSTRAINTS),$(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(CONSTRAINTS)),torch)
# Processes that run tests side by side, each file in one of them.
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint .venv/constraints.txt --build-constraint build-constraints.txt
ALL_EXTRAS := all,test,browser,notebook,bench,dev

.PHONY: install install-full demo test test-full lint bench clean

install: .venv/installed
install-full: .venv/installed-full

# torch goes first and alone; the build that was taken (or was there already) is held from then on.
.venv/installed: pyproject.toml build-constraints.txt $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "pip>=25.3,<26.2"
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	sed '/^torch==/d' $(or $(CONSTRAINTS),/dev/null) > .venv/constraints.txt
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" >> .venv/constraints.txt
	$(PIP) --editable ".[test]"
	touch $@

.venv/installed-full: .venv/installed build-constraints.txt
	$(PIP) --editable ".[$(ALL_EXTRAS)]"
	touch $@

demo: .venv/installed
	$(BIN)/nasbench run experiments/quickstart.toml

test: .venv/installed
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

test-full: .venv/installed-full
	NASBENCH_ALL_EXTRAS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

lint: .venv/installed-full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy search_spaces hardware_profiles predictors nasbench benchmarks tools

bench: .venv/installed-full
	$(BIN)/python -m benchmarks.search_throughput
	$(BIN)/python -m benchmarks.engine_overhead
	$(BIN)/python -m benchmarks.crashes
	$(BIN)/python -m benchmarks.supernet_step
	$(BIN)/python -m benchmarks.supernet_step --space autoformer_tiny --resolution 128
	$(BIN)/python -m benchmarks.depthwise
	$(BIN)/python -m benchmarks.subnet_evaluation
	$(BIN)/python -m benchmarks.encoding
	test -z "$$NASBENCH_DATA" || $(BIN)/python -m benchmarks.proxies
	$(BIN)/python -m benchmarks.host_latency
	$(BIN)/python -m benchmarks.device_profiles
	$(BIN)/python -m benchmarks.calibration_intervals
	$(BIN)/python -m benchmarks.bind
	test -z "$$NASBENCH_DATA" || $(BIN)/python -m benchmarks.few_shot
	test -z "$$NASBENCH_DATA" || $(BIN)/python -m benchmarks.jetson_nano
	$(BIN)/python -m benchmarks.fidelity
	$(BIN)/python -m benchmarks.fidelity --space vit
	$(BIN)/python -m benchmarks.quality
	test -z "$$NASBENCH_DATA" || $(BIN)/python -m benchmarks.strategies
	$(BIN)/python -m benchmarks.limits
	$(BIN)/python -m benchmarks.differentiable
	$(BIN)/python -m benchmarks.compression
	$(BIN)/python -m benchmarks.exports
	$(BIN)/python -m benchmarks.on_device_memory
	$(BIN)/python -m benchmarks.sparse_update
	$(BIN)/python -m benchmarks.continual
	$(BIN)/python -m benchmarks.federated

clean:
	rm -rf .venv build *.egg-info
