"""Print what the system says: `look.py scopes | held | …`."""

from __future__ import annotations

import json
import sys

import witness


def main() -> None:
    match sys.argv[1:]:
        case ["scopes"]:
            print(json.dumps({name: sorted(pids) for name, pids in witness.scopes().items()}))
        case ["strays", *models]:
            print(json.dumps({"strays": witness.strays(models)}))
        case ["held"]:
            print(json.dumps(witness.held()))
        case ["until-scopes", *models]:
            witness.until(f"engines of {models}", lambda: set(witness.scopes()) == set(models))
            print("{}")
        case ["until-status", text]:
            witness.until(text, lambda: text in witness.show(witness.SUPERVISOR, "StatusText"))
            print("{}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
