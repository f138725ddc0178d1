VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLAIM ?=
SIZE ?= small
MUTANTS ?=
TWO := --numprocesses 2 --dist loadfile
PROGRAMS := chromium redis-server

.PHONY: demo demo-full test test-long test-programs screenshots lint mutants bench clean

demo: $(STAMP)
	$(BIN)/tvilfm run --size $(SIZE)

demo-full: $(STAMP)
	$(BIN)/tvilfm run --size small run.name=demo-full caption.source=finetuned

# Two files at a time, each with a Ray of its own: a job starts processes one after the other and uses one core of two.
test: $(STAMP)
	$(BIN)/python -m pytest tests/unit $(TWO)
	$(BIN)/python -m pytest tests/jobs $(TWO)

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long $(TWO)

# The images of the page in docs/img, from the run of `make demo`.
screenshots: $(STAMP)
	TVILFM_SCREENSHOTS=docs/img $(BIN)/python -m pytest -m long tests/jobs/serve/test_serve_command.py -k page_of_the_demo

# A browser and a Redis, which pip does not have; tests that need one are skipped without it. Debian, as root.
test-programs:
	which $(PROGRAMS) >/dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends $(PROGRAMS); }

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.words

# Changes the formulas one operation at a time and lists the changes that no test notices; of all, half an hour on two
# cores. For one module: make mutants MUTANTS='tvilfm.losses*'
mutants: $(STAMP)
	$(BIN)/mutmut run --max-children 2 $(if $(MUTANTS),'$(MUTANTS)')

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(CLAIM)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build mutants *.egg-info
