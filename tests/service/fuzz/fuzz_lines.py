"""Lines for the control socket: of the right type, of another, and no messages at all.

A line follows from the random generator alone. Nothing here names a worker that exists.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable

from llmux.protocol import MAX_LINE, Hello, Message

MODELS = ("alpha", "beta", "gamma", "delta")
VERBS = (
    "status", "eviction_get", "eviction_set", "mode", "pin", "unpin", "switch", "sleep", "wake",
    "load", "unload", "restart", "checkpoint", "restore", "validate", "cancel", "orders", "logs",
    "events", "response", "metrics", "reload", "images", "image_remove", "image_prune",
    "image_here", "image_adopt", "nothing",
)  # fmt: skip
WORDS = (
    *MODELS, "", "x", "alpha.1", "events", "logs", "timeline", "gateway", "cli", "auto", "manual",
    "offload+keep_running", "retain+stop", "offload+checkpoint", "../../etc", "\x1b[2J", "\ud800",
    "x" * 5000, "9" * 5000,
)  # fmt: skip
NUMBERS = (0, 1, -1, 7, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, True)


class Lines:
    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self._names = {
            cls: [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # dataclass
            for cls in Message.registry.values()
        }

    def hello(self) -> bytes:
        """One that is mostly right, so that what follows is read at all."""
        role = self.random.choice(("gateway", "cli"))
        worker = f"fuzz-{self.random.randrange(4)}" if role == "gateway" else ""
        holds = {self.random.choice(MODELS): "alpha.1"} if self.random.random() < 0.2 else {}
        return Hello(role=role, worker=worker, holds=holds).encode()

    def connection(self) -> list[bytes]:
        """All lines of one connection."""
        lines = [self.line() for _ in range(self.random.randrange(12))]
        return lines if self.random.random() < 0.1 else [self.hello(), *lines]

    def line(self) -> bytes:
        makers: dict[Callable[[], bytes], int] = {
            self._message: 40, self._ask: 40, self._value: 6, self._noise: 6, self._cut: 4,
            self._long: 1, lambda: b"[" * 100_000 + b"\n": 1,
        }  # fmt: skip
        return self.random.choices(list(makers), list(makers.values()))[0]()

    def _message(self) -> bytes:
        """Any message with any of its fields, most of them of some type that a field may have."""
        cls = self.random.choice(list(self._names))
        names = [name for name in self._names[cls] if self.random.random() < 0.85]
        body: dict[str, object] = {name: self._field(name) for name in names}
        if isinstance(body.get("worker"), str):
            body["worker"] = f"fuzz-{self.random.randrange(4)}"  # never that of the gateway
        return self._encode({"type": cls.kind, **body})

    def _ask(self) -> bytes:
        arguments = ("model", "models", "eviction", "mode", "timeout", "lines", "after", "id",
                     "policies", "pinned", "by", "all")  # fmt: skip
        chosen = self.random.sample(arguments, self.random.randrange(4))
        args = {name: self._field(name) for name in chosen}
        if self.random.random() < 0.05:
            return self._encode({"type": "ask", "id": 1, "verb": "status", "args": self.odd()})
        verb = self.random.choice(VERBS)
        return self._encode({"type": "ask", "id": 1, "verb": verb, "args": args})

    def _field(self, name: str) -> object:
        if self.random.random() < 0.3:
            return self.odd()
        if name in ("model", "topic", "epoch", "role", "verb", "eviction", "mode"):
            return self.random.choice(WORDS)
        if name in ("models", "policies"):
            return self.random.sample(WORDS, 2)
        if name in ("waiting", "in_flight", "progress", "id", "lines", "after", "completed"):
            return self.random.randrange(5)
        if name in ("args", "holds", "responses", "keys"):
            return {self.random.choice(WORDS): self.random.choice(WORDS)}
        return self.random.choice((1, 0.5, "x", True, None))

    def odd(self, depth: int = 0) -> object:
        way = self.random.randrange(6 if depth < 3 else 4)
        if way == 4:
            return [self.odd(depth + 1) for _ in range(self.random.randrange(3))]
        if way == 5:
            return {self.random.choice(WORDS): self.odd(depth + 1) for _ in range(2)}
        return (None, self.random.choice(WORDS), self.random.choice(NUMBERS),
                float("nan"))[way]  # fmt: skip

    def _encode(self, value: object) -> bytes:
        return json.dumps(value).encode() + b"\n"

    def _value(self) -> bytes:
        return self._encode(self.odd())

    def _noise(self) -> bytes:
        return self.random.randbytes(self.random.randrange(60)) + b"\n"

    def _cut(self) -> bytes:
        line = self._message()
        return line[: self.random.randrange(len(line))]

    def _long(self) -> bytes:
        return b'{"type": "demand", "model": "' + b"x" * MAX_LINE + b'"}\n'
