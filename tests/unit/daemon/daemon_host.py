"""A host for a daemon in the test's own process: files, systemd's ear, a pretended machine."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from llmux.cli import client
from llmux.config.keyfile import hash_key
from llmux.daemon.places import Files
from llmux.protocol import Drained, Hello, Revoke, decode
from tests.signal_actions import child_action_as_it_was
from tests.twins.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLICY = {"policy_type": "fifo", "min_active_secs": 0, "eviction": "offload+freeze"}


@contextmanager
def signals_as_they_were() -> Iterator[None]:
    """One that the daemon does not take ends nothing."""
    former = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    with child_action_as_it_was():
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


@contextmanager
def host_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Where root's directories are safe, by a short path, as that of a socket has 107 bytes."""
    with TemporaryDirectory(prefix="llmux-", dir="/var/tmp") as top, signals_as_they_were():
        host = Host(Path(top), monkeypatch)
        log = logging.getLogger("llmux")
        log.addHandler(host)
        log.setLevel(logging.INFO)
        yield host
        log.removeHandler(host)
        host.notify.close()


class Host(logging.Handler):
    """``top`` holds the configuration, the runtime directory and what outlives a boot."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.top, self.world = top, World()
        self.files = Files(str(top / "run"), str(top / "state"))
        for directory in (self.files.runtime, self.files.state):
            os.mkdir(directory)
        self.config = str(top / "config.json")
        self.document: dict[str, Any] = {
            "policy": POLICY, "checkpoint": {"images_dir": str(top / "images")},
            "models": {"a": {"model_path": "models/a"}},
        }  # fmt: skip
        self.write()
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(top / "notify"))
        self.notify.setblocking(False)
        self._heard: list[str] = []
        self._more = asyncio.Event()
        self.up = asyncio.Event()
        monkeypatch.setenv("NOTIFY_SOCKET", str(top / "notify"))

    def write(self, **changes: Any) -> None:
        self.document |= changes
        Path(self.config).write_text(json.dumps(self.document))

    def _hear(self) -> None:
        self._heard.append(self.notify.recv(4096).decode())
        self._more.set()

    async def told(self, text: str) -> None:
        """Until a notification begins so, after the one that was waited for before."""
        while True:
            while self._heard:
                if self._heard.pop(0).startswith(text):
                    return
            self._more.clear()
            await self._more.wait()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("llmux") and "supervises" in record.getMessage():
            self.up.set()

    async def ask(self, verb: str, **args: Any) -> Any:
        return await asyncio.to_thread(client.ask, self.files.socket, verb, args, timeout=20)

    @asynccontextmanager
    async def hearing(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_reader(self.notify, self._hear)
        try:
            yield
        finally:
            loop.remove_reader(self.notify)

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[None]:
        """A gateway's worker is connected, without requests."""
        reader, writer = await asyncio.open_unix_connection(self.files.socket)
        writer.write(Hello("gateway", "w").encode())

        async def answer() -> None:
            while line := await reader.readline():
                match decode(line):
                    case Revoke(model, epoch):
                        writer.write(Drained(model, epoch).encode())

        answering = asyncio.create_task(answer())
        try:
            yield
        finally:
            answering.cancel()
            await asyncio.wait([answering])
            writer.close()
            await writer.wait_closed()


# ---- what gateways are given --------------------------------------------------------------------


def certificate(top: Path) -> tuple[str, str]:
    made, key = str(top / "cert.pem"), str(top / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", made],
        check=True, capture_output=True,
    )  # fmt: skip
    return made, key


def allow(host: Host, *keys: str) -> str:
    file = host.top / "keys.yaml"
    entries = [{"name": key, "sha256": hash_key(key).hex()} for key in keys]
    file.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return str(file)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
