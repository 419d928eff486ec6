.PHONY: check test bench lock

check:
	ruff check .
	ruff format --check .
	mypy

test:
	pytest

bench:
	python benchmarks/methods.py looks many memory
	python benchmarks/start.py

lock: # the versions of the environment in which it is run, after its tests have passed
	pip freeze --exclude-editable | grep == | sed 's/+cu[0-9]*//' > requirements-dev.txt
