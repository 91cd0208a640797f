"""The parts of the benchmark.

python -m benchmarks.unlearning encoder --model FOLDER --clinc FOLDER --banking FOLDER
python -m benchmarks.unlearning tofu --help
python -m benchmarks.unlearning learning --help
python -m benchmarks.unlearning cost --model FOLDER
python -m benchmarks.unlearning report
"""

import sys
from importlib import import_module

COMMANDS = {
    "encoder": "benchmarks.unlearning.encoder",
    "tofu": "benchmarks.unlearning.tofu",
    "learning": "benchmarks.unlearning.learning",
    "cost": "benchmarks.unlearning.cost",
    "report": "benchmarks.unlearning.report",
}


def main() -> None:
    """Hand the arguments on."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise SystemExit(f"{__doc__}\nexpected one of {list(COMMANDS)}, got {sys.argv[1:2]}")
    import_module(COMMANDS[sys.argv[1]]).main(sys.argv[2:])


if __name__ == "__main__":
    main()
