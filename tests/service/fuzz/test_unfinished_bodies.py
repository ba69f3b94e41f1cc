"""500 connections whose bodies of 60 MiB never end: memory stays bounded, other clients are served.

Before keys are asked for and after, where a body is needed and where none is. $LLMUX_FUZZ_SECS
runs all 500; `scripts/test fast` runs 40 against a budget that they fill.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from daemon_harness import Daemon, Start

from llmux.config.keyfile import make_key

pytestmark = pytest.mark.long

WHOLE = "LLMUX_FUZZ_SECS" in os.environ
CONNECTIONS = 500 if WHOLE else 40
BUDGET = 1 << 30 if WHOLE else 80 << 20
BODY = 60 << 20
MOST_RESIDENT = 300 << 20
# nothing was taken or answered for so long: what comes is held back
STALLED_SECS = 20.0 if WHOLE else 3.0
PIECE = b" " * (1 << 18)
STARTS = {
    "OPTIONS": "OPTIONS /v1/chat/completions", "POST health": "POST /health",
    "GET health": "GET /health", "order": "POST /control/pin",
    "inference": "POST /v1/chat/completions",
}  # fmt: skip


class Flood:
    """``opened`` at once; each sends all of its body but the last byte, as far as it is taken."""

    def __init__(self, port: int, start: str, key: str) -> None:
        credentials = f"x-api-key: {key}\r\n" if key else ""
        head = f"{start} HTTP/1.1\r\nHost: localhost\r\n{credentials}Content-Length: {BODY}\r\n\r\n"
        self.statuses: Counter[str] = Counter()
        self.sent = 0
        self._left: dict[socket.socket, int] = {}
        self._selector = selectors.DefaultSelector()
        for _ in range(CONNECTIONS):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.setblocking(False)
            sock.send(head.encode())
            self._left[sock] = BODY - 1
            self._selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def run(self) -> None:
        """Until nothing moves any more."""
        while self._selector.get_map() and (ready := self._selector.select(STALLED_SECS)):
            for key, events in ready:
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                try:
                    self._go_on(sock, events)
                except OSError as error:
                    self._end(sock, type(error).__name__)

    def _go_on(self, sock: socket.socket, events: int) -> None:
        if events & selectors.EVENT_READ:
            data = sock.recv(1 << 16)
            self._end(sock, data[9:12].decode() or "closed")
            return
        if self._left[sock] == 0:
            self._selector.modify(sock, selectors.EVENT_READ)
            return
        with contextlib.suppress(BlockingIOError):
            count = sock.send(PIECE[: self._left[sock]])
            self._left[sock] -= count
            self.sent += count

    def _end(self, sock: socket.socket, how: str) -> None:
        self.statuses[how] += 1
        self._selector.unregister(sock)
        sock.close()

    @property
    def held(self) -> int:
        return len(self._selector.get_map())

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()


class OtherClient:
    """Asks without a pause; the slowest answer and all statuses."""

    def __init__(self, daemon: Daemon) -> None:
        self.statuses: Counter[int] = Counter()
        self.slowest = 0.0
        self._daemon = daemon
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> OtherClient:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            answer = self._daemon.chat("alpha", "word " * 1000)
            self.statuses[answer.status] += 1
            self.slowest = max(self.slowest, answer.seconds)


def resident(daemon: Daemon, what: str) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.partition(f"{what}:")[2].split()[0]) * 1024


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("keys", ["no keys", "a wrong key", "a key"])
def test_unfinished_bodies_take_no_memory_and_no_turn(
    start_daemon: Start, tmp_path: Path, keys: str
) -> None:
    port = free_port()
    gateway: dict[str, object] = {
        "listen": [f"unix:{tmp_path}/http.sock", f"127.0.0.1:{port}"],
        "max_buffered_bytes": BUDGET,
    }
    secret, line = make_key("flood")
    if keys != "no keys":
        (tmp_path / "keys").write_text(line + "\n")
        gateway["keys_file"] = str(tmp_path / "keys")
    daemon = start_daemon({"alpha": {}}, top={"gateway": gateway})
    daemon.http = f"{tmp_path}/http.sock"
    assert daemon.chat("alpha").status == 200
    key = {"no keys": "", "a wrong key": "sk-wrong", "a key": secret}[keys]
    for name, start in STARTS.items():
        before = resident(daemon, "VmRSS")
        with OtherClient(daemon) as client:
            began = time.monotonic()
            flood = Flood(port, start, key)
            try:
                flood.run()
                held, most = flood.held, resident(daemon, "VmHWM")
                assert daemon.chat("alpha").status == 200
            finally:
                flood.close()
        print(f"{keys}, {name}: {flood.sent >> 20} MiB sent in {time.monotonic() - began:.1f} s, "
              f"{held} held, answers {dict(flood.statuses)}; resident {before >> 20} MiB, "
              f"{most >> 20} at most; other client {dict(client.statuses)}, "
              f"the slowest {client.slowest:.2f} s")  # fmt: skip
        assert most <= MOST_RESIDENT
        assert set(client.statuses) == {200}
    daemon.until(lambda: resident(daemon, "VmRSS") < MOST_RESIDENT)
