# Each target does its own set-up, once, in .venv; afterwards everything works offline.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test bench lint mutate data weights compiled-code clean

.venv/ready: constraints.txt tests/oldest.txt setup.py pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), "Python 3.10 to 3.13 is needed, this is " + sys.version'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --no-compile --constraint constraints.txt setuptools wheel
	$(RUN) -m pip install --quiet --no-compile --constraint constraints.txt --no-build-isolation --editable '.[test,bench]'
	$(RUN) -m pip install --quiet --no-compile --no-deps --target .venv/oldest --upgrade --requirement tests/oldest.txt
	$(RUN) -m compileall -qq -j 0 .venv/lib .venv/oldest || true  # or each process compiles anew where Python writes no bytecode; some are of another Python
	touch $@

demo: .venv/ready
	$(RUN) -m dpt demo

# One thread a process, two processes or more: small tensors do not gain from threads. The interpreter's tests and the compiler's need
# processes of their own, for a process can do only one of the two. A test, its fixtures' ends among it, that takes 20 minutes hangs: it
# fails, and says where every thread stood.
TESTS := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 8 -o faulthandler_timeout=1200 -o faulthandler_exit_on_timeout=true
OF_TRANSFORMERS := tests/dpt/fast/test_transformers.py tests/dpt/fast/test_unread.py tests/dpt/checkpoints/test_transformers_objects.py

test: lint
	$(TESTS) tests/dpt tests/bench tests/project
	PYTHONPATH=.venv/oldest $(TESTS) $(OF_TRANSFORMERS)
	TRITON_INTERPRET=1 $(TESTS) tests/kernels
	$(TESTS) --maxschedchunk 1 tests/host tests/compiled
	$(TESTS) bench

lint: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: .venv/ready
	$(RUN) -m pytest bench/ --benchmark

mutate: .venv/ready
	$(RUN) tests/mutate.py

compiled-code: .venv/ready
	$(RUN) -m dpt.kernels.tools.compiler --cases bench.cases.launches --write
	$(RUN) -m dpt.kernels.tools.predict --write

# The carried models, from nothing: 9800 rendered scenes, then the trainings; depth a second time from where the first ended, at full size,
# and a third time, in which it learns that the sky is far. Each recipe starts from what the one before it wrote into runs/.
data: .venv/ready
	$(RUN) -m dpt render -o data

weights: data
	$(RUN) -m dpt train scenes --data data
	$(RUN) -m dpt train scenes-depth --data data
	$(RUN) -m dpt train scenes-depth-again --data data
	$(RUN) -m dpt train scenes-depth-sky --data data

clean:
	rm -rf .venv out
