"""The command line's end of the control socket. Synchronous: one question, one answer."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

from llmux.errors import ControlError, LlmuxError, Reason, Refused
from llmux.protocol import MAX_LINE, Answer, Ask, Hello, Progress, Tell, decode

IS_IT_RUNNING = (
    "is it running? `systemctl status llmux`; `llmux serve` names its own --socket as it starts"
)


class NotRunningError(ControlError):
    """No supervisor listens: what does not need one may be done without."""


def ask(
    path: str,
    verb: str,
    args: Mapping[str, Any] | None = None,
    *,
    timeout: float | None = None,
    progress: Tell | None = None,
) -> Any:
    """The verb's result. Raises Refused with the supervisor's reason, ControlError when it cannot
    be reached. ``timeout`` in seconds; None = as long as the supervisor itself bounds it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(path)
            sock.sendall(Hello(role="cli").encode() + Ask(1, verb, dict(args or {})).encode())
            with sock.makefile("rb") as lines:
                while line := lines.readline(MAX_LINE * 4):
                    message = decode(line)
                    if isinstance(message, Progress) and progress is not None:
                        progress(message.phase, message.seconds, message.done, message.total)
                    if isinstance(message, Answer) and message.id == 1:
                        return _result(message)
        except FileNotFoundError as error:
            raise NotRunningError(
                f"cannot reach the supervisor: {path} does not exist", hint=IS_IT_RUNNING
            ) from error
        except ConnectionRefusedError as error:
            raise NotRunningError(
                f"cannot reach the supervisor: nobody listens at {path}", hint=IS_IT_RUNNING
            ) from error
        except PermissionError as error:
            raise ControlError(
                f"cannot reach the supervisor: no permission for {path}",
                hint="run as root",
            ) from error
        except (OSError, json.JSONDecodeError) as error:
            raise ControlError(
                f"cannot talk to the supervisor at {path}: {error}",
                hint="`systemctl status llmux`, `journalctl -u llmux`",
            ) from error
    raise ControlError(
        f"the supervisor closed the connection at {path} without an answer",
        hint="only root and members of the service may ask; see `journalctl -u llmux`",
    )


def _result(answer: Answer) -> Any:
    if answer.ok:
        return answer.result
    try:
        reason = Reason(answer.code or "")
    except ValueError:
        reason = Reason.INTERNAL
    if reason is Reason.INTERNAL:  # it was tried, and failed
        raise LlmuxError(answer.message or "failed")
    raise Refused(reason, answer.message or "refused", retry_after=answer.retry_after)
