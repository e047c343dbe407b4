PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test check slow engines soak audit clean

KILLS ?= 100

demo: .venv/ready
	$(BIN)/boomgen anonymize --dataset fashion-sample --t-boom 0.4 --out runs/demo
	$(BIN)/boomgen sweep --dataset fashion-sample --levels 0.2,0.4,0.6,0.8 --out runs/demo/picture.png

test: .venv/ready
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

slow: .venv/ready
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

engines: .venv/ready
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/engines

soak: .venv/ready
	$(BIN)/python -m tests.engines.soak --kills $(KILLS)

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: .venv/ready
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "boomgen needs Python 3.11 or newer; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv dist runs
