# Everything here starts from python3 (3.11 or newer) and make; the first target sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed
RTX_STAMP := $(VENV)/.rtx-tried
RTX := 1.7.1.116
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint rtx clean

demo: $(STAMP)
	@mkdir -p demo
	cd demo && $(BIN)/gaq-export calibrate --model ddpm-mnist --wbits 4 --abits 8
	cd demo && $(BIN)/gaq-export build-engine
	cd demo && $(BIN)/gaq-export sample --engine unet.plan --compare
	@echo "The pictures, float model above engine: $(CURDIR)/demo/samples/grid.png"

test: $(STAMP) $(RTX_STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

rtx: $(STAMP)
	$(PIP) tensorrt_rtx_cu13_bindings==$(RTX) tensorrt_rtx_cu13_libs==$(RTX)
	$(PIP) --no-deps tensorrt_rtx_cu13==$(RTX)
	@touch $(RTX_STAMP)

clean:
	rm -rf $(VENV) demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	@touch $@

# The wheels are several hundred megabytes and not to be had everywhere; without them the rtx tests skip.
$(RTX_STAMP): $(STAMP)
	@$(MAKE) --no-print-directory rtx >/dev/null 2>&1 \
		|| echo "TensorRT-RTX could not be installed; its tests will be skipped ('make rtx' shows why)."
	@touch $@
