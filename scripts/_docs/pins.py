"""The pinned versions of the vendored wheels beside the newest ones of the package index.

Debian's security updates do not reach these wheels, so the builder of the package looks here before
a release. pip is asked, so the index is the configured one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

PINS: Final = Path("packaging/requirements-vendored.txt")
ASK_SECS: Final = 120.0
_PIN: Final = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+) --hash=sha256:[0-9a-f]{64}(?: .*)?")
_NEWEST: Final = re.compile(r"[A-Za-z0-9._-]+ \(([A-Za-z0-9.]+)\)")


class PinError(Exception):
    """The file of the pins or the answer of the index is not as expected."""


def pins(text: str) -> dict[str, str]:
    """Name → version. Raises PinError."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        pin = _PIN.fullmatch(line.rstrip(" \\"))
        if pin is None:
            raise PinError(f"{PINS}:{number}: expected NAME==VERSION --hash=sha256:…, got {line!r}")
        found[pin[1]] = pin[2]
    return found


def newest(name: str) -> str:
    """The newest release that pip would install. Raises PinError."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--no-input", name]
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=ASK_SECS, check=False
        )
    except subprocess.TimeoutExpired:
        raise PinError(f"cannot look up {name}: no answer within {ASK_SECS:g} s") from None
    answer = _NEWEST.match(asked.stdout)
    if asked.returncode or answer is None:
        said = asked.stderr.strip().splitlines() or ["no answer"]
        raise PinError(f"cannot look up {name}: {said[-1]}")
    return answer[1]


def compare(pinned: dict[str, str], ask: Callable[[str], str] = newest) -> tuple[list[str], int]:
    """(a line for each wheel, exit status)"""
    lines, status = [], 0
    width = max((len(name) for name in pinned), default=0)
    for name, version in pinned.items():
        try:
            latest = ask(name)
        except PinError as error:
            lines.append(f"{name:{width}}  {version}  {error}")
            status = 2
            continue
        if latest == version:
            lines.append(f"{name:{width}}  {version}  is the newest")
        else:
            lines.append(f"{name:{width}}  {version}  the newest is {latest}: read its changes")
            status = max(status, 1)
    return lines, status


def main() -> int:
    try:
        lines, status = compare(pins(PINS.read_text()))
    except (OSError, PinError) as error:
        print(f"pins: cannot read the pinned versions: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
