"""The stand-in engine, as a process: what a supervisor and a proxy see of it.

Nothing here sleeps: an engine is waited for by its log line, everything else by HTTP answers and
ends of pipes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STANDIN = Path(__file__).resolve().parents[2] / "standin"
JSON = dict[str, Any]


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(self._path)


class Engine:
    """A running stand-in; killed with everything it started when the test ends."""

    def __init__(self, folder: Path, name: str, *flags: str, env: JSON | None = None) -> None:
        self.name = name
        self.uds = str(folder / f"{name}.sock")
        address = () if "--port" in flags else ("--uds", self.uds)
        command = [sys.executable, str(STANDIN / "standin.py"), "serve", f"/models/{name}"]
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", **(env or {})}
        self.process = subprocess.Popen(
            [*command, "--served-model-name", name, *address, *flags],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.files: set[str] = set()
        self._connections: list[http.client.HTTPConnection] = []

    def wait_ready(self) -> Engine:
        assert self.read_until("Application startup complete."), "".join(self.lines)
        self.files = shared_files(self.process.pid)
        return self

    def read_until(self, text: str) -> bool:
        """Read the log up to a line with this text; False: it ended without one."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return True
        return False

    def wait_exit(self) -> int:
        """Wait until every process that holds the log is gone."""
        self.read_until("\0never\0")
        return self.process.wait(timeout=10)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def connect(self) -> http.client.HTTPConnection:
        connection = UnixConnection(self.uds)
        self._connections.append(connection)
        return connection

    def ask(self, method: str, path: str, body: JSON | None = None) -> tuple[int, Any]:
        connection = self.connect()
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            data = response.read()
            if response.headers.get_content_type() == "application/json":
                return response.status, json.loads(data)
            return response.status, data.decode()
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> Any:
        status, answer = self.ask("POST", path, body)
        assert status == 200, answer
        return answer

    def get(self, path: str) -> Any:
        status, answer = self.ask("GET", path)
        assert status == 200, answer
        return answer

    def say(self, prompt: str = "hello", **more: Any) -> str:
        """The text of a greedy completion."""
        body = {"model": self.name, "prompt": prompt, "temperature": 0, "max_tokens": 8}
        text: str = self.post("/v1/completions", **{**body, **more})["choices"][0]["text"]
        return text

    def open_stream(self, **more: Any) -> Stream:
        return Stream(self, more)

    def metric(self, name: str, **labels: str) -> float:
        for line in str(self.get("/metrics")).splitlines():
            wanted = [f'{key}="{value}"' for key, value in labels.items()]
            if line.startswith(f"vllm:{name}{{") and all(label in line for label in wanted):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {name} {labels}")

    def wait_metric(self, name: str, value: float) -> None:
        deadline = time.monotonic() + 10
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} never became {value}"

    def children(self) -> dict[str, int]:
        """Command name → pid of the tree below the API server."""
        found = {}
        pending = [self.process.pid]
        while pending:
            pid = pending.pop()
            tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pending += map(int, tasks)
            found[Path(f"/proc/{pid}/comm").read_text().strip()] = pid
        return found

    def kill(self) -> None:
        """As a cgroup kill does: everything at once; what it left in /dev/shm goes too."""
        for connection in self._connections:
            connection.close()
        if self.process.poll() is None:
            self.files |= shared_files(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.read()
            self.process.stderr.close()
        for path in self.files:
            Path(path).unlink(missing_ok=True)


class Stream:
    """An answer being streamed, event by event."""

    def __init__(self, engine: Engine, more: JSON) -> None:
        self._connection = engine.connect()
        body: JSON = {"model": engine.name, "messages": [{"role": "user", "content": "hello"}]}
        body |= {"stream": True, "temperature": 0, **more}
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body))
        self.response = self._connection.getresponse()
        self.events: list[JSON] = []
        self.done = False

    def next(self) -> JSON | None:
        """The next event; None: the stream is over."""
        while line := self.response.readline():
            if line == b"data: [DONE]\n":
                self.done = True
            elif line.startswith(b"data: "):
                event: JSON = json.loads(line[6:])
                self.events.append(event)
                return event
        return None

    def read(self) -> str:
        """To its end; the text."""
        while self.next() is not None:
            pass
        self.close()
        return self.text

    @property
    def text(self) -> str:
        choices = [choice for event in self.events for choice in event.get("choices", [])]
        return "".join(choice["delta"].get("content", "") for choice in choices)

    @property
    def finish_reason(self) -> str | None:
        choices = [choice for event in self.events for choice in event.get("choices", [])]
        reason: str | None = choices[-1]["finish_reason"]
        return reason

    def close(self) -> None:
        self.response.close()
        self._connection.close()


def shared_files(pid: int) -> set[str]:
    """What a process maps of /dev/shm and is still there by name."""
    mapped = {
        line.split(maxsplit=5)[5].strip()
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "/dev/shm/" in line
    }
    inodes = {
        int(line.split()[4])
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "/dev/shm/" in line
    }
    # a linked semaphore is mapped under the temporary name glibc made it with; the directory has
    # files of others, which come and go, so none is looked at by its name
    with os.scandir("/dev/shm") as entries:
        linked = {entry.path for entry in entries if entry.inode() in inodes}
    return linked | {path for path in mapped if os.path.exists(path)}


Start = Callable[..., Engine]
