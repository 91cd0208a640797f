# One command checks all: make check
.PHONY: check format style types imports test

check: style types imports test

format:
	ruff format
	ruff check --fix

style:
	ruff format --check
	ruff check

types:
	pyright
	pyright --verifytypes moelora --ignoreexternal

imports:
	lint-imports

test:
	python -m pytest
