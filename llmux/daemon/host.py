"""``llmux doctor``: the checks of this host, which no service needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from llmux.config.schema import Config
from llmux.daemon.claims import planned_claims
from llmux.daemon.engine_users import planned_starts
from llmux.drivers.doctor.access import check_access
from llmux.drivers.doctor.facts import Host
from llmux.drivers.doctor.run import Check, run_checks


def look_at_host(
    config: Config | None,
    *,
    tell: Callable[[str], None],
    deep: bool = False,
    cuda_round_trip: bool = False,
    machine: Host | None = None,
) -> Sequence[Check]:
    """``tell`` hears what is being looked at; ``machine``: another than this one."""
    host = replace(machine or Host(), starts=planned_starts, claims=planned_claims, tell=tell)
    return run_checks(config, host, deep=deep, cuda_round_trip=cuda_round_trip)


def look_as_engines(config: Config, tell: Callable[[str], None]) -> Sequence[Check]:
    """What engines can do here, asked as their users. Nothing where we may not become them."""
    return check_access(Host(starts=planned_starts, tell=tell), config)
