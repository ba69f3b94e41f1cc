"""A model's engine process as the executor knows it; not used for decisions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from llmux.config.schema import ModelConfig
from llmux.image_ports import Image
from llmux.ports import UnitHandle
from llmux.runtime.engines.facts import EngineFacts
from llmux.runtime.engines.vitals import Progress

log = logging.getLogger("llmux")


@dataclass(frozen=True, slots=True)
class Step:
    """The step of an operation that is under way, or a stage of it. ``since``: monotonic."""

    name: str
    since: float
    done: int = 0
    total: int = 0


@dataclass(slots=True)
class Instance:
    """One per model; without a handle there is no process."""

    config: ModelConfig
    handle: UnitHandle | None = None
    facts: EngineFacts = field(default_factory=EngineFacts)
    image: Image | None = None  # what this operation restored
    died: asyncio.Future[str] | None = None  # set while an operation runs
    progress: Progress | None = None  # its counters, when last looked at for signs of life
    wanted: tuple[ModelConfig, tuple[int, ...], str] | None = None  # today's digest and its source
    used_before: dict[int, int] = field(default_factory=dict)  # pid → bytes, before parking
    phases: list[tuple[str, float]] = field(default_factory=list)  # of the last operation
    # phase, bytes done, bytes in all: progress for an operator
    follower: Callable[[str, int, int], None] | None = None
    step: Step | None = None  # set while an operation runs
    unread: bool = False  # a line of its output could not be read, and this was said

    def report(self, phase: str, done: int = 0, total: int = 0) -> None:
        """A step begins, or has come this far."""
        former = self.step
        since = former.since if former and former.name == phase else monotonic()
        self.step = Step(phase, since, done, total)
        if self.follower is not None:
            self.follower(phase, done, total)

    def heard(self, line: str) -> None:
        """A line of the engine's output; while it starts or loads, its stage is in it."""
        if self.step is None:
            return
        try:
            stage = self.config.engine_type.stage(line)
        except Exception:  # a line that is not understood must not end the following of the output
            if not self.unread:
                log.exception("cannot read how far %s has come", self.config.name)
            self.unread = True
            return
        if stage is not None:
            self.report(stage.name, stage.done, stage.total)

    def notes(self) -> dict[str, Any]:
        """What a next supervisor needs to adopt the process; nothing without a process."""
        if self.handle is None:
            return {}
        return {
            "pid": self.handle.pid,
            "start_ticks": self.handle.start_ticks,
            "unit": self.handle.unit,
            **self.facts.to_json(),
        }

    def forget(self) -> None:
        """A new process begins: the facts of the former one do not apply."""
        self.handle = None
        self.facts = EngineFacts(gpus=self.facts.gpus, cold_seconds=self.facts.cold_seconds)
        self.used_before = {}
        self.progress = None
