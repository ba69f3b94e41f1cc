"""An image's stream over ssh: the other host's own `llmux images import` reads it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from typing import IO

from llmux.errors import LlmuxError


def received_there(host: str, model: str) -> str:
    """What `llmux images received` prints on ``host``. Raises LlmuxError."""
    done = subprocess.run(
        [*_ssh(host), shlex.join(["llmux", "images", "received", model])],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        check=False,
        text=True,
    )
    if done.returncode != 0:
        raise LlmuxError(
            f"cannot export to {host}: ssh ended with status {done.returncode}",
            hint=f"does `ssh {host} llmux version` work, and as root?",
        )
    return done.stdout.strip()


def import_there(host: str, write: Callable[[IO[bytes]], None]) -> None:
    """Raises LlmuxError when the other host did not take the image; it says why on stderr."""
    with subprocess.Popen([*_ssh(host), "llmux images import"], stdin=subprocess.PIPE) as running:
        assert running.stdin is not None
        try:
            write(running.stdin)
            running.stdin.close()
        except BrokenPipeError:
            pass  # it has said why
        status = running.wait()
    if status != 0:
        raise LlmuxError(
            f"cannot export to {host}: its `llmux images import` ended with status {status}",
            hint="see its message above",
        )


def _ssh(host: str) -> list[str]:
    if host.startswith("-"):
        raise LlmuxError(f"cannot export to {host!r}: not a host")
    return ["ssh", "-o", "BatchMode=yes", "--", host]
