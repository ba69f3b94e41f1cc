"""A line to the supervisor that is down: what is said of it, and what is no fault of the line."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import pytest

from llmux.errors import Reason
from llmux.gateway.link import Link, LinkDownError


def test_who_cannot_ask_is_told_when_to_come_back_and_where_to_look() -> None:
    async def body() -> None:
        link = Link("/nowhere")
        with pytest.raises(LinkDownError) as down:
            await link.ask("status", {}, 1.0)
        assert str(down.value) == (
            "cannot ask the supervisor for status: it is not connected (systemctl status llmux)"
        )
        assert (down.value.reason, down.value.retry_after, down.value.hint) == (
            Reason.SUPERVISOR_UNREACHABLE, 1.0, "systemctl status llmux",
        )  # fmt: skip
        assert link._asked == {}

    asyncio.run(body())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError("AF_UNIX path too long"), "AF_UNIX path too long"),
        (TimeoutError("late"), "late"),
    ],
)
def test_a_supervisor_that_cannot_be_reached_is_no_end(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_args: Any, **_more: Any) -> Any:
        raise error

    async def body() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "create_unix_connection", refuse)
        link = Link("/run/s")
        assert await link._connected() == f"cannot reach the supervisor at /run/s: {said}"
        assert (link.up, link.connects, link.away.is_set()) == (False, 0, True)

    asyncio.run(body())


def test_a_line_that_can_never_be_is_not_tried_for_ever() -> None:
    async def body() -> None:
        with socket.socket(socket.AF_INET) as other:
            other.setblocking(False)
            with pytest.raises(ValueError, match="UNIX"):
                await Link(other).run()

    asyncio.run(body())


def test_a_question_that_is_given_up_leaves_nothing_behind() -> None:
    async def body() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            link = Link(ours)
            running = asyncio.get_running_loop().create_task(link.run())
            await link.here.wait()
            with pytest.raises(LinkDownError, match="within 0 seconds"):
                await link.ask("status", {}, 0.0)
            asking = asyncio.get_running_loop().create_task(link.ask("status", {}, 3600.0))
            while not link._asked:  # noqa: ASYNC110  # it has no event
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert link._asked == {}
        await running

    asyncio.run(body())
