"""python -m benchmarks NAME [options]

    logging     what logging costs, as a share of training
    recording   what recording attention and rollout cost, as shares of a forward pass

Each prints a table and writes it, with machine and versions, as JSON; --record also appends it to RESULTS.md.
"""

from __future__ import annotations

import importlib
import sys

NAMES = {"logging": "logging_cost", "recording": "recording"}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in NAMES:
        print(__doc__.strip(), file=sys.stdout if arguments in (["-h"], ["--help"]) else sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    return importlib.import_module(f"benchmarks.{NAMES[arguments[0]]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
