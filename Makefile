# Each target sets up what it needs in a virtual environment of its own, once:
#   make quickstart                  index, train, evaluate, answer and report on the CIA World Factbook
#   make test PYTHON=python3.13      with another Python

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin
PACKAGES := $(VENV)/lib/python$(VERSION)/site-packages
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
# uv installs in seconds what takes pip minutes; pip does it where uv cannot, as with an index that pip alone knows
INSTALL = { $(PIP) uv && $(BIN)/uv pip install -q --python $(BIN)/python -e '$(WHAT)'; } 2>/dev/null || $(PIP) -e '$(WHAT)'
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q
TWO_AT_A_TIME := -n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
CHANGED_SINCE ?= main

# glibc puts large arrays on huge pages: less time goes into page faults.
quickstart bench: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# what one process has imported need not be compiled by the next
unexport PYTHONDONTWRITEBYTECODE
# Compiling takes and frees much memory: what is kept need not be fetched again page by page.
test test-changed test-other-with test-slow: export GLIBC_TUNABLES ?= glibc.malloc.trim_threshold=2000000000:glibc.malloc.top_pad=67108864:glibc.malloc.mmap_threshold=1000000000

.PHONY: environment other-environment other-environment-of quickstart test test-changed test-other test-slow test-torch test-browser test-tpu soak lint bench docs clean

quickstart: $(VENV)/ragjax
	$(BIN)/ragjax index configs/factbook.yaml
	$(BIN)/ragjax train configs/factbook.yaml
	$(BIN)/ragjax evaluate configs/factbook.yaml
	$(BIN)/ragjax answer configs/factbook.yaml "What is the capital of France?"
	$(BIN)/ragjax report runs/factbook

test: $(VENV)/dev
	$(PYTEST) $(TWO_AT_A_TIME)

# the tests of what differs from main (CHANGED_SINCE=HEAD~1: from another commit)
test-changed: $(VENV)/dev
	@tests=$$(.ci/changed-tests $(CHANGED_SINCE)) && if [ -n "$$tests" ]; then $(PYTEST) $(TWO_AT_A_TIME) $$tests; fi

# resuming, the golden values and a training step, with another Python and so with the other end of JAX's versions
test-other:
	@other=$$(.ci/other-python $(VERSION)) || { echo "test-other: no other Python was found: left out"; exit 0; }; \
	$(MAKE) --no-print-directory test-other-with PYTHON=$$other

test-other-with: $(VENV)/dev
	$(PYTEST) -n 2 --devices 1 -m 'other_python and not slow'

test-slow: $(VENV)/dev
	$(PYTEST) -n 2 --max-worker-restart 0 --dist worksteal -m slow --ignore tests/serving/test_browser.py

test-torch: $(VENV)/dev
	$(PIP) -e '.[dev,torch]'
	$(PYTEST) -n 2 tests/commands/test_hf_live.py

# with Debian's chromium (apt-get install chromium), or else playwright's own, which is fetched
test-browser: $(VENV)/tools
	command -v chromium >/dev/null || $(BIN)/python -m playwright install chromium
	$(PYTEST) -m slow tests/serving/test_browser.py

# in an environment of its own, which sees all of the other: where the TPU's library is, JAX looks for a TPU
test-tpu: $(VENV)/dev
	@$(PYTHON) -m venv $(VENV)-tpu
	@echo "import site; site.addsitedir('$(CURDIR)/$(PACKAGES)')" >$(VENV)-tpu/lib/python$(VERSION)/site-packages/dev.pth
	@$(VENV)-tpu/bin/python -m pip install -q --disable-pip-version-check 'jax[tpu]'
	JAX_PLATFORMS=cpu $(VENV)-tpu/bin/python -m pytest -q -n 2 --dist worksteal -m slow tests/planning/test_tpu.py

soak: $(VENV)/dev
	$(BIN)/python tests/helpers/soak.py --kills 120 --devices 1
	$(BIN)/python tests/helpers/soak.py --kills 40 --processes 2
	$(BIN)/python tests/helpers/soak.py --interrupts 200
	$(BIN)/python tests/helpers/damage.py

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh
	$(BIN)/hadolint launch/Dockerfile
	$(BIN)/yamllint --strict launch configs
	$(BIN)/python .ci/jobs-of launch/jobset.yaml >$(VENV)/jobs.yaml
	$(BIN)/kubernetes-validate --strict $(VENV)/jobs.yaml

bench: $(VENV)/dev
	$(PIP) -e '.[dev,bench]'
	$(BIN)/python -m benchmarks.hugging_face --model bart-small --folder runs/bench
	$(BIN)/python -m benchmarks.hugging_face --model bart-base --folder runs/bench
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.index
	$(BIN)/python -m benchmarks.building --count 1000000 --kind IVF1024,PQ16
	$(BIN)/python -m benchmarks.growing --words 30 --tokens 32 --batch-size 32
	$(BIN)/python -m benchmarks.takeover
	$(BIN)/ragjax index configs/factbook.yaml
	$(BIN)/python -m benchmarks.starting configs/factbook.yaml --folder runs/bench
	$(BIN)/python -m benchmarks.encoding configs/factbook.yaml --folder runs/bench
	$(BIN)/python -m benchmarks.training configs/factbook.yaml train.num_docs=8 --through 2 --folder runs/bench
	$(BIN)/python -m benchmarks.answering configs/factbook.yaml decode.num_docs=10 decode.num_beams=5 --torch --compare 180 --folder runs/bench
	$(BIN)/python -m benchmarks.passage_cache configs/factbook.yaml --folder runs/bench
	for k in 5 10 50; do $(BIN)/python -m benchmarks.exactness configs/factbook.yaml decode.num_beams=5 \
	  decode.probability=interval --documents $$k --record runs/bench/exactness.json || exit 1; done
	$(BIN)/python -m benchmarks.exactness --draw runs/bench/exactness.svg --record runs/bench/exactness.json
	$(BIN)/python -m benchmarks.zero_shot

# the site, docs/_build/html/index.html; a warning is an error
docs: $(VENV)/tools
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html

# all that the targets need, but for torch and the TPU's compiler; and the other Python's
environment: $(VENV)/tools

other-environment:
	@other=$$(.ci/other-python $(VERSION)) || exit 0; $(MAKE) --no-print-directory other-environment-of PYTHON=$$other

other-environment-of: $(VENV)/dev

clean:
	rm -rf .venv-* .pytest_cache .mypy_cache .ruff_cache *.egg-info dist docs/_build docs/configuration_reference.md docs/exactness.svg
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/ragjax: WHAT := .
$(VENV)/dev: WHAT := .[dev]
$(VENV)/tools: WHAT := .[browser,docs,lint]

$(VENV)/ragjax: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=…")'
	@echo "Installing into $(VENV) (once) …"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL)
	@touch $@

$(VENV)/dev: $(VENV)/ragjax
	@$(INSTALL)
	@touch $@

$(VENV)/tools: $(VENV)/dev
	@$(INSTALL)
	@touch $@
