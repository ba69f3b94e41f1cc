"""What is known of a model's engine process: the executor's side, not used for decisions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmux.config.schema import ModelConfig
from llmux.ports import Canary, Image, UnitHandle
from llmux.protocol import Address

COLD_SECS = 60.0  # what a cold start is taken to cost before the first was seen


@dataclass(slots=True)
class Instance:
    """Of one model; without a handle there is no process."""

    config: ModelConfig
    handle: UnitHandle | None = None
    address: Address | None = None
    canary: Canary | None = None
    max_model_len: int | None = None
    version: str | None = None
    gpus: tuple[int, ...] = ()
    identity: Mapping[str, str] = field(default_factory=dict)  # of what runs, for its image
    cold_seconds: float = COLD_SECS  # the last cold start
    cuda_pids: tuple[int, ...] = ()  # whose CUDA state is in host memory
    image: Image | None = None  # what this operation restored
    died: asyncio.Future[str] | None = None  # set while an operation runs
    used_before: dict[int, int] = field(default_factory=dict)  # pid → bytes, before parking
    phases: list[tuple[str, float]] = field(default_factory=list)  # of the last operation
    # phase, bytes done, bytes in all: an operator who follows what happens
    follower: Callable[[str, int, int], None] | None = None

    def tell(self, phase: str, done: int = 0, total: int = 0) -> None:
        if self.follower is not None:
            self.follower(phase, done, total)

    def notes(self) -> dict[str, Any]:
        """What a next supervisor needs to know of it; nothing without a process."""
        if self.handle is None:
            return {}
        address, canary = self.address, self.canary
        return {
            "pid": self.handle.pid,
            "start_ticks": self.handle.start_ticks,
            "unit": self.handle.unit,
            "uds": address.uds if address else None,
            "port": address.port if address else None,
            "canary": [canary.text, list(canary.logprobs)] if canary else None,
            "max_model_len": self.max_model_len,
            "version": self.version,
            "identity": dict(self.identity),
            "cold_seconds": self.cold_seconds,
            "cuda_pids": list(self.cuda_pids),
        }

    def forget(self) -> None:
        """A new process begins: nothing of the former one is true of it."""
        self.handle = self.address = self.canary = None
        self.max_model_len = self.version = None
        self.identity = {}
        self.cuda_pids = ()
        self.used_before = {}
