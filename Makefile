# `make quickstart` and `make test` install what they need: the first no tools of development. `make help` lists all targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
GPU_CHECK ?=
AUDIT ?=
TRACK3 ?=
STUDIES ?=
MINUTES ?=

.PHONY: help setup quickstart check product-lint unit test test-full test-gpu gpu-check docs results docs-check lint format bench certify audit faults study studies reconstruct memorization lock sbom vulnerabilities clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

LOCKS := requirements-torch.txt requirements.lock requirements-dev.lock requirements-oracles.lock

$(VENV)/.installed: $(LOCKS) pyproject.toml .ci/install.py
	$(PYTHON) .ci/install.py $(VENV) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	@touch $(VENV)/.runtime $@

# What training and reports need: without tools, tests and oracles.
$(VENV)/.runtime: $(LOCKS) pyproject.toml .ci/install.py
	$(PYTHON) .ci/install.py $(VENV) --runtime $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	@touch $@

# Tools of releases and of the documentation have their own environments: their dependencies must not decide ours.
TOOLS := $(VENV)-tools
$(TOOLS)/.installed: requirements-tools.lock
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip --disable-pip-version-check install --quiet --require-hashes --no-deps -r requirements-tools.lock
	@touch $@

DOCS := $(VENV)-docs
$(DOCS)/.installed: requirements-docs.lock
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip --disable-pip-version-check install --quiet --require-hashes --no-deps -r requirements-docs.lock
	@touch $@

setup: $(VENV)/.installed ## create the virtual environment .venv from the lock files (pip checks every hash)

quickstart: $(VENV)/.runtime ## train SUMO, GaLore, Muon and AdamW on real text with 2 processes each; write runs/quickstart/report.html
	$(BIN)/optbench compare adamw muon galore sumo preset=quickstart seeds=1 group=quickstart

check: setup ## run ruff, basedpyright on the product and the tests that start no processes, side by side (90 seconds on 2 cores)
	$(MAKE) --no-print-directory --output-sync -j 2 product-lint unit

product-lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error optimizers harness analysis

unit: setup ## run the tests of tests/unit.txt: files that start no processes and take milliseconds a test
	$(BIN)/python -m pytest -q -m "not slow and not launch and not browser" @tests/unit.txt

# One test process more than cores: one of them waits for Slurm, others for programs that they have started.
test: setup ## run the tests (about 14 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow" -n 3 --no-loadscope-reorder

test-full: setup ## run all tests, including the slow ones
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder

test-gpu: setup ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

gpu-check: setup ## prove on one GPU what CPUs cannot, in 12 minutes at most; rewrite the tables of docs/gpu.md
	$(BIN)/python -m benchmarks.gpu_check --docs docs/gpu.md $(GPU_CHECK)

docs: $(DOCS)/.installed ## build the documentation and the API reference into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

results: setup ## compute docs/RESULTS.md from docs/results/; STUDIES=FOLDER first reads our run folders there, TRACK3=FOLDER the logs of track 3
	$(BIN)/python -m analysis.results $(if $(STUDIES),--studies $(STUDIES)) $(if $(TRACK3),--track3 $(TRACK3))

docs-check: setup ## test the commands, links, examples and pictures of the documentation
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_notebook.py tests/optimizers/test_use_elsewhere.py

lint: setup ## run ruff and basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error

format: setup ## format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure the ratios of docs/benchmarks.md
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.harness_overhead optimizer=adamw
	$(BIN)/python -m benchmarks.harness_overhead optimizer=sumo
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.step_mask
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.traffic
	$(BIN)/python -m benchmarks.layouts
	$(BIN)/python -m benchmarks.polar
	$(BIN)/python -m benchmarks.rooflines
	$(BIN)/python -m benchmarks.checkpoint

faults: setup ## test kills, damage, signals, full disks and hanging ranks, including the long tests (about 20 minutes)
	$(BIN)/python -m pytest tests/faults

certify: setup ## certify every optimizer on every engine; write docs/certificates.md and the shipped table (15 minutes)
	$(BIN)/optbench certify --include-controls --include-peers --out runs/certificates
	cp runs/certificates/certificates.md docs/certificates.md
	cp runs/certificates/certificates.json harness/record/certificates.json

audit: setup ## audit every optimizer of torch, pytorch_optimizer and others on every engine; write docs/audit.md (goes on where it ended)
	$(BIN)/python -m benchmarks.audit_catalogue $(AUDIT)

study: setup ## tune the quickstart's four optimizers with equal budgets, then compare on fresh seeds (32 to 40 runs)
	$(BIN)/optbench sweep study=quickstart group=study

studies: setup ## run the studies of docs/RESULTS.md (4 to 5 hours on 2 cores; MINUTES=60 stops after an hour; goes on where it ended), then the page
	$(BIN)/python -m analysis.results.studies --runs $(or $(STUDIES),runs/studies) $(if $(MINUTES),--minutes $(MINUTES))
	$(BIN)/python -m analysis.results --studies $(or $(STUDIES),runs/studies)

reconstruct: setup ## reconstruct training images from weights: a network in closed form, then 6 victims at 3 checkpoints each and 81 attacks (5 to 10 minutes)
	$(BIN)/optbench reconstruct mode=fixture out=runs/reconstruction/fixture
	$(BIN)/optbench reconstruct experiment=reconstruct_digits out=runs/reconstruction/digits

memorization: setup ## train AdamW, Muon, GaLore and SUMO at three ranks on text with canaries, tuned alike, six seeds; compare what they memorize (1.6 CPU hours, 5 GB; resumable)
	$(BIN)/optbench sweep study=memorization group=memorization
	$(BIN)/optbench memorize runs/memorization

lock: $(TOOLS)/.installed ## rewrite the lock files from pyproject.toml; UPGRADE=--upgrade takes newer versions
	$(TOOLS)/bin/python .ci/lock.py $(UPGRADE)

sbom: setup $(TOOLS)/.installed ## write a CycloneDX bill of materials of the environment: dist/sbom.json
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --of JSON -o dist/sbom.json

vulnerabilities: $(TOOLS)/.installed ## compare the locked versions with the public advisories (needs the network)
	$(TOOLS)/bin/pip-audit --disable-pip --require-hashes -r requirements.lock -r requirements-dev.lock

clean: ## remove the virtual environments
	rm -rf $(VENV) $(TOOLS) $(DOCS)
