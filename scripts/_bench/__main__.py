"""The dispatcher: a subcommand is a module with ``HELP``, ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

SUBCOMMANDS = (
    "switch",
    "park",
    "proxy",
    "overload",
    "scrape",
    "decide",
    "many",
    "policy",
    "ui",
    "idle",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench")
    verbs = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"_bench.{name}")
        verb = verbs.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    arguments = parser.parse_args()
    # Else what was started lives on: the end of a bench is in its finally blocks.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    return int(arguments.run(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
