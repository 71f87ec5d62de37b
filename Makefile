# What a checkout can do; `make` alone lists it. Works with GNU make 3.81 and later and any POSIX sh.
PYTHON_GIVEN := $(filter-out undefined,$(origin PYTHON))
PYTHON ?= python3
TORCH ?= 2.13.0
ARGS ?=
MAKEFLAGS += --no-print-directory

# Inductor cannot compile with a torch that lies below a path with spaces: such a checkout reaches
# its .venv by a link without.
ifeq ($(words $(CURDIR)),1)
PY := .venv/bin/python
else
LINK := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fxquant/venv-$(shell pwd -P | cksum | tr ' ' -)
PY := $(LINK)/bin/python
endif

# pip compiles on one processor, half of its time; files of packages for other Pythons do not compile, and need not.
INSTALL = "$(PY)" -m pip install --quiet --disable-pip-version-check --no-compile -c .venv/constraints.txt
COMPILE = "$(PY)" -m compileall -qq -j 0 .venv/lib || true

.DEFAULT_GOAL := help
.PHONY: help venv venv-examples demo test examples docs lint types bench gpu runtimes clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo 'Options: PYTHON=$(PYTHON) (3.10 to 3.13)  TORCH=$(TORCH)  ARGS="..." for demo, test, bench, gpu'

venv: ## Make .venv, or bring it up to date
	@sh -c "$$MAKE_VENV"

venv-examples: venv ## Add to .venv what examples/ need: transformers, accelerate, peft, Lightning
	@$(INSTALL) -e ".[examples]"
	@$(COMPILE)

demo: venv ## Train, export and verify a small quantized model; writes build/demo
	@"$(PY)" -m fxquant demo $(ARGS)

test: venv ## Run the tests, e.g. make test ARGS="tests/passes -k fold"
	@"$(PY)" -m pytest -n 2 --dist worksteal $(ARGS)

examples: venv-examples ## Run all examples, and hold them to what docs/stacks.md shows
	@"$(PY)" -m pytest tests/test_examples.py $(ARGS)

docs: venv ## Build the site of docs/ into build/site; what it warns of is an error
	@$(INSTALL) -e ".[docs]"
	@NO_MKDOCS_2_WARNING=1 "$(PY)" -m mkdocs build --quiet --strict
	@echo "The site is build/site; python3 -m http.server -d build/site 8000 serves it on port 8000"

lint: venv ## Check the style with ruff
	@"$(PY)" -m ruff check .

types: venv ## Check the types with mypy
	@"$(PY)" -m mypy

# Small, so that it ends in minutes; ARGS in their place go to step and memory, whose options are the same.
BENCH := --nets cnn,transformer --dtypes fp32 --variants fxquant --steps 5

bench: venv ## Time, memory and compile of a QAT step, a table at the end; OUT=file keeps the rows
	@mkdir -p build && rm -f build/bench.jsonl
	@set -e; for subject in step memory; do echo "==> bench/bench_$$subject.py"; \
	  "$(PY)" "bench/bench_$$subject.py" $(or $(ARGS),$(BENCH)) --out build/bench.jsonl; \
	done
	@echo "==> bench/bench_compile.py"; "$(PY)" bench/bench_compile.py --out build/bench.jsonl
	@echo "==> All of it"; "$(PY)" bench/table.py build/bench.jsonl
	@[ -z "$(OUT)" ] || cat build/bench.jsonl >> "$(OUT)"

# DEVICE=cpu runs the same on the processor, on tiny sizes: a look whether it runs.
DEVICE ?= cuda

gpu: venv ## Tests and benches on a CUDA device, DEVICE=cpu to try them out; OUT=file keeps the rows
	@"$(PY)" -c 'import sys, torch; sys.exit(0 if "$(DEVICE)" == "cpu" or torch.cuda.is_available() else "error: \
	make gpu must find a CUDA device: torch " + torch.__version__ + " finds none. Install a torch with CUDA, or try \
	it out with make gpu DEVICE=cpu.")'
	"$(PY)" -m pytest tests/gpu --device $(DEVICE) $(ARGS)
	"$(PY)" bench/gpu/bench_gpu.py --device $(DEVICE) $(if $(filter cpu,$(DEVICE)),--tiny) $(if $(OUT),--out "$(OUT)")
	"$(PY)" bench/gpu/tensorrt_outputs.py --device $(DEVICE) \
	  $(if $(filter cpu,$(DEVICE)),--recipes int8 --dtypes float16) $(if $(OUT),--out "$(OUT).tensorrt")

runtimes: venv ## Files in versions of each runtime, native, in node and in a browser, each installed apart; OUT=file keeps the rows
	"$(PY)" bench/bench_versions.py $(ARGS) $(if $(OUT),--out "$(OUT)")

clean: ## Remove build outputs and caches (.venv stays)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fxquant passes tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Fresh means: .venv/stamp says what would be installed now. It is written last, and .venv/installing stands
# while an install runs, so an interrupted one is never taken for a whole one.
define MAKE_VENV
set -eu
say() { printf '==> %s\n' "$$*"; }
fail() { printf 'error: %s\n' "$$*" >&2; exit 1; }
describe='import importlib.util as u, sys
print("%d.%d" % sys.version_info[:2] + ("" if u.find_spec("pip") else " without pip"))
print(getattr(sys, "_base_executable", sys.executable))'
supported() { case "$$1" in 3.10|3.11|3.12|3.13) ;; *) return 1 ;; esac; }
head_of() { printf '%s\n' "$$1" | head -n 1; }

given=
if [ -n "$(PYTHON_GIVEN)" ]; then given=$$("$(PYTHON)" -c "$$describe" 2>/dev/null) || fail "PYTHON=$(PYTHON) does not run."; fi
made=$$(.venv/bin/python -c "$$describe" 2>/dev/null) || made=
made=$$(head_of "$$made")
wanted="torch $(TORCH), files $$(cat pyproject.toml constraints.txt Makefile | cksum | tr ' ' -)"

why=
if [ ! -e .venv ] && [ ! -L .venv ]; then why="there is none yet"
elif [ -e .venv/installing ]; then why="the last install was interrupted"
elif [ -z "$$made" ]; then why="the python in the one here does not run"
elif ! grep -qsF "$$(pwd -P)/.venv" .venv/bin/activate; then why="the one here was made in another place"
elif ! supported "$$made"; then why="the one here holds Python $$made"
elif [ -n "$$given" ] && [ "$$(head_of "$$given")" != "$$made" ]; then why="the one here holds Python $$made, not that of PYTHON=$(PYTHON)"
elif [ -e .venv/stamp ] && [ "$$(cat .venv/stamp)" = "$$wanted" ]; then
  if [ -z "$(LINK)" ] || [ "$(LINK)" -ef .venv ]; then exit 0; fi
fi

if [ -n "$$why" ]; then
  python=$${given:-$$("$(PYTHON)" -c "$$describe" 2>/dev/null)} || fail "$(PYTHON) does not run; name a Python 3.10 to 3.13, e.g. make venv PYTHON=python3.12."
  version=$$(head_of "$$python"); version=$${version%% *}
  supported "$$version" || fail "fxquant needs Python 3.10 to 3.13: got $$version ($$(command -v "$(PYTHON)")). Name another, e.g. make venv PYTHON=python3.12."
  base=$$(printf '%s\n' "$$python" | tail -n 1)
  say "Making .venv with Python $$version ($$why)"
  rm -rf .venv
  mkdir .venv
  : > .venv/installing
  "$$base" -m venv .venv
fi
: > .venv/installing
rm -f .venv/stamp
if [ -n "$(LINK)" ]; then mkdir -p "$$(dirname "$(LINK)")"; ln -sfn "$$(pwd -P)/.venv" "$(LINK)"; fi
{ grep -v '^torch==' constraints.txt; echo "torch==$(TORCH)"; } > .venv/constraints.txt
say "Installing torch $(TORCH) (the large one: a minute or more)"
$(INSTALL) "torch==$(TORCH)"
say "Installing fxquant and its tools"
$(INSTALL) -e ".[dev]"
$(COMPILE)
printf '%s\n' "$$wanted" > .venv/stamp
rm -f .venv/installing
say ".venv is ready"
endef
export MAKE_VENV
