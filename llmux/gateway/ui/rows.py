"""The supervisor's status as rows that stay the same while nothing happens, and what changed in
them. Pure.

Ages and remaining times become points in time, so that a page counts them itself and a row is sent
again only when something happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

JSON = dict[str, Any]

# field of the status → the field of a row, in seconds since the epoch
AGES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "since_secs": "since",
        "oldest_wait_secs": "oldest_since",
        "idle_secs": "idle_since",
        "phase_secs": "phase_since",
    }
)
REMAINING: Final[Mapping[str, str]] = MappingProxyType(
    {
        "retry_in_secs": "retry_at",
        "wait_at_most_secs": "wait_until",
        "left_secs": "done_at",
        "pinned_secs": "pinned_until",
    }
)
JITTER_SECS: Final = 0.75  # two looks at the same point in time differ by their ways here
# Memory of a running process is never quite the same: changes below this are not sent.
BYTES: Final = frozenset({"gpu_bytes", "ram_bytes", "used_bytes", "engines_bytes"})
STEP_BYTES: Final = 64 * 1024 * 1024
NOT_SENT: Final = frozenset({"models", "generation"})


def row(status: Mapping[str, Any], now: float, former: Mapping[str, Any] | None) -> JSON:
    """One model's (or order's) row. ``former``: its row before, whose values are kept while they
    say the same."""
    return {
        name: _steady(name, value, (former or {}).get(name))
        for name, value in (_at(key, value, now) for key, value in status.items())
    }


def head(status: Mapping[str, Any], now: float, former: Mapping[str, Any]) -> JSON:
    """All of the status but the models."""
    made: JSON = {key: value for key, value in status.items() if key not in NOT_SENT}
    for lists, key in (("orders", "id"), ("gpus", "index")):
        before = {one.get(key): one for one in former.get(lists, ())}
        if isinstance(items := made.get(lists), list):
            made[lists] = [row(item, now, before.get(item.get(key))) for item in items]
    return made


def _at(key: str, value: Any, now: float) -> tuple[str, Any]:
    if (name := AGES.get(key)) is not None:
        # an idle time of 0 means busy
        return name, None if value is None or (key == "idle_secs" and value == 0) else now - value
    if (name := REMAINING.get(key)) is not None:
        return name, None if value is None else now + value
    return key, value


def _steady(name: str, value: Any, former: Any) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    step = STEP_BYTES if name in BYTES else JITTER_SECS if name in _TIMES else 0
    if value and isinstance(former, int | float) and abs(value - former) < step:
        return former
    return round(value, 1) if name in _TIMES else value


_TIMES: Final = frozenset([*AGES.values(), *REMAINING.values()])


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> JSON:
    """The fields of ``new`` that differ; those that went are None."""
    changed: JSON = {key: value for key, value in new.items() if old.get(key, _ABSENT) != value}
    return changed | dict.fromkeys(old.keys() - new.keys())


def changed_rows(old: Mapping[str, JSON], new: Mapping[str, JSON]) -> JSON:
    """Model → what changed in its row; None for one that went."""
    made: JSON = {}
    for name, now in new.items():
        if difference := changes(old.get(name, {}), now):
            made[name] = difference
    return made | dict.fromkeys(old.keys() - new.keys())


_ABSENT: Final = object()
