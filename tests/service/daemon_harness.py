"""The whole embedded daemon as a child process, and a client of it, for the service tests.

Nothing here sleeps. READY, reloads and STATUS are the daemon's own sd_notify datagrams; what it
says is read from a pipe; everything else is an HTTP answer.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import forked
from heard import SECONDS, Datagrams, Heard, Lines

STANDIN = Path(__file__).resolve().parents[1] / "standin"
sys.path.insert(0, str(STANDIN))

from ledger import GIB, Ledger  # noqa: E402  # found by the line above
from vllm_standin import faults  # noqa: E402

__all__ = ["GIB", "POLICY", "SECONDS", "Answer", "Daemon", "Start", "Stream", "in_background"]

JSON = dict[str, Any]
T = TypeVar("T")

# An answer that came so soon did not wait for a limit that these tests leave as it is (30 s and
# more), nor for a fault (60 s). A busy machine adds seconds to any answer.
AT_ONCE = 20.0
SHARED_MEMORY = Path("/dev/shm")

POLICY: JSON = {
    "policy_type": "fifo",
    "min_active_secs": 0,
    "request_timeout_secs": 40,
    "drain_timeout_secs": 30,
    "backoff_secs": 30,  # longer than any test: what is refused for backing off stays refused
    "eviction": "offload+keep_running",
}


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, seconds: float = SECONDS) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    def json(self) -> JSON:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value

    @property
    def text(self) -> str:
        """What the model said."""
        choice = self.json()["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])

    @property
    def code(self) -> str:
        return str(self.json()["error"]["code"])

    @property
    def message(self) -> str:
        return str(self.json()["error"]["message"])


class Stream:
    """A server-sent stream being read, event by event."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response
        self.status = response.status
        self.events: list[JSON] = []
        self.done = False

    def next(self) -> JSON | None:
        """The next event that is not [DONE]; None at the end."""
        while line := self._response.readline():
            if not line.startswith(b"data: "):
                continue
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                self.done = True
                continue
            event = json.loads(data)
            assert isinstance(event, dict)
            self.events.append(event)
            return event
        return None

    def wait_for_token(self) -> None:
        """Until something of the answer itself has come."""
        while (event := self.next()) is not None:
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                return
        raise AssertionError(f"the stream ended without a token: {self.events}")

    def rest(self) -> None:
        with contextlib.suppress(http.client.IncompleteRead):
            while self.next() is not None:
                pass

    @property
    def text(self) -> str:
        return "".join(
            choice["delta"].get("content") or ""
            for event in self.events
            for choice in event.get("choices", ())
        )

    @property
    def errors(self) -> list[JSON]:
        return [event["error"] for event in self.events if "error" in event]


@dataclass
class Daemon:
    """``llmux serve``. ``models`` is what the configuration file says now, besides the rest."""

    directory: Path
    models: dict[str, JSON]
    policy: JSON = field(default_factory=dict)
    top: JSON = field(default_factory=dict)
    gpus: int = 1
    environ: JSON = field(default_factory=dict)  # of the daemon, besides the usual
    arguments: tuple[str, ...] = ()  # of `llmux serve`, besides the configuration
    answer_secs: float = SECONDS  # how long any answer may take
    own_interpreter: bool = False

    def __post_init__(self) -> None:
        self.config_file = self.directory / "config.json"
        self.http = str(self.directory / "http.sock")
        self.ledger = Ledger(str(self.directory / "ledger.json"))
        self.ledger.init(self.gpus)
        self._before = set(os.listdir(SHARED_MEMORY))

    # ---- the process ----------------------------------------------------------------------------

    def start(self) -> None:
        self.write_config()
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = str(self.directory / "notify.sock")
        notify.bind(path)
        self.notified = Heard(Datagrams(notify))
        env = {key: value for key, value in os.environ.items() if not key.startswith("STANDIN_")}
        env |= {
            "NOTIFY_SOCKET": path,
            "LLMUX_GPU_LEDGER": self.ledger.path,
            "STANDIN_LEDGER": self.ledger.path,
            "TMPDIR": str(self.directory),
        }
        env |= self.environ
        env.pop("XDG_RUNTIME_DIR", None)
        words = ["-m", "llmux", "serve", "-c", str(self.config_file), *self.arguments]
        self.process = forked.start(
            words, env=env, stderr=subprocess.PIPE, own_interpreter=self.own_interpreter
        )
        self.log = Heard(Lines(self.process.stderr))
        waiting = in_background(lambda: self.notified.wait("READY=1"))
        ended = in_background(self.process.wait)
        futures.wait([waiting, ended], SECONDS, futures.FIRST_COMPLETED)
        assert waiting.done(), "\n".join(self.log.since(0))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends the daemon; its exit status. All engines that it had are seen gone."""
        pids = self.all_pids()
        self.process.send_signal(number)
        status = self.process.wait(SECONDS)
        self.log.join()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as farewell:
            farewell.sendto(b"", str(self.directory / "notify.sock"))
        self.notified.join()
        for pid in pids:
            wait_gone(pid)
        if number != signal.SIGKILL:
            assert not list(self.directory.glob("llmux-*")), "its directory of sockets goes with it"
        self._tidy()
        return status

    def _tidy(self) -> None:
        """Killed engines leave their semaphores in /dev/shm, as vLLM's do."""
        for name in set(os.listdir(SHARED_MEMORY)) - self._before:
            if name.startswith(("psm_", "sem.mp-")) and not _is_mapped(name):
                with contextlib.suppress(FileNotFoundError):
                    (SHARED_MEMORY / name).unlink()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def all_pids(self) -> set[int]:
        """The daemon's whole tree: guardians, engines and what those started."""
        return descendants(self.process.pid)

    # ---- configuration and orders ---------------------------------------------------------------

    def write_config(self) -> None:
        gateway = {"listen": [f"unix:{self.http}"]} | self.top.get("gateway", {})
        document = {
            "metrics_port": 0,
            "vllm_command": [sys.executable, "-S", "-E", str(STANDIN / "standin.py")],
            "startup_timeout_secs": 30,
            "policy": POLICY | self.policy,
            "models": {name: self._model(name, model) for name, model in self.models.items()},
        } | self.top
        document["gateway"] = gateway
        self.config_file.write_text(json.dumps(document, indent=1))

    def _model(self, name: str, model: JSON) -> JSON:
        env = {"STANDIN_FAULTS": str(self._faults(name))} | model.get("env", {})
        return {"model_path": f"models/{name}", "stop_grace_secs": 2} | model | {"env": env}

    def _faults(self, model: str) -> Path:
        return self.directory / f"{model}.faults"

    def order(self, model: str, **orders: Any) -> None:
        """Make the model's engine misbehave, or behave again; it is looked at from now on."""
        faults.order(self._faults(model), **orders)

    def reload(self) -> list[str]:
        """SIGHUP; what was notified until it was over."""
        self.write_config()
        mark = self.notified.mark()
        self.process.send_signal(signal.SIGHUP)
        began = self.notified.wait("RELOADING=1", since=mark)
        over = self.notified.wait("READY=1", since=began)
        return self.notified.since(mark)[: over + 1 - mark]

    def set_models(self, models: dict[str, JSON], **policy: Any) -> None:
        """Reload with just these, and see the gateway know them."""
        self.models, self.policy = models, policy
        self.reload()
        self.until(lambda: self.listed() == set(models))

    @staticmethod
    def encode(body: JSON) -> bytes:
        return json.dumps(body).encode()

    # ---- a client -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = UnixConnection(self.http, self.answer_secs)
        try:
            yield connection
        finally:
            connection.close()

    def request(self, method: str, path: str, body: bytes | JSON | None = None) -> Answer:
        began = time.monotonic()
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        with self.connection() as connection:
            connection.request(method, path, data)
            response = connection.getresponse()
            text = response.read()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, text, time.monotonic() - began)

    def chat(self, model: str, text: str = "hello", **more: Any) -> Answer:
        return self.request("POST", "/v1/chat/completions", chat_body(model, text, **more))

    @contextlib.contextmanager
    def stream(self, model: str, text: str = "hello", **more: Any) -> Iterator[Stream]:
        with self.connection() as connection:
            body = chat_body(model, text, stream=True, **more)
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            with connection.getresponse() as response:
                yield Stream(response)

    def ask(self, verb: str, **args: Any) -> Answer:
        return self.request("POST", f"/control/{verb}", args)

    def load(self, model: str) -> None:
        answer = self.ask("wake", model=model)
        assert answer.status == 200, answer.body

    def park(self, model: str, eviction: str | None = None) -> None:
        args = {} if eviction is None else {"eviction": eviction}
        answer = self.ask("sleep", model=model, **args)
        assert answer.status == 200, answer.body

    def status(self) -> JSON:
        return self.request("GET", "/control/status").json()

    def model(self, name: str) -> JSON:
        found = self.status()["models"][name]
        assert isinstance(found, dict)
        return found

    def listed(self) -> set[str]:
        return {entry["id"] for entry in self.request("GET", "/v1/models").json()["data"]}

    def listed_as(self, model: str) -> JSON:
        """The model's entry in /v1/models."""
        entries = self.request("GET", "/v1/models").json()["data"]
        return next(entry for entry in entries if entry["id"] == model)

    def until(self, condition: Callable[[], bool]) -> None:
        """Ask again and again; every question is a whole HTTP exchange, so it does not spin."""
        ends = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < ends, self.status()

    def memory(self) -> dict[str, float]:
        """GiB that each model's engine holds on the GPUs, those that hold any."""
        usage: dict[str, float] = {}
        for row in self.ledger.rows():
            usage[row.model] = usage.get(row.model, 0.0) + row.nbytes / GIB
        return usage


Start = Callable[..., Daemon]


def chat_body(model: str, text: str, **more: Any) -> JSON:
    message = {"role": "user", "content": text}
    return {"model": model, "messages": [message], "temperature": 0} | more


def in_background(work: Callable[[], T]) -> Future[T]:
    """Run ``work`` in a thread of its own; ``.result(SECONDS)`` is how it ended."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# ---- processes ----------------------------------------------------------------------------------


def descendants(root: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as stat:
                parent = int(stat.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found: set[int] = set()
    pending = [root]
    while pending:
        pid = pending.pop()
        found.add(pid)
        pending += children.get(pid, [])
    return found


def wait_gone(pid: int) -> None:
    """Returns when the process has ended; a pidfd becomes readable then."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(SECONDS * 1000), f"process {pid} is still there"
    finally:
        os.close(fd)


def _is_mapped(name: str) -> bool:
    """Does any process still use this file of /dev/shm? Another test's engine might."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if f"/dev/shm/{name}" in Path(f"/proc/{entry}/maps").read_text():
                    return True
    return False
