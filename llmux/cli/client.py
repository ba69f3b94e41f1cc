"""The command line's end of the control socket: one request, one answer, blocking."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llmux.errors import ControlError, LlmuxError, Reason, Refused
from llmux.printable import printable, printable_tree
from llmux.protocol import (
    MAX_ANSWER,
    OF_CONNECTION,
    Answer,
    Ask,
    Hello,
    Progress,
    ProgressCallback,
    decode,
)

IS_IT_RUNNING = (
    "is it running? `systemctl status llmux`; `llmux serve` names its own --socket as it starts"
)


class NotRunningError(ControlError):
    """No supervisor listens; some verbs work without one."""


def ask(
    path: str,
    verb: str,
    args: Mapping[str, Any] | None = None,
    *,
    timeout: float | None = None,
    progress: ProgressCallback | None = None,
) -> Any:
    """Return the verb's result. Raises Refused with the supervisor's reason, ControlError when the
    supervisor cannot be reached. ``timeout`` in seconds; None leaves it to the supervisor."""
    return Question(path, verb, args or {}, timeout, progress).answer()


class Question:
    """One verb on a connection of its own, which another thread may give up."""

    def __init__(
        self,
        path: str,
        verb: str,
        args: Mapping[str, Any],
        timeout: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        self._path = path
        self._ask = Ask(1, verb, dict(args))
        self._progress = progress
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)

    def abandon(self) -> None:
        """End the connection, and with it the order; ``answer`` raises ControlError."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def answer(self) -> Any:
        """Once; see ``ask``."""
        path = self._path
        try:
            with self._socket:
                self._socket.connect(path)
                with suppress(BrokenPipeError):  # who is refused can read why
                    self._socket.sendall(Hello(role="cli").encode() + self._ask.encode())
                if (answer := self._read()) is not None:
                    return _result(answer)
        except FileNotFoundError as error:
            raise NotRunningError(
                f"cannot reach the supervisor: {path} does not exist", hint=IS_IT_RUNNING
            ) from error
        except ConnectionRefusedError as error:
            raise NotRunningError(
                f"cannot reach the supervisor: no process listens at {path}", hint=IS_IT_RUNNING
            ) from error
        except PermissionError as error:
            raise ControlError(
                f"cannot reach the supervisor: no permission for {path}",
                hint="use sudo, or be a member of group llmux-admin (from the next login on)",
            ) from error
        except (OSError, json.JSONDecodeError) as error:
            raise ControlError(
                f"cannot talk to the supervisor at {path}: {error}",
                hint="`systemctl status llmux`, `journalctl -u llmux`",
            ) from error
        raise ControlError(
            f"the supervisor closed the connection at {path} without an answer",
            hint="it may be restarting; only root and members of group llmux-admin may ask:"
            " `journalctl -u llmux`",
        )

    def _read(self) -> Answer | None:
        """The answer; None when the connection ends before it."""
        with self._socket.makefile("rb") as lines:
            while line := lines.readline(MAX_ANSWER):
                message = decode(line)
                if isinstance(message, Progress) and self._progress is not None:
                    self._progress(message.phase, message.seconds, message.done, message.total)
                if isinstance(message, Answer) and message.id in (self._ask.id, OF_CONNECTION):
                    return message
        return None


def _result(answer: Answer) -> Any:
    # Engines' and clients' words are in it, and this is root's terminal.
    if answer.ok:
        return printable_tree(answer.result)
    message = printable(answer.message or "")
    try:
        reason = Reason(answer.code or "")
    except ValueError:
        reason = Reason.INTERNAL
    if reason is Reason.INTERNAL:  # it was tried, and failed
        raise LlmuxError(message or "failed")
    raise Refused(reason, message or "refused", retry_after=answer.retry_after)
