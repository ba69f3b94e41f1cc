"""``llmux gateway``, whole: the parent in the test's process, and what its workers were given."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_host import Host, allow, certificate, free_port, host_for

from llmux.config.load import load_config
from llmux.daemon.gateway import Installed, gateway, metrics_sockets, sockets_of
from llmux.drivers.systemd.notify import SdNotifier
from llmux.errors import LlmuxError
from llmux.gateway.client.listeners import bind_all
from llmux.protocol import Catalog, Hello, decode

WORKER = "llmux.daemon.gateway_worker"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host_for(monkeypatch) as made:
        __import__(WORKER)  # all that it imports, once
        monkeypatch.delitem(sys.modules, WORKER)
        yield made


class Unit:
    def is_replaced(self) -> bool:
        return False

    def others(self) -> list[int]:
        return []


class Other:
    """Another process: the supervisor, systemd and the clients of a gateway, in turn."""

    def __init__(self, host: Host, act: Callable[[Other], Any]) -> None:
        self.host, self.act = host, act
        host.notify.setblocking(True)
        self.link = socket.socket(socket.AF_UNIX)
        self.link.bind(host.files.socket)
        self.link.listen()
        self.gateway = os.getpid()
        self.told: list[bytes] = []
        self.workers: list[socket.socket] = []
        self._result, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.alarm(30)
            try:
                os.write(theirs, json.dumps(self._play()).encode())
            finally:
                os.kill(self.gateway, signal.SIGTERM)
                os._exit(0)
        os.close(theirs)
        self.link.close()

    def _play(self) -> Any:
        try:
            return self.act(self)
        except BaseException as error:  # noqa: BLE001  # the test says it
            return f"{type(error).__name__}: {error}"

    def result(self) -> Any:
        with os.fdopen(self._result, "rb") as file:
            text = file.read()
        os.waitpid(self.pid, 0)
        return json.loads(text)

    def worker(self) -> int:
        """A worker comes and is told what there is; its pid."""
        connection, _ = self.link.accept()
        connection.settimeout(10)
        self.workers.append(connection)
        hello = decode(connection.makefile("rb").readline())
        assert isinstance(hello, Hello)
        connection.sendall(Catalog().encode())
        return int(hello.worker.rpartition("-")[2])

    def hear(self, word: bytes) -> None:
        while not self.told or word not in self.told[-1]:
            self.told.append(self.host.notify.recv(4096))


def get(connection: http.client.HTTPConnection, path: str, key: str = "") -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


class Unix(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("x", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


def run(host: Host, code: str) -> None:
    files = host.files
    gateway(
        host.config, link=files.socket, last_good=files.last_good, orphan_secs=0.0, unit=Unit(),
        code=code,
    )  # fmt: skip


def test_one_worker_serves_on_all_addresses_with_keys_and_tls(host: Host) -> None:
    made, key = certificate(host.top)
    port, unix, metrics = free_port(), f"{host.top}/http", f"{host.top}/metrics"
    settings = {
        "listen": [f"unix:{unix}", f"127.0.0.1:{port}"], "metrics_listen": [f"unix:{metrics}"],
        "keys_file": allow(host, "sk-one"), "tls_certificate": made, "tls_key": key, "workers": 1,
    }  # fmt: skip
    host.write(gateway=settings, vllm_command=["/of/the/supervisors/host"])

    def act(other: Other) -> Any:
        other.worker()
        other.hear(b"READY=1")
        trusted = ssl.create_default_context(cafile=made)
        codes = [
            get(http.client.HTTPSConnection("127.0.0.1", port, context=trusted), "/v1/models", one)
            for one in ("sk-one", "sk-two")
        ]
        codes += [get(Unix(unix), "/health/live"), get(Unix(metrics), "/health/live")]
        os.kill(other.gateway, signal.SIGTERM)
        other.hear(b"STOPPING=1")
        return codes, [word.decode().splitlines() for word in other.told]

    other = Other(host, act)
    run(host, __file__)
    codes, told = other.result()
    assert codes == [200, 401, 200, 404]
    stored = [words[1] for words in told if words[0] == "FDSTORE=1"]
    named = f"unix_{host.top}".replace("/", "-")
    assert stored == [
        f"FDNAME=listen-{named}-http", f"FDNAME=listen-127.0.0.1_{port}",
        f"FDNAME=metrics-{named}-metrics",
    ]  # fmt: skip
    assert WORKER not in sys.modules, "the parent has no use for it"


def test_two_workers_share_what_is_imported_and_none_is_started_after_an_upgrade(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    code = host.top / "code.py"
    code.touch()
    host.write(gateway={"listen": [f"unix:{host.top}/http"], "workers": 2}, metrics_port=0)

    def act(other: Other) -> Any:
        pids = [other.worker(), other.worker()]
        other.hear(b"READY=1")
        code.unlink()
        os.kill(pids[0], signal.SIGKILL)
        while other.workers[1].recv(1 << 16):  # until it has served on and left
            pass
        return pids

    other = Other(host, act)
    run(host, str(code))
    assert len(set(other.result())) == 2
    assert "the package was replaced" in caplog.text
    assert WORKER in sys.modules


# ---- refusals and sockets -----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["keys_file", "tls_certificate"])
def test_secrets_that_cannot_be_read_are_refused_before_anything_listens(
    host: Host, what: str
) -> None:
    made, key = certificate(host.top)
    settings = {
        "listen": [f"unix:{host.top}/http"], "keys_file": allow(host, "sk"),
        "tls_certificate": made, "tls_key": key,
    }  # fmt: skip
    Path(host.top / "bad").write_text("neither keys nor a certificate")
    host.write(gateway=settings | {what: f"{host.top}/bad"})
    with pytest.raises(LlmuxError, match=f"{host.top}/bad"):
        run(host, __file__)
    assert "http" not in os.listdir(host.top)


def test_kept_sockets_are_used_again_and_those_of_former_addresses_dropped(host: Host) -> None:
    def names(*names: str) -> list[str]:
        return [f"unix:{host.top}/{name}" for name in names]

    def stored(purpose: str, name: str) -> str:
        return f"{purpose}-unix_{host.top}/{name}".replace("/", "-")

    host.write(gateway={"listen": names("one", "two"), "metrics_listen": names("three")})
    kept = {
        stored("listen", "two"): bind_all(names("two")),
        stored("metrics", "three"): bind_all(names("three")),
        "listen-elsewhere": bind_all(names("former")),
    }
    former = dict(kept)
    notifier = SdNotifier()
    clients, metrics = sockets_of(load_config(host.config), notifier, kept)
    notifier.close()
    assert clients[1:] == former[stored("listen", "two")]
    assert metrics == former[stored("metrics", "three")]
    assert [one.getsockname() for one in (*clients, *metrics)] == [
        f"{host.top}/{name}" for name in ("one", "two", "three")
    ]
    assert former["listen-elsewhere"][0].fileno() == -1
    told = [host.notify.recv(4096).decode().splitlines() for _ in range(2)]
    assert told == [
        ["FDSTORE=1", f"FDNAME={stored('listen', 'one')}"],
        ["FDSTOREREMOVE=1", "FDNAME=listen-elsewhere"],
    ]
    for one in (*clients, *metrics):
        one.close()


def test_a_port_for_metrics_that_is_taken_keeps_no_gateway_down(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    def bind(addresses: Any) -> list[socket.socket]:
        raise OSError(98, f"cannot listen on {addresses[0]}: it is taken")

    assert metrics_sockets(load_config(host.config), bind) == []
    assert "no metrics port: [Errno 98] cannot listen on 127.0.0.1:9090" in caplog.text


def test_code_is_another_when_it_was_replaced_or_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    missing = Installed(str(file))
    assert not missing.is_replaced()
    file.write_text("1")
    installed = Installed(str(file))
    assert missing.is_replaced() and not installed.is_replaced()
    os.utime(file, ns=(0, 0))
    assert installed.is_replaced()
    installed = Installed(str(file))
    (tmp_path / "new").write_text("1")
    os.utime(tmp_path / "new", ns=(0, 0))
    os.rename(tmp_path / "new", file)
    assert installed.is_replaced()
    file.unlink()
    assert installed.is_replaced()
