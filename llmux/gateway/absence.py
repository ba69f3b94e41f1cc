"""What becomes of requests while the supervisor is away for longer than a restart takes.

Without it no model comes, and a client should hear so instead of waiting for nothing. Models that
were granted are served all the while.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from llmux.errors import Reason, Refused

if TYPE_CHECKING:
    from llmux.gateway.gateway import Gateway

logger = logging.getLogger(__name__)

AWAY_SECS: Final = 30.0  # a restart takes a second, with many engines to look at a few
RETRY_SECS: Final = 10.0


def nobody_wakes(model: str) -> Refused:
    return Refused(
        Reason.SUPERVISOR_UNREACHABLE,
        f'cannot wait for model "{model}": the supervisor that wakes models is away',
        hint="systemctl status llmux",
        retry_after=RETRY_SECS,
    )


async def mind(gateway: Gateway, away_secs: float) -> None:
    """For as long as the worker lives."""
    link = gateway.link
    while True:
        await link.gone_for(away_secs)
        logger.warning(
            "the supervisor has been away for %g s: only models that are resident are served until"
            " it is back; next step: systemctl status llmux",
            away_secs,
        )
        gateway.alone = True
        for model in gateway.admission.wanted():
            gateway.refuse_all(gateway.admission.refuse(model), nobody_wakes)
        await link.here.wait()
        gateway.alone = False
        logger.info("the supervisor is back")
