"""What the SDKs' tests ask of a gateway with engines behind it, whichever engines these are.

All over HTTP, so that the stand-in on this machine and vLLM in a guest are asked the same: of the
gateway with the admin's key, of an engine on its own socket.
"""

from __future__ import annotations

import http.client
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from llmux.config.keyfile import make_key
from llmux.config.schema import KeyRole

ALIASES = ("alef", "org/alpha")  # of the model "alpha"
SECONDS = 120.0  # how long any single wait may take: vLLM answers late on a busy CPU
LOOK_EVERY = 0.02  # seconds
FOR_MINUTES = 60_000  # tokens, at a few hundred a second: nothing of it ends by itself in SECONDS


class Keys:
    """API keys as the gateway's file has them, and what a client sends."""

    def __init__(self) -> None:
        self.use, use = make_key("use")
        self.narrow, narrow = make_key("narrow", max_in_flight=1)
        self.admin, admin = make_key("admin", role=KeyRole.ADMIN)
        self.lines = "".join(f"{line}\n" for line in (use, narrow, admin))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(self._path)


def _sum(text: str, name: str, labels: Mapping[str, str]) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@dataclass
class Front:
    """``chat`` answers at once, ``slow`` may be interrupted while it is ``ready``. ``engines``:
    model → its engine's socket."""

    url: str
    keys: Keys
    models: frozenset[str]
    slow: str
    embedder: str
    dimensions: int  # of its vectors
    engines: Mapping[str, str]
    chat: str = "alpha"

    @contextmanager
    def ready(self) -> Iterator[str]:
        """The slow model is resident."""
        yield self.slow

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the gateway's samples with these labels."""
        request = urllib.request.Request(f"{self.url}/metrics")
        request.add_header("Authorization", f"Bearer {self.keys.admin}")
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return _sum(answer.read().decode(), name, labels)

    def engine_metric(self, model: str, name: str) -> float:
        connection = _UnixConnection(self.engines[model])
        try:
            connection.request("GET", "/metrics")
            return _sum(connection.getresponse().read().decode(), name, {})
        finally:
            connection.close()

    def running(self, model: str) -> float:
        """Requests that the engine says it works on."""
        return self.engine_metric(model, "vllm:num_requests_running")

    def tokens(self, model: str) -> float:
        """That the engine has generated, ever."""
        return self.engine_metric(model, "vllm:generation_tokens_total")

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, "what was waited for has not come"
            time.sleep(LOOK_EVERY)  # what is asked over HTTP has no event

    def until_running(self, model: str, count: int) -> None:
        """In the engine; and then the gateway has as many in flight."""
        self.until(lambda: self.running(model) == count)
        self.until(lambda: self.metric("llmux_in_flight", model=model) == count)
