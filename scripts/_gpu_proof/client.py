"""Asking an engine over its unix socket, one connection for each request."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

PROMPTS = ("The capital of France is", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11")
MAX_TOKENS = 16


class ProofError(Exception):
    """A row cannot go on; the text goes into the table."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    def __init__(self, uds: Path, model: str) -> None:
        self.uds = uds
        self._model = model

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float = 120.0
    ) -> Any:
        """The parsed answer; ProofError on anything but 200."""
        connection = _UnixConnection(str(self.uds), timeout)
        try:
            data = json.dumps(body).encode() if body is not None else b""
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request(method, path, body=data, headers=headers)
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ProofError(f"{method} {path}: {str(error) or type(error).__name__}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise ProofError(
                f"{method} {path}: {answer.status} {text[:200].decode(errors='replace')}"
            )
        return json.loads(text) if text else {}

    def healthy(self) -> bool:
        try:
            self.ask("GET", "/health", timeout=5.0)
        except ProofError:
            return False
        return True

    def answers(self) -> list[Any]:
        """Greedy completions with log-probs: what has to be the same after every wake."""
        found = []
        for prompt in PROMPTS:
            body = {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": MAX_TOKENS,
                "temperature": 0,
                "seed": 0,
                "logprobs": 1,
            }
            choice = self.ask("POST", "/v1/completions", body)["choices"][0]
            found.append((choice["text"], (choice.get("logprobs") or {}).get("token_logprobs")))
        return found

    def sleep(self, level: int) -> None:
        self.ask("POST", f"/sleep?level={level}&mode=wait")
        if not self.ask("GET", "/is_sleeping")["is_sleeping"]:
            raise ProofError("/is_sleeping says false after /sleep")

    def wake(self, level: int) -> None:
        """Level 2 in the order that peaks lowest: weights, their contents, then the KV cache."""
        if level == 1:
            self.ask("POST", "/wake_up")
        else:
            self.ask("POST", "/wake_up?tags=weights")
            self.ask("POST", "/collective_rpc", {"method": "reload_weights"})
            self.ask("POST", "/wake_up?tags=kv_cache")
            self.ask("POST", "/reset_prefix_cache")
        if self.ask("GET", "/is_sleeping")["is_sleeping"]:
            raise ProofError("/is_sleeping says true after /wake_up")


def same(answers: list[Any], reference: list[Any], tolerance: float) -> bool:
    """The same words, and log-probs no further apart than that (0: bit for bit)."""
    if [text for text, _ in answers] != [text for text, _ in reference]:
        return False
    pairs = zip(answers, reference, strict=True)
    gaps = [
        abs(now - then)
        for (_, mine), (_, theirs) in pairs
        for now, then in zip(mine or [], theirs or [], strict=True)
        if now is not None and then is not None
    ]
    return max(gaps, default=0.0) <= tolerance
