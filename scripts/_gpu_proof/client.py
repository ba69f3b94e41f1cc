"""Asking an engine over its unix socket, one connection for each request."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
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
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float = 600.0
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
            raise ProofError(f"{method} {path}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise ProofError(
                f"{method} {path}: {answer.status} {text[:200].decode(errors='replace')}"
            )
        return json.loads(text) if text else {}

    def wait_healthy(self, seconds: float, alive: Callable[[], str | None]) -> None:
        """Until /health says 200. ``alive`` returns why not, when the process has ended."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.ask("GET", "/health", timeout=5.0)
                return
            except ProofError as error:
                ended = alive()
                if ended is not None:
                    raise ProofError(f"the engine ended: {ended}") from error
                if time.monotonic() > end:
                    raise ProofError(f"not healthy after {seconds:.0f} s: {error}") from error
            select.select([], [], [], 0.05)  # an engine tells nobody when it is ready

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


class Engine:
    """One engine process tree: our child or, after a CRIU restore, a pid that is not."""

    def __init__(
        self, argv: list[str], env: dict[str, str], client: Client, log: Path, startup: float
    ) -> None:
        self._argv = argv
        self._env = env
        self._log = log
        self._startup = startup
        self._child: subprocess.Popen[bytes] | None = None
        self.client = client
        self.pid = 0

    def start(self, preexec: Callable[[], None] | None = None) -> float:
        """Seconds from start to healthy."""
        begun = time.monotonic()
        self.client.uds.unlink(missing_ok=True)
        # Its own session, no terminal, an append-only log: what CRIU can restore.
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
                preexec_fn=preexec,
            )
        self.pid = self._child.pid
        self.client.wait_healthy(self._startup, self.ended)
        return time.monotonic() - begun

    @property
    def running(self) -> bool:
        return self.pid != 0 and self.ended() is None

    def ended(self) -> str | None:
        if self._child is not None:
            status = self._child.poll()
            return None if status is None else f"status {status}; {self.last_words()}"
        return None if Path(f"/proc/{self.pid}").exists() else "gone"

    def last_words(self) -> str:
        if not self._log.exists():
            return ""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-300:]

    def reap(self) -> None:
        """CRIU has killed it: only when the zombie is gone is its pid free for the restore."""
        if self._child is not None:
            self._child.wait(30)
            self._child = None

    def adopt(self, pid: int) -> None:
        self.pid = pid

    def tree(self) -> list[int]:
        """The process and all its descendants."""
        pids = [self.pid]
        for pid in pids:
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:
                continue
            pids += [int(child) for child in children]
        return pids

    def kill(self) -> None:
        """The whole tree, and it is seen gone. Only pids that descend from what we started."""
        if not self.pid:
            return
        pids = self.tree() if self.running else []
        watched = []
        for pid in pids:
            try:
                watched.append(os.pidfd_open(pid))
            except ProcessLookupError:
                continue
        for fd in watched:
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._child is not None:
            self._child.wait(60)
        for fd in watched:
            select.select([fd], [], [], 60.0)
            os.close(fd)
        self._child, self.pid = None, 0
