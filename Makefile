# Everything a fresh machine needs:  make demo  (the whole pipeline on the embedded data)  and  make test.
# Both make the virtual environment .venv from the locked, hashed requirements first; a second call installs nothing.
# Another interpreter: make install PYTHON=python3.12

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help install demo test fuzz lock check-lock clean

# Relative, so that the folder's own path may contain blanks.
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10
# `dvc` starts the stages as `python stages/...`, which must be the one of the environment.
WITH_VENV := PATH="$$PWD/$(VENV)/bin:$$PATH"
PIP := $(RUN) -m pip --disable-pip-version-check

help:
	@echo "make demo        install, run the whole pipeline on the embedded data, say where the report is"
	@echo "make test        install, run the tests"
	@echo "make fuzz        install, give CASES=20000 damaged files (SEED=0) to every reader, kill extraction, fill disks"
	@echo "make install     make .venv with the locked packages (PYTHON=... chooses the interpreter, 3.10 to 3.13)"
	@echo "make lock        compile the locks anew from pyproject.toml (needs the network)"
	@echo "make check-lock  check that the locks satisfy pyproject.toml (offline)"
	@echo "make clean       remove byte-code and test caches; results, checkpoints and .venv stay"

install: $(STAMP)

$(RUN):
	@suits='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); do \
	    if "$$candidate" -c "$$suits" >/dev/null 2>&1; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "No Python 3.10 to 3.13 found (tried: $(or $(PYTHON),$(CANDIDATES)))." >&2; \
	    echo "Install one (python.org, your system's packages, conda), then:" >&2; \
	    echo "    make install PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$found has no venv module; an administrator of Debian or Ubuntu installs it with:" >&2; \
	    echo "    apt-get install python3-venv" >&2; \
	    exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv $(VENV)

# Order-only: the interpreter's own date must not make the stamp old.
$(STAMP): requirements.lock requirements-headless.lock pyproject.toml | $(RUN)
	@echo "Installing the locked packages into $(VENV) (torch and its GPU libraries: 7 GB of disk)"
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(RUN) -m ensurepip >/dev/null
	@test -t 1 || { quiet=--quiet; \
	    echo "No terminal here, so pip says nothing until it is done: about 2 minutes on a fast line, much longer on a slow one"; }; \
	$(PIP) install $$quiet --require-hashes -r requirements.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@if ! $(RUN) -c 'import cv2' 2>$(VENV)/opencv.log; then \
	    tail -n 1 $(VENV)/opencv.log >&2; \
	    if grep -q '\.so' $(VENV)/opencv.log; then \
	        echo "This system lacks a library of the opencv-python wheel; taking the headless wheel of the same version"; \
	        $(PIP) uninstall --quiet --yes opencv-python && \
	        $(PIP) install --quiet --require-hashes --no-deps --force-reinstall -r requirements-headless.lock && \
	        $(RUN) -c 'import cv2'; \
	    else exit 1; fi; \
	fi
	@rm -f $(VENV)/opencv.log
	@touch $(STAMP)
	@echo "Installed. What this machine has: $(VENV)/bin/sonoscope doctor"

demo: install
	@command -v git >/dev/null || { echo "git is not installed; DVC needs it." >&2; exit 1; }
	@git rev-parse --git-dir >/dev/null 2>&1 || \
	    { echo "No git repository here; making one (git init), DVC needs it"; git init --quiet; }
	@echo "Running the pipeline: dvc repro (what is up to date is skipped)"
	@$(WITH_VENV) dvc repro
	@echo
	@echo "Report:  reports/evaluate/report.html"
	@echo "Numbers: reports/evaluate/metrics.json"
	@echo "MLflow:  $(VENV)/bin/sonoscope ui   (stays until Ctrl-C, prints its addresses)"
	@echo "Next:    . $(VENV)/bin/activate; dvc exp run -S data.source=/absolute/path/to/your/videos"

# Two halves at once, because one process leaves a core idle; the second half's output follows the first's.
test: install
	@mkdir -p .scratch; log=.scratch/tests-n-to-z.txt; \
	$(WITH_VENV) $(RUN) -m pytest -q -p no:cacheprovider tests/test_[n-z]*.py >"$$log" 2>&1 & other=$$!; \
	trap 'kill $$other 2>/dev/null' INT TERM; \
	$(WITH_VENV) $(RUN) -m pytest -q tests/test_[a-m]*.py; first=$$?; \
	wait $$other; second=$$?; cat "$$log"; exit $$((first | second))

fuzz: install
	@$(WITH_VENV) $(RUN) tests/fuzz_readers.py --cases $(or $(CASES),20000) --seed $(or $(SEED),0)
	@$(WITH_VENV) $(RUN) tests/fuzz_extraction.py --seed $(or $(SEED),0)

lock: $(RUN)
	@$(PIP) install --quiet uv
	@UV_PYTHON_DOWNLOADS=never $(VENV)/bin/uv pip compile pyproject.toml --extra test --universal --generate-hashes \
	    --no-emit-index-url --python-version 3.10 --upgrade --quiet -o requirements.lock
	@version=$$(sed -n 's/^opencv-python==\([^ ;]*\).*/\1/p' requirements.lock); \
	{ echo "# opencv-python without its window functions: taken by \`make install\` where the system has no libGL."; \
	  echo "# Compiled by: make lock"; \
	  echo "opencv-python-headless==$$version" | \
	      UV_PYTHON_DOWNLOADS=never $(VENV)/bin/uv pip compile - --universal --no-deps --generate-hashes \
	      --no-emit-index-url --python-version 3.10 --no-header --no-annotate --quiet; \
	} > requirements-headless.lock
	@echo "Compiled requirements.lock and requirements-headless.lock; 'make test' installs and tests them"

check-lock: install
	@$(RUN) -m pytest -q tests/test_packaging.py -k lock

clean:
	@find pipeline stages tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -rf .pytest_cache build dist *.egg-info
	@echo "Removed byte-code and caches. Results, checkpoints (.scratch), mlflow.db and .venv are kept"
