"""Values of keys that are chosen from a few, apart from the schema: the command line offers them to
its user, and most of its verbs need nothing else of the configuration."""

from __future__ import annotations

from enum import StrEnum


class PolicyType(StrEnum):
    FAIR = "fair"
    FIFO = "fifo"
    COST_AWARE = "cost_aware"
    TIME_SLICE = "time_slice"


class KeyRole(StrEnum):
    USE = "use"
    ADMIN = "admin"  # the control endpoints as well
