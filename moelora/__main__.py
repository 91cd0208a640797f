"""`python -m moelora` is the command line of `cli.py`."""

from moelora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
