# `make demo` and `make test` are all a newcomer needs; both set up .venv first.
#
#   PYTHON       the Python (>= 3.11) to build .venv with; found if not given
#   PYTEST_ARGS  for pytest, such as "-k packaging"; two processes, a file in one of them, unless given
#   EXTRAS       of pyproject.toml to install: "speech,video,test,cuda" for GPUs, "tpu" for TPUs
#   UPGRADE      --upgrade lets `make constraints` move pins that could stay
#   N, SEED      number of mutants of `make mutate`, and the seed by which it draws them
#   ONLY         one case of `make break`, as kills:12; BREAK_ARGS are more of its flags, such as "--calls 100 --keep"

PYTHON ?=
PYTEST_ARGS ?= -n 2 --dist loadfile --max-worker-restart 0
EXTRAS ?= speech,video,test
UPGRADE ?=
N ?= 100
SEED ?=
ONLY ?=
BREAK_ARGS ?=

SHELL := /bin/sh
bin := .venv/bin
candidates := $(or $(PYTHON),python3 python python3.14 python3.13 python3.12 python3.11)

.DEFAULT_GOAL := help
.PHONY: help demo test mutate break lint types setup constraints clean other_extras

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
	    printf '%-18s %s\n' "$$target" "$$text"; done

demo: .venv/.ready  ## set up, then prepare, train, evaluate and report: see runs/tiny/report.html
	@$(bin)/trimask demo

test: .venv/.ready  ## set up, then run the tests
	@$(bin)/pytest $(PYTEST_ARGS)

mutate: .venv/.ready  ## change N statements drawn by SEED, one at a time, and show which changes the tests catch
	@test -n "$(SEED)" || { echo "make mutate needs the seed of its draw: make mutate N=$(N) SEED=7" >&2; exit 2; }
	@PYTHONPATH=tests $(bin)/python -m mutation --number $(N) --seed $(SEED)

break: .venv/.ready  ## bad calls, damaged files, kills, full disks and commands run twice, drawn by SEED
	@test -n "$(SEED)" || { echo "make break needs the seed of its draw: make break SEED=7" >&2; exit 2; }
	@PYTHONPATH=tests $(bin)/python -m breaking --seed $(SEED) $(if $(ONLY),--only $(ONLY)) $(BREAK_ARGS)

lint: .venv/.ready  ## ruff: rules and format
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .

types: .venv/.ready  ## mypy on the wheel, as a user would install it
	@rm -rf build && \
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	$(bin)/python -m pip --quiet wheel --no-deps --no-index --no-build-isolation --wheel-dir "$$scratch" . && \
	$(bin)/python -m venv --without-pip "$$scratch/venv" && \
	$(bin)/python -m pip --quiet --python "$$scratch/venv" install --no-deps --no-index "$$scratch"/*.whl && \
	where='import sysconfig; print(sysconfig.get_path("purelib"))' && \
	site=$$("$$scratch/venv/bin/python" -c "$$where") && \
	$(bin)/python -c "$$where" > "$$site/dependencies.pth" && \
	root=$$PWD && cd "$$scratch" && \
	"$$root/$(bin)/mypy" --config-file "$$root/pyproject.toml" --cache-dir "$$root/.mypy_cache" \
	    --python-executable "$$scratch/venv/bin/python" --package trimask

setup: .venv/.ready  ## .venv with everything pinned by constraints.txt

# The stamp goes first and comes back last, so an interrupted setup is done again; it says with which extras.
other_extras := $(filter-out $(EXTRAS),$(shell cat .venv/.ready 2>/dev/null))
.venv/.ready: pyproject.toml setup.py constraints.txt $(if $(other_extras),other_extras)
	@rm -f $@; \
	enough='import sys; print(".".join(map(str, sys.version_info[:3]))); sys.exit(sys.version_info < (3, 11))'; \
	python=; seen=; \
	for candidate in $(candidates); do \
	    if version=$$("$$candidate" -c "$$enough" 2>/dev/null); then python=$$candidate; break; fi; \
	    seen="$$seen $$candidate ($${version:-does not run})"; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "trimask needs Python 3.11 or newer; found:$$seen." >&2; \
	    echo "Install one, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	set -e; \
	if [ "$$($(bin)/python -c "$$enough" 2>/dev/null)" != "$$version" ]; then rm -rf .venv; fi; \
	if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then \
	    echo "Setting up .venv with uv and Python $$version"; \
	    uv venv --quiet --allow-existing --python "$$(command -v "$$python")" .venv; \
	    uv pip install --quiet --python $(bin)/python --constraint constraints.txt --editable '.[$(EXTRAS)]'; \
	else \
	    echo "Setting up .venv with pip and Python $$version; this takes a few minutes"; \
	    "$$python" -m venv .venv; \
	    $(bin)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'; \
	fi; \
	echo '$(EXTRAS)' > $@

constraints:  ## pin again after a change of dependencies (needs uv); names no package index
	uv pip compile pyproject.toml --extra speech --extra video --extra test --universal --python-version 3.11 --fork-strategy fewest \
	    --no-header --no-annotate --no-emit-index-url --no-emit-find-links $(UPGRADE) --quiet --output-file constraints.txt

clean:  ## remove .venv, builds and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
