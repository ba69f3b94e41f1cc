"""The exception tree. Text is for people; code branches on the class or on ``Reason``.

Wording: lower case, "cannot …", names the object, then the cause; ``hint`` is the next step.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Reason(StrEnum):
    """Why a request was refused. The value is the machine-readable code that clients see."""

    UNKNOWN_MODEL = "model_not_found"
    BAD_REQUEST = "invalid_request"
    WAIT_EXPIRED = "wait_expired"
    START_FAILED = "model_start_failed"
    BACKING_OFF = "model_backing_off"
    ENGINE_DIED = "engine_died"
    ENGINE_UNREACHABLE = "engine_unreachable"
    MALFORMED_ANSWER = "malformed_answer"
    CUT_BY_SWITCH = "cut_by_switch"
    MANUAL_MODE = "manual_mode"
    CANCELLED = "cancelled"
    PINNED = "pinned_models_in_the_way"
    SHUTTING_DOWN = "shutting_down"
    CANNOT_FIT = "model_cannot_fit"
    ALREADY_RUNNING = "already_running"
    QUEUE_FULL = "queue_full"
    OVERLOADED = "model_overloaded"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    NO_KEY = "invalid_api_key"
    FORBIDDEN = "forbidden"
    RATE_LIMITED = "rate_limit_exceeded"
    SUPERVISOR_UNREACHABLE = "supervisor_unreachable"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    INTERNAL = "internal_error"


class LlmuxError(Exception):
    """Root of everything that llmux raises on purpose."""

    def __init__(self, message: str, *, hint: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields = fields

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing wrong with a configuration file, printed ``file:line:col: path: message``."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line}:{self.column}: {self.path or '(top level)'}: {self.message}"
        )


class ConfigError(LlmuxError):
    """The configuration cannot be used. Carries every problem found, in file order."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        count = len(problems)
        super().__init__(
            f"cannot use the configuration: {count} problem{'s' if count != 1 else ''}",
            hint="run `llmux check` after mending the file",
        )
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {problem}" for problem in self.problems)])


class Refused(LlmuxError):
    """A request got a definite no. ``retry_after`` in seconds when trying again makes sense."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        retry_after: float | None = None,
        hint: str | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, hint=hint, **fields)
        self.reason = reason
        self.retry_after = retry_after


class DriverError(LlmuxError):
    """An act on the outside world failed; ``operation`` and ``target`` say which."""

    def __init__(
        self, operation: str, target: str, message: str, *, hint: str | None = None, **fields: Any
    ) -> None:
        super().__init__(f"cannot {operation} {target}: {message}", hint=hint, **fields)
        self.operation = operation
        self.target = target


class DriverTimeout(DriverError):
    """The deadline passed; what really happened is unknown until it is observed."""


class Unsupported(DriverError):
    """The kernel, a tool or a version lacks what the operation needs."""


class UnitFailed(DriverError):
    """systemd (or the process launcher) did not bring the unit up or down."""


class FreezeFailed(DriverError):
    """The cgroup did not reach the frozen (or thawed) state."""


class TreeState(StrEnum):
    """What a failed checkpoint left of the engine's processes."""

    RUNNING = "running"  # unharmed: they may serve on
    BROKEN = "broken"  # or unknown: they must be killed
    GONE = "gone"


class Blame(StrEnum):
    """The cause of a failed checkpoint or restore, which decides what may be tried again."""

    ENGINE = "engine"  # what its processes hold or did: it fails again until that has changed
    IMAGE = "image"  # the image must not be used again
    HOST = "host"  # memory, disk, a taken pid, a tool: it may succeed later


class CheckpointFailed(DriverError):
    """CUDA or CRIU could not checkpoint or restore; the message carries an excerpt of its log."""

    def __init__(
        self,
        operation: str,
        target: str,
        message: str,
        *,
        tree: TreeState = TreeState.BROKEN,
        blame: Blame = Blame.HOST,
        hint: str | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(operation, target, message, hint=hint, **fields)
        self.tree = tree
        self.blame = blame


class EngineUnhealthy(DriverError):
    """The engine answered wrongly, not at all, or died."""


class MemoryNotReleased(DriverError):
    """After parking, the GPU observer still sees the engine's memory."""


class OrderTimeout(LlmuxError):
    """The time that an operator gave an order is over; it was withdrawn."""


class ControlError(LlmuxError):
    """The supervisor's control socket cannot be reached or broke the protocol."""


class UnknownMessage(ControlError):
    """A message of a type that this version does not have: a newer peer may send it."""


class StateFileError(LlmuxError):
    """The state file is unreadable or written by a newer version."""


class InvariantError(LlmuxError):
    """A thing that cannot happen happened. The process ends; systemd restarts it."""
