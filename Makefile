# Every target makes the virtual environment and installs what it needs, once; the second time that takes a second.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
ARCHS ?= 90a;80
FAMILIES ?= engine_cpu
MARKS ?= not slow
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET := 1
# Python compiles what is imported, at its first import; pip would compile all of torch's and transformers' files.
export PIP_COMPILE := 0
# Tests start some hundred processes, each of which would compile our sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run test cuda lint bench docs clean

help: ## what there is
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

run: $(STAMPS)/package ## a real model answers three questions at once
	$(BIN)/python -m fastattn run smollm2 --max-tokens 96 --temperature 0 "What is photosynthesis?" \
	  "What is the capital of France?" "What is gravity?"

test: $(STAMPS)/test ## the test suite; GPU tests are skipped where there is no GPU. MARKS= runs the slow ones too
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "$(MARKS)" tests

cuda: $(STAMPS)/build ## compile every CUDA source (no GPU needed) and hold the result against tools/check_*.py
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DFASTATTN_CUDA=ON -DFASTATTN_RUNTIME=OFF "-DFASTATTN_CUDA_ARCHS=$(ARCHS)" \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DFASTATTN_OUTPUT_DIR=$(abspath build/cuda/lib) \
	  -DFASTATTN_TORCH_INCLUDE=$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')/include
	$(BIN)/cmake --build build/cuda >> build/cuda/build.log 2>&1 || { grep -iE "error *:|fatal|FAILED" build/cuda/build.log | tail -50; exit 1; }
	$(BIN)/python tools/check_ptxas.py build/cuda/build.log
	$(BIN)/python tools/check_abi.py build/cuda/lib/_C.so

lint: $(STAMPS)/lint $(STAMPS)/test ## ruff, mypy --strict, import-linter, clang-format
	$(BIN)/ruff check bench examples fastattn tests tools setup.py
	$(BIN)/ruff format --check bench examples fastattn tests tools setup.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files csrc 'tests/emulator/*.h' 'tests/emulator/*.cpp' 'tests/emulator/*.cuh')

bench: $(STAMPS)/test ## check and time FAMILIES (default: engine_cpu; python -m bench --list names them all)
	$(BIN)/python -m bench $(FAMILIES)

docs: $(STAMPS)/docs ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(STAMPS)/build: requirements/torch.txt requirements/build.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements/torch.txt -r requirements/build.txt
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/package: $(STAMPS)/build pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/runtime/*)
	$(BIN)/python -m pip install --no-build-isolation -e .
	@touch $@

# The package is there, and what an extra wants is in its metadata: `-e .` again would compile the runtime again.
$(STAMPS)/test: $(STAMPS)/package
	$(BIN)/python -m pip install "fastattn[test]"
	@touch $@

$(STAMPS)/lint: $(STAMPS)/build
	$(BIN)/python -m pip install clang-format==23.1.5 import-linter==2.16 mypy==2.4.1 ruff==0.17.6
	@touch $@

$(STAMPS)/docs: $(STAMPS)/package
	$(BIN)/python -m pip install "fastattn[docs,server]"
	@touch $@

clean: ## remove what was built, and the virtual environment
	rm -rf build dist *.egg-info $(VENV) fastattn/_runtime*.so fastattn/_C.so
