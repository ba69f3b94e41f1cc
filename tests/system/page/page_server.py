"""``llmux serve`` with stand-in engines behind a door that can be closed, for a browser."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from page_browser import ROOT as ROOT  # its import sets the path

from daemon_harness import Daemon as Daemon  # isort: skip

from llmux.config.keyfile import hash_key

JSON = dict[str, Any]
# name, secret, role, the models that it may use (None: all)
KEYS: tuple[tuple[str, str, str, list[str] | None], ...] = (
    ("admin", "sk-admin", "admin", None),
    ("use", "sk-use", "use", None),
    ("beta", "sk-beta", "use", ["beta"]),
    ("nothing", "sk-nothing", "use", ["elsewhere"]),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Door:
    """A TCP port in front of another; ``close`` breaks what passes and lets nothing in."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.port = 0
        self.open()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        assert self._listener is not None
        # shutdown wakes the thread that accepts, close alone does not
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._sockets |= {client, server}
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with self._lock, contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)  # which ends the other direction too
        with self._lock:
            self._sockets.discard(source)
            source.close()


@contextlib.contextmanager
def served(
    models: dict[str, JSON], *, keys: bool = True, gpus: int = 1, **policy: Any
) -> Iterator[tuple[Daemon, int]]:
    """The daemon and its TCP port; its unix socket takes the test's own orders."""
    directory = Path(tempfile.mkdtemp(prefix="lxp"))
    port = free_port()
    gateway: JSON = {"listen": [f"unix:{directory / 'http.sock'}", f"127.0.0.1:{port}"]}
    if keys:
        file = directory / "keys"
        lines = [
            {"name": name, "sha256": hash_key(secret).hex(), "role": role}
            | ({} if models is None else {"models": models})
            for name, secret, role, models in KEYS
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.chmod(file, 0o600)
        gateway["keys_file"] = str(file)
    daemon = Daemon(directory, models, policy=policy, top={"gateway": gateway}, gpus=gpus)
    try:
        daemon.start()
        yield daemon, port
    finally:
        if daemon.alive:
            daemon.stop()
        shutil.rmtree(directory, ignore_errors=True)
