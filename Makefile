# Everything here starts from python3 (3.11 or newer) and make; the first target sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed
RTX_STAMP := $(VENV)/.rtx-tried
DOCS_STAMP := $(VENV)/.docs-installed
RTX := 1.7.1.116
# Where no package index answers, the folder WHEELS is all there is.
NO_INDEX := $(if $(WHEELS),$(shell $(PYTHON) -m pip index versions pip --retries 0 --timeout 5 >/dev/null 2>&1 \
	|| echo --no-index))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	$(addprefix --find-links ,$(WHEELS)) $(NO_INDEX)

.PHONY: demo test lint docs rtx gpu-check gpu-check-here gpu-check-bare kernels clean

demo: $(STAMP)
	@mkdir -p demo
	cd demo && $(BIN)/gaq-export calibrate --model ddpm-mnist --wbits 4 --abits 8
	cd demo && $(BIN)/gaq-export build-engine
	cd demo && $(BIN)/gaq-export sample --engine unet.plan --compare
	@echo "The pictures, float model above engine: $(CURDIR)/demo/samples/grid.png"

test: $(STAMP) $(RTX_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "The site: $(CURDIR)/site/index.html"

rtx: $(STAMP)
	$(PIP) tensorrt_rtx_cu13_bindings==$(RTX) tensorrt_rtx_cu13_libs==$(RTX)
	$(PIP) --no-deps tensorrt_rtx_cu13==$(RTX)
	@touch $(RTX_STAMP)

# On a machine with an NVIDIA GPU; elsewhere it says "not run". WHEELS may name a folder of wheels to install from, ARGS
# holds options of benchmarks/gpu_check.py. The packages have a .venv of their own, since onnxruntime-gpu takes the place
# of onnxruntime.
gpu-check: $(STAMP)
	@if $(BIN)/python -c 'import sys; from engines.driver import no_gpu; sys.exit(no_gpu() is not None)'; then \
		$(MAKE) --no-print-directory VENV=.venv-gpu gpu-check-here; \
	else \
		$(BIN)/python benchmarks/gpu_check.py $(ARGS); \
	fi

gpu-check-here: $(STAMP) $(RTX_STAMP)
	$(BIN)/python -m pip uninstall --quiet --yes onnxruntime
	-$(PIP) onnxruntime-gpu || $(PIP) onnxruntime
	-$(PIP) tensorrt
	-$(PIP) pycuda
	-$(PIP) cuda-bindings
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

# The same with the packages that PYTHON already has, and the wheels in WHEELS that fit it, as they are: for a machine
# with a PyTorch of its own and no network. This project is not installed.
BARE := .venv-gpu-bare
gpu-check-bare:
	$(PYTHON) -m venv --clear --without-pip --system-site-packages $(BARE)
	@$(PYTHON) -c 'import site; print(*site.getsitepackages(), sep="\n")' \
		> $$($(BARE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth
	@for wheel in $(wildcard $(addsuffix /*.whl,$(WHEELS))); do \
		$(PYTHON) -m pip --python $(BARE)/bin/python install --quiet --disable-pip-version-check \
			--no-index --no-deps --ignore-installed $$wheel || echo "left out: $$wheel"; \
	done
	PYTHONPATH=$(CURDIR) $(BARE)/bin/python benchmarks/gpu_check.py $(ARGS)

# The GPU's kernels; needs nvcc. Nothing in them is newer than PTX 7.0, so older drivers may load them too.
kernels:
	nvcc -ptx -arch=compute_75 engines/philox.cu -o engines/philox.ptx
	sed -i 's/^\.version .*/.version 7.0/' engines/philox.ptx

clean:
	rm -rf $(VENV) .venv-gpu $(BARE) demo dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps clean-fid torch-fidelity
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) -e '.[docs]'
	@touch $@

# The wheels are several hundred megabytes and not to be had everywhere; without them the rtx tests skip.
$(RTX_STAMP): $(STAMP)
	@$(MAKE) --no-print-directory rtx >/dev/null 2>&1 \
		|| echo "TensorRT-RTX could not be installed; its tests will be skipped ('make rtx' shows why)."
	@touch $@
