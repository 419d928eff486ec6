.PHONY: check test bench

check:
	ruff check .
	ruff format --check .
	mypy

test:
	pytest

bench:
	python benchmarks/seam.py
	python benchmarks/start.py
