# Everything a newcomer needs: make demo, make test. CI calls make check test.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# Spinning OpenMP threads on shared cores cost up to 90x.
export OMP_WAIT_POLICY = PASSIVE

# Two processes, each file's tests in one of them, which share its fixtures.
WORKERS = -n 2 --dist loadfile

DEMO = demo
SAMPLE = sample_slides/tissue_mpp0.25.svs

.PHONY: demo test check test-all wheel bench bench-recovery format clean

demo: $(VENV)/ready
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(BIN)/wsiscale estimate $(SAMPLE) --json > $(DEMO)/estimate.json
	@$(BIN)/python -c "import json; e = json.load(open('$(DEMO)/estimate.json')); print('best at {:.3g} µm/px, 90 % within {:.3g} to {:.3g}'.format(e['mpp'], *e['ci90']))"
	$(BIN)/wsiscale tile $(SAMPLE) --mpp auto -o $(DEMO)/tissue.ome.zarr
	@echo "the estimate: $(DEMO)/estimate.json"
	@echo "the tissue at that magnification: $(DEMO)/tissue.ome.zarr"

test: $(VENV)/ready-test
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: $(VENV)/ready-test
	$(BIN)/python -m pytest $(WORKERS)

check: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# build/ first: setuptools would put files into the wheel that an earlier build left there.
wheel: $(VENV)/ready-test
	rm -rf build dist
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist .

bench: $(VENV)/ready-test
	$(BIN)/python -m benchmarks.performance

# Hours from nothing; what it measured once it keeps (benchmarks/README.md).
bench-recovery: $(VENV)/ready-test
	$(BIN)/python -m benchmarks.recovery

format: $(VENV)/ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

# --no-compile halves pip's time; --prefer-binary keeps old pips from building from source.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e .
	@touch $@

$(VENV)/ready-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/ready
