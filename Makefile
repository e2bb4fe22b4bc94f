# `make demo` and `make test` are all a newcomer needs; both set up .venv first when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
WHEEL_READY := .venv-wheel/ready
# Small networks gain nothing from more threads, and two processes with two threads each on two cores wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1
# Most of what is installed is never imported; Python compiles the rest when it is.
INSTALL := pip install --quiet --no-compile

.PHONY: demo test pytest notebooks lab docs docs-serve readme notebooks-in-step wheel clean

demo: $(READY)
	$(BIN)/ader_demo $(ARGS)

# An installation mostly waits for the disk: both at once. Then a core for the notebooks, and one for the tests.
test:
	@$(MAKE) --no-print-directory --jobs 2 $(READY) $(WHEEL_READY)
	@$(MAKE) --no-print-directory notebooks-in-step
	@$(MAKE) --no-print-directory --jobs 2 WORKERS=1 notebooks pytest wheel

pytest: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest -q tests

WORKERS ?= 2
notebooks: $(READY)
	$(ONE_THREAD) $(BIN)/nbdev_test --n_workers $(WORKERS) --do_print

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir nbs nbs/index.ipynb

# The site in _docs/, with quarto when it is on the PATH, else with smalldocs.
docs: $(READY)
	$(BIN)/python .ci/site.py

PORT ?= 8000
docs-serve: docs
	@echo "the site is at http://127.0.0.1:$(PORT)/ (another port: make docs-serve PORT=8001); stop with Ctrl-C"
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs $(PORT)

$(READY): settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/$(INSTALL) --upgrade pip
	$(BIN)/$(INSTALL) --editable '.[dev]'
	$(BIN)/$(INSTALL) --no-deps 'torchattacks>=3.5' # for ader_bench alone; its own requirements pin an old requests
	touch $@

# Exporting and cleaning again must change nothing, and README.md must be what index.ipynb says.
notebooks-in-step: $(READY)
	sh .ci/in-step $(BIN)

readme: $(READY)
	sh .ci/readme $(BIN)

# What a user gets: the built wheel in an environment of its own, with the newest of every dependency.
$(WHEEL_READY): settings.ini setup.py
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/$(INSTALL) --upgrade pip
	mkdir .venv-wheel/source && cp -r ader settings.ini setup.py README.md .venv-wheel/source # nobody else builds there
	.venv-wheel/bin/$(INSTALL) .venv-wheel/source
	touch $@

wheel: $(WHEEL_READY)
	rm -rf dist
	.venv-wheel/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	.venv-wheel/bin/$(INSTALL) --no-deps --force-reinstall dist/*.whl
	cd dist && $(ONE_THREAD) ../.venv-wheel/bin/ader_teach --epochs 1 --images 100
	cd dist && $(ONE_THREAD) ../.venv-wheel/bin/ader_evaluate teacher --images 20

clean:
	rm -rf .venv .venv-wheel dist build *.egg-info _docs _proc
