"""What a daemon says, line by line or datagram by datagram, read by a thread as it comes."""

from __future__ import annotations

import os
import select
import socket
import threading
from typing import Any, Protocol

SECONDS = 45.0  # how long any single wait in a test may take


class Heard:
    """What the daemon says on one of its channels, collected by a thread as it comes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._heard: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        while not self._ended:
            select.select([self._channel], [], [])
            with self._news:  # what is taken from the channel is here before anyone looks
                said = self._channel.take()
                self._ended = said is None
                self._heard += [one.decode(errors="replace").rstrip() for one in said or ()]
                self._news.notify_all()
        self._channel.close()

    def mark(self) -> int:
        return len(self.since(0))

    def wait(self, text: str, *, since: int = 0) -> int:
        """Position of the first message from ``since`` on that holds ``text``, once it is there."""

        def find() -> int | None:
            heard = enumerate(self._heard[since:], since)
            return next((position for position, said in heard if text in said), None)

        with self._news:
            self._news.wait_for(lambda: find() is not None or self._ended, SECONDS)
            position = find()
        assert position is not None, f"never said: {text}\n" + "\n".join(self._heard[-40:])
        return position

    def since(self, mark: int) -> list[str]:
        """All that was said until now: an answer that came says that the lines before it did."""
        with self._news:
            heard = self._news.wait_for(lambda: self._ended or not self._is_behind(), SECONDS)
            assert heard, "what was said is not read"
            return self._heard[mark:]

    def _is_behind(self) -> bool:
        return bool(select.select([self._channel], [], [], 0)[0])

    def join(self) -> None:
        self._thread.join(SECONDS)


class Channel(Protocol):
    def fileno(self) -> int: ...

    def take(self) -> list[bytes] | None:
        """What has come, once something has; None at the end."""

    def close(self) -> None: ...


class Lines:
    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._rest = b""
        self.fileno = pipe.fileno
        self.close = pipe.close

    def take(self) -> list[bytes] | None:
        if not (data := os.read(self._pipe.fileno(), 1 << 16)):
            rest, self._rest = self._rest, b""
            return [rest] if rest else None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines


class Datagrams:
    """Until an empty one, which only ``stop`` sends."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.fileno = sock.fileno
        self.close = sock.close

    def take(self) -> list[bytes] | None:
        return [data] if (data := self._sock.recv(65536)) else None
