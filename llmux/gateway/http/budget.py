"""The budget for the bodies of all requests that one worker has received and not yet answered."""

from __future__ import annotations

from llmux.errors import Reason, Refused

RETRY_SECS = 1.0
SHORT_BODY = 64 * 1024  # a long conversation; images and files are longer


class BodyBudget:
    """``used``: bytes in memory and in files. Each request gives back what it took when it ends.

    Bodies longer than ``SHORT_BODY`` leave an eighth to the others, so that long ones that never
    end do not keep every other client out.
    """

    __slots__ = ("limit", "long_limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.long_limit = limit - limit // 8
        self.used = 0

    def has_room(self, size: int, more: int) -> bool:
        """For ``more`` bytes of a body of which ``size`` are here and counted."""
        short = size + more <= SHORT_BODY
        return self.used + more <= (self.limit if short else self.long_limit)

    def exceeded(self) -> Refused:
        return Refused(
            Reason.QUEUE_FULL,
            f"cannot receive the request body: {self.used} bytes of other requests are held",
            hint="try again later; the limit is gateway.max_buffered_bytes",
            retry_after=RETRY_SECS,
        )
