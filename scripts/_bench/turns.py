"""Models take turns on one prompt; what each answer was and what it took, as JSON lines.

Runs beside llmux, in the guest, so that nothing between host and guest is measured. Standard
library only: ``python3 turns.py URL MODEL MODEL …``, a request for each MODEL, one by one.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

TIMEOUT = 300.0
PROMPT = "Once upon a time there was"
TOKENS = 16


class UnixConnection(http.client.HTTPConnection):
    """An engine without llmux in between. Closed at the end of a ``with``."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)

    def __enter__(self) -> UnixConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Turn:
    """One request. ``switch``, ``phases``: how the model became resident for it, as llmux says."""

    model: str
    first_token_s: float = 0.0
    seconds: float = 0.0
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    answered_by: str = ""
    problem: str = ""
    waited_ms: float = 0.0
    switch: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def wake_to_first_token_s(self) -> float:
        """From the moment that the GPU was free for it: what another model's parking cost is not
        this one's start."""
        return self.first_token_s - self.switch["drain_secs"] - self.switch["park_secs"]


def complete(connection: http.client.HTTPConnection, model: str) -> Turn:
    """A greedy streamed completion with its log-probs, as the engine wrote them."""
    turn = Turn(model)
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "temperature": 0,
        "seed": 0,
        "logprobs": 1,
        "stream": True,
        "ignore_eos": True,
    }
    began = time.monotonic()
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    turn.waited_ms = float(response.headers.get("X-Llmux-Wait-Ms") or 0)
    if response.status != 200:
        turn.problem = f"status {response.status}: {response.read()[:500]!r}"
        return turn
    done = False
    for line in response:
        if line.startswith(b":"):
            continue  # a comment: a sign of life
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            done = True
        elif data:
            if not turn.first_token_s:
                turn.first_token_s = time.monotonic() - began
            chunk = json.loads(data)
            if "error" in chunk:
                turn.problem = f"error in the stream: {chunk['error']}"
                return turn
            turn.answered_by = chunk["model"]
            for choice in chunk["choices"]:
                turn.text += choice["text"]
                turn.logprobs += choice["logprobs"]["token_logprobs"]
    turn.seconds = time.monotonic() - began
    if not done:
        turn.problem = "the stream ended without [DONE]"
    elif len(turn.logprobs) != TOKENS:
        turn.problem = f"{len(turn.logprobs)} tokens instead of {TOKENS}"
    elif turn.answered_by != model:
        turn.problem = f"answered by {turn.answered_by!r}"
    return turn


def take_turn(host: str, port: int, model: str) -> Turn:
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        turn = complete(connection, model)
        connection.request("GET", "/control/status")
        about = json.loads(connection.getresponse().read())["models"][model]
    finally:
        connection.close()
    turn.switch = about["last_switch"] or {}
    turn.phases = about["last_phases"]
    return turn


def main(url: str, *models: str) -> int:
    parts = urlsplit(url)
    for model in models:
        turn = take_turn(parts.hostname or "127.0.0.1", parts.port or 80, model)
        print(json.dumps(asdict(turn)), flush=True)
        if turn.problem:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
