"""``llmux doctor``: the checks of this host, which no service needs."""

from __future__ import annotations

from collections.abc import Sequence

from llmux.config.schema import Config
from llmux.drivers.doctor.run import Check, run_checks


def look_at_host(
    config: Config | None, *, deep: bool = False, cuda_round_trip: bool = False
) -> Sequence[Check]:
    return run_checks(config, deep=deep, cuda_round_trip=cuda_round_trip)
