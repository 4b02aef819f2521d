# make setup | demo | test | check | slow | bench | picture   -- each does all the set-up it needs, in .venv of this clone.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: setup demo test check format lint types contracts slow bench picture clean

setup: $(STAMP)

# uv when it can be had and works here, pip otherwise: same constraints, same result.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv || true
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]' || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/bitmill demo

test: setup
	$(BIN)/pytest -n 2 --dist loadgroup -m "not slow and not gpu"

check: format lint types contracts test

format: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

slow: setup
	$(BIN)/pytest -m slow

bench: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[bench]' || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	for name in $(filter-out benchmarks/one_core.py,$(wildcard benchmarks/*.py)); do $(BIN)/python "$$name" || exit 1; done

# The numbers, the picture and all that commands answer in the documentation, measured anew: a quarter of an hour.
picture: setup
	mkdir -p build
	$(BIN)/python benchmarks/allocation_table.py --format t7_4@32:signmax-search:e4m3 --bits 3 3.5 4 4.5 5 > build/allocation.jsonl
	mv build/allocation.jsonl docs/images/allocation.jsonl
	$(BIN)/python docs/draw.py
	$(BIN)/python docs/rate_distortion.py --measure
	$(BIN)/python docs/layer_distortion.py --measure
	$(BIN)/python docs/examples.py --slow

clean:
	rm -rf .venv build dist *.egg-info
