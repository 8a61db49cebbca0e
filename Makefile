# Every target does the set-up that it needs: a virtual environment in .venv, installed from constraints.txt.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo picture space test coverage check lint types layers format bench quality docs dist fuzz hostile zoo consumers soak \
	constraints clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Three workers on two cores: tests wait for disks and processes a seventh of the time. One thread each, or the libraries'
# thread pools fight. A worker that has nothing left takes tests from the others.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS ?= 3
COUNT ?= 10000000
CPU ?= native

help:
	@echo "make demo    quantize a real trained model and show that it still works"
	@echo "make test    lint, types, layers and tests (also: make check; CPU=portable tests as if without AVX-512)"
	@echo "make coverage  which lines the tests run, in the processes that they start, too (TESTS=tests/test_cli.py for some)"
	@echo "make bench   the figures of benchmarks/README.md, on this machine"
	@echo "make quality how good the 4-bit checkpoints are: trained models against their originals"
	@echo "make space   the page in space/ in a real browser, against the tests' Hub"
	@echo "make picture docs/terminal.svg, drawn from a real session"
	@echo "make docs    the generated reference, every link checked, and the site in site/"
	@echo "make dist    wheel, sdist and release notes in dist (TAG=v1.2.3 checks that this is the version)"
	@echo "make fuzz    ten million malformed headers, against safetensors' own reader (COUNT=n for fewer), and other files"
	@echo "make hostile the memory of commands that are given what is malformed or made to fill it (HOSTILE='--part 1/8' for some)"
	@echo "make zoo     every model class of the libraries, built tiny, and docs/reference/models.md (goes on where it stopped)"
	@echo "make consumers  what vLLM, SGLang, InvokeAI and unsloth read of an output, and docs/reference/consumers.md"
	@echo "make soak    minutes of kills and failures against the writer, and every model with every method"
	@echo "make format  let ruff lay out the code"
	@echo "make clean   remove what the other targets made"

# torch first and by its exact version: asked for by a range, it may bring another build with gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qz needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH) -c constraints.txt
	$(PIP) install --quiet -e ".[dev]" -c constraints.txt
	@touch $@

demo: $(READY)
	$(BIN)/python demo/demo.py

# Not by the pins: gradio wants another Pillow. It needs Chromium (apt install chromium); pictures are left in .space.
space: $(READY)
	$(PIP) install --quiet -e ".[space]"
	mkdir -p .space
	$(PYTEST) tests/space --timeout=300

picture: $(READY)
	$(BIN)/python demo/picture.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" jactionlint -c .github/jactionlint.yaml .github/workflows/*.yml action.yml

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

test: lint types layers
	QZ_TEST_CPU=$(CPU) $(PYTEST) -n $(WORKERS) --dist worksteal -m "not fuzz and not soak"

# TESTS names some of them. Without the tests of what a command imports, which is coverage, too. See CONTRIBUTING.md.
coverage: $(READY)
	$(BIN)/python -m coverage erase
	-QZ_TEST_CPU=$(CPU) $(subst -m pytest,-m coverage run -m pytest,$(PYTEST)) -n $(WORKERS) --dist worksteal -m "not fuzz and not soak" \
		--deselect tests/test_start_up.py $(TESTS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

check: test

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks

quality: $(READY)
	$(BIN)/python -m benchmarks.quality

docs: $(READY)
	$(BIN)/python docs/build.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

dist: $(READY)
	$(PIP) install --quiet -e ".[release]" -c constraints.txt
	rm -rf dist build
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/python .github/release.py $(TAG) > dist/notes.md
	@ls -l dist

fuzz: $(READY)
	$(BIN)/python tests/fuzz_headers.py --count $(COUNT)
	$(BIN)/python tests/fuzz_files.py --seconds 60

hostile: $(READY)
	$(BIN)/python tests/hostile_memory.py $(HOSTILE)

zoo: $(READY)
	$(PIP) install --quiet -e ".[zoo]" -c constraints.txt
	PYTHONPATH=tests PYTHONHASHSEED=0 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 QZ_CACHE= $(BIN)/python -m whole_zoo --page

consumers: $(READY)
	cd tests && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 QZ_CACHE= $(abspath $(BIN))/python -m real_consumers $(abspath .consumers)

soak: $(READY)
	$(PYTEST) -m soak --timeout=0

# New pins: the newest versions that pyproject.toml allows, with torch held at its pin (TORCH=torch==x.y.z moves it).
constraints:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet -e ".[dev,zoo]" $(TORCH)
	{ sed -n '/^#/p' constraints.txt; $(PIP) freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//; s/ @ .*//'; } > constraints.new
	mv constraints.new constraints.txt
	touch $(READY)

clean:
	rm -rf $(VENV) .zoo .consumers .demo .bench .space build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
