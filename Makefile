.PHONY: check test bench

check:
	ruff check .
	ruff format --check .
	mypy

test:
	pytest

bench:
	python benchmarks/methods.py looks many memory
	python benchmarks/start.py
