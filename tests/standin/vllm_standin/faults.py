"""What is to go wrong, and when.

Orders come from `--standin-fault NAME[=VALUE]`, fixed at start, and from the control file
(`--standin-faults FILE`, a JSON object), which is looked at again whenever it matters: so a test
makes a running engine misbehave, and stop misbehaving, by replacing the file. Every process of the
tree reads it for itself; an order that counts ("the next 2 times") starts counting anew when the
file changes.
"""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KNOWN = frozenset(
    {
        # at start
        "die_at_start",
        "never_healthy",
        "orphan",
        # while serving
        "die_mid_stream",
        "die_on_prompt",
        "hang",
        "completion_error",
        # asleep and awake
        "sleep_error",
        "wake_error",
        "reload_error",
        "discard_error",
        "slow_sleep_secs",
        "slow_wake_secs",
        "die_on",
        "wrong_after_wake",
        "leak_on_sleep",
        # at the end
        "ignore_sigterm",
        # speeds, in place of the flags of the same names
        "startup_secs",
        "load_secs_per_gib",
        "sleep_secs",
        "wake_secs",
        "tokens_per_sec",
        "ttft_secs",
    }
)


class UnknownFaultError(Exception):
    """An order that no code carries out."""


def order(path: str | os.PathLike[str], **faults: Any) -> None:
    """Replace a control file in one go; for tests. No faults: behave well again."""
    check(faults)
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(faults, file)
    os.replace(temporary, path)


def check(faults: dict[str, Any]) -> None:
    unknown = sorted(set(faults) - KNOWN)
    if unknown:
        raise UnknownFaultError(
            f"unknown fault {', '.join(unknown)}; known: {', '.join(sorted(KNOWN))}"
        )


class Faults:
    """The orders in force in this process."""

    def __init__(self, path: str | None, fixed: dict[str, Any]) -> None:
        check(fixed)
        self._path = path
        self._fixed = fixed
        self._orders = dict(fixed)
        self._seen: tuple[int, int, int] | None = None
        self._left: dict[str, int] = {}
        self._refresh(strict=True)

    def get(self, name: str, default: Any = None) -> Any:
        self._refresh()
        return self._orders.get(name, default)

    def secs(self, name: str, default: float = 0.0) -> float:
        return float(self.get(name, default))

    def take(self, name: str) -> bool:
        """Shall it happen this time? true: always; a number: that many times."""
        value = self.get(name, False)
        if isinstance(value, bool):
            return value
        left = self._left.get(name, int(value))
        self._left[name] = max(left - 1, 0)
        return left > 0

    def _refresh(self, *, strict: bool = False) -> None:
        if self._path is None:
            return
        try:
            status = os.stat(self._path)
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen == self._seen:
                return
            with open(self._path, encoding="utf-8") as file:
                orders = json.load(file)
        except FileNotFoundError:
            seen, orders = (0, 0, 0), {}
            if seen == self._seen:
                return
        except json.JSONDecodeError:
            if strict:
                raise UnknownFaultError(f"{self._path} is not JSON") from None
            return  # caught half-written: the next look finds it whole
        try:
            check(orders)
        except UnknownFaultError as error:
            if strict:
                raise
            print(f"standin: {self._path}: {error}", file=sys.stderr, flush=True)
        self._seen = seen
        self._orders = {**self._fixed, **orders}
        self._left = {}
