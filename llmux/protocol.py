"""The messages between supervisor, gateway workers and the command line.

Newline-delimited JSON over a unix stream socket, one message a line: at most ``MAX_LINE`` bytes to
the supervisor, ``MAX_ANSWER`` from it (the status of a thousand models has one or two MiB).
The peer's credentials (SO_PEERCRED) decide which verbs it may speak; nothing in a message does.

A *grant* lets a worker send requests for a model straight to its engine while it holds the grant's
epoch. *Revoke* ends that: no new request on that epoch; running ones finish, then *drained*. A
worker that disconnects loses its grants and its demand; one that reconnects lists the epochs it
holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, ClassVar, Final, Self

from llmux import typed_json
from llmux.errors import ControlError, UnknownMessage
from llmux.typed_json import LARGEST_INT, BadJson, Within

PROTOCOL_VERSION = 1
MAX_LINE = 1024 * 1024
MAX_ANSWER = 32 * MAX_LINE
OF_CONNECTION: Final = 0  # the id of an answer to no ask: why the connection is refused
MAX_REQUESTS: Final = 1_000_000  # at once in one worker; its descriptors end long before

Requests = Annotated[int, Within(0, MAX_REQUESTS)]
Counter = Annotated[int, Within(0, LARGEST_INT)]
Seconds = Annotated[float, Within(0, LARGEST_INT)]


@dataclass(frozen=True, slots=True)
class Address:
    """The address of an engine's HTTP API: a unix socket path, or a TCP port on 127.0.0.1."""

    uds: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        return f"unix:{self.uds}" if self.uds else f"127.0.0.1:{self.port}"


class Message:
    """Base of all messages; ``kind`` is the value of ``"type"`` on the wire."""

    kind: ClassVar[str]
    registry: ClassVar[dict[str, type[Message]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # slots=True makes dataclass build the class twice; the second registration wins.
        Message.registry[cls.kind] = cls

    def encode(self) -> bytes:
        # Not asdict(): it copies the fields' contents, a metrics snapshot of 50 models in 20 ms.
        own = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # dataclass
        body = {"type": self.kind, **own}
        return json.dumps(body, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Self:
        """Raises BadJson when a field is missing or not of its annotated type."""
        return typed_json.read(cls, body)


# ---- worker → supervisor ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """First message of every connection. ``holds``: model → the epoch a worker still holds."""

    kind: ClassVar[str] = "hello"
    role: str  # "gateway" or "cli"
    worker: str = ""  # unique per worker process
    holds: dict[str, str] = field(default_factory=dict)
    version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Demand(Message):
    """One worker's counts for one model, sent when they change, at most every few ms.

    ``in_flight`` counts requests admitted on any epoch until their last byte or their client's
    disconnect. ``progress`` grows whenever the engine sent bytes for any of them. ``completed``
    counts requests that succeeded since the worker started. ``repeated`` were in flight when the
    last engine died: until one succeeded and what killed it is not sought any more.
    """

    kind: ClassVar[str] = "demand"
    model: str
    waiting: Requests = 0
    oldest_age: Seconds | None = None  # the longest waiter has waited
    in_flight: Requests = 0
    progress: Counter = 0
    completed: Counter = 0
    repeated: Requests = 0


@dataclass(frozen=True, slots=True)
class Drained(Message):
    """Nothing is in flight on that epoch and no connection to the engine is open."""

    kind: ClassVar[str] = "drained"
    model: str
    epoch: str


@dataclass(frozen=True, slots=True)
class EngineLost(Message):
    """The engine refused or broke a connection: the supervisor should check it now."""

    kind: ClassVar[str] = "engine_lost"
    model: str
    epoch: str
    error: str


@dataclass(frozen=True, slots=True)
class KeepAliveHint(Message):
    """A request says for how long its model may stay resident without use; None: for ever."""

    kind: ClassVar[str] = "keep_alive"
    model: str
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ResponseOwners(Message):
    """Stored responses: id → model, and id → name of the key that made it, where there was one. The
    verb "response" looks one up, for any worker."""

    kind: ClassVar[str] = "kept"
    responses: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


# ---- supervisor → worker ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as /v1/models shows it."""

    name: str
    state: str
    created: int = 0
    max_model_len: int | None = None
    aliases: list[str] = field(default_factory=list)
    switch_secs: float | None = None  # its last switch, including the time to make room
    adapters: list[str] = field(default_factory=list)  # models of their own at the same engine
    stale: bool = False  # its engine was started otherwise than the configuration now says


@dataclass(frozen=True, slots=True)
class Catalog(Message):
    """All models and their states; sent after hello and after every change."""

    kind: ClassVar[str] = "catalog"
    models: list[dict[str, Any]] = field(default_factory=list)
    # Seconds in force, by their keys: request_timeout_secs, min_active_secs, and as
    # startup_timeout_secs the longest of any model.
    times: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, models: list[ModelInfo], **times: float) -> Self:
        return cls([asdict(model) for model in models], times)

    def infos(self) -> list[ModelInfo]:
        known = {item.name for item in fields(ModelInfo)}  # a newer supervisor may say more
        return [
            ModelInfo(**{key: value for key, value in model.items() if key in known})
            for model in self.models
        ]


@dataclass(frozen=True, slots=True)
class Grant(Message):
    """Requests for ``model`` may go straight to ``address`` while ``epoch`` is held.

    All requests waiting for the model are admitted at once and counted in flight before the next
    message is read: a revoke that follows waits for them.
    """

    kind: ClassVar[str] = "grant"
    model: str
    epoch: str
    uds: str | None = None
    port: int | None = None

    @property
    def address(self) -> Address:
        return Address(self.uds, self.port)


@dataclass(frozen=True, slots=True)
class Revoke(Message):
    """Admit nothing more on ``epoch``; send *drained* when the last request on it has ended.

    ``dead``: the engine is gone; requests without a byte of response wait again.
    """

    kind: ClassVar[str] = "revoke"
    model: str
    epoch: str
    dead: bool = False


@dataclass(frozen=True, slots=True)
class Cut(Message):
    """The drain deadline passed: end the requests in flight on ``epoch`` with this error."""

    kind: ClassVar[str] = "cut"
    model: str
    epoch: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Refuse(Message):
    """Refuse every request waiting for ``model`` with this error."""

    kind: ClassVar[str] = "refuse"
    model: str
    code: str
    message: str
    retry_after: float | None = None


# ---- ask and answer (command line and /control) -----------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask(Message):
    """A question or an order; answered by exactly one ``Answer`` with the same id."""

    kind: ClassVar[str] = "ask"
    id: int
    verb: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer(Message):
    kind: ClassVar[str] = "answer"
    id: int
    ok: bool
    result: Any = None
    code: str | None = None  # a Reason when not ok
    message: str | None = None
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Progress(Message):
    """The progress of the ask with this id; any number of them before its answer.

    ``seconds`` since the ask. ``done`` and ``total`` are bytes; 0 = unknown.
    """

    kind: ClassVar[str] = "progress"
    id: int
    phase: str
    seconds: float
    done: int = 0
    total: int = 0


ProgressCallback = Callable[[str, float, int, int], None]  # a Progress without its id


# ---- watching -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Watch(Message):
    """Start or stop sending news of a topic on this connection.

    ``topic`` is "events" (every transition and switch), "timeline" (lengths of queues as well) or
    "logs" (the lines of ``model``'s engine).
    """

    kind: ClassVar[str] = "watch"
    topic: str
    model: str = ""
    on: bool = True


@dataclass(frozen=True, slots=True)
class News(Message):
    """For watchers of a topic: one event (an object) or one line (a string)."""

    kind: ClassVar[str] = "news"
    topic: str
    model: str
    item: Any


@dataclass(frozen=True, slots=True)
class Collect(Message):
    """Ask a worker for its metrics. Answered by Collected with the same id."""

    kind: ClassVar[str] = "collect"
    id: int


@dataclass(frozen=True, slots=True)
class Collected(Message):
    kind: ClassVar[str] = "collected"
    id: int
    snapshot: dict[str, Any] = field(default_factory=dict)


def decode(line: bytes) -> Message:
    """Parse one line. Raises ControlError, or UnknownMessage for an unknown type."""
    try:
        body = typed_json.parse(line)
    except BadJson as error:
        raise ControlError(f"cannot read a control message: {error}: {line[:80]!r}") from error
    if not isinstance(body, dict):
        raise ControlError(f"cannot read a control message: not an object: {line[:80]!r}")
    cls = Message.registry.get(str(body.get("type")))
    if cls is None:
        raise UnknownMessage(f"cannot read a control message: unknown type {body.get('type')!r}")
    try:
        return cls.from_body(body)
    except BadJson as error:
        raise ControlError(f"cannot read a {cls.kind} message: {error}") from error
