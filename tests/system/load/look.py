"""Print what the system says: `look.py scopes | held | …`."""

from __future__ import annotations

import json
import sys

import witness

RESTING = {"stopped", "parked", "serving", "failed"}


def at_rest() -> bool:
    states = witness.states()
    return bool(states) and set(states.values()) <= RESTING


def main() -> None:
    match sys.argv[1:]:
        case ["scopes"]:
            print(json.dumps({name: sorted(pids) for name, pids in witness.scopes().items()}))
        case ["strays", *models]:
            print(json.dumps({"strays": witness.strays(models)}))
        case ["shm"]:
            print(json.dumps({"names": sorted(witness.in_shm())}))
        case ["held"]:
            print(json.dumps(witness.held()))
        case ["until-scopes", *models]:
            witness.until(f"engines of {models}", lambda: set(witness.scopes()) == set(models))
            print("{}")
        case ["until-rest"]:
            witness.until("all models are at rest", at_rest)
            print("{}")
        case ["until-status", text]:
            witness.until(text, lambda: text in witness.show(witness.SUPERVISOR, "StatusText"))
            print("{}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
