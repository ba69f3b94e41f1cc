"""``llmux doctor``: print the checks that ``drivers/doctor/run.py`` makes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, TextIO


class CheckResult(Protocol):
    """The result of one check; ``level`` is OK, WARN or FAIL."""

    @property
    def name(self) -> str: ...

    @property
    def level(self) -> str: ...

    @property
    def seen(self) -> str: ...

    @property
    def remedy(self) -> str: ...

    @property
    def measured(self) -> Mapping[str, float]: ...


def doctor(checks: Sequence[CheckResult], *, as_json: bool, out: TextIO | None = None) -> int:
    """Exit status: 0 when nothing failed, else 1."""
    print((to_json if as_json else to_table)(checks), file=out or sys.stdout)
    return 1 if any(check.level == "FAIL" for check in checks) else 0


def to_json(checks: Sequence[CheckResult]) -> str:
    rows = [
        {
            "name": check.name,
            "level": str(check.level),
            "seen": check.seen,
            "remedy": check.remedy,
            "measured": dict(check.measured),
        }
        for check in checks
    ]
    ok = all(check.level != "FAIL" for check in checks)
    return json.dumps({"ok": ok, "checks": rows}, indent=2, ensure_ascii=False)


def to_table(checks: Sequence[CheckResult]) -> str:
    """One line per check with its remedy below, and a last line with counts."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.level:<4}  {check.name:<{width}}  {check.seen}")
        if check.level != "OK" and check.remedy:
            lines.append(f"{'':4}  {'':{width}}  → {check.remedy}")
    counts = {level: sum(c.level == level for c in checks) for level in ("OK", "WARN", "FAIL")}
    lines.append(", ".join(f"{count} {level}" for level, count in counts.items()))
    return "\n".join(lines)
