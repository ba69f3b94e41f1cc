"""What the doctor's checks are made of: a result, and the host as they may see it.

Checks read the host only through ``Host``, so a test hands them a directory in place of / and
canned program output in place of programs.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from llmux.config.schema import Config, Eviction, Process, Weights
from llmux.drivers import memory
from llmux.drivers.doctor.as_engine import run_as_engine
from llmux.drivers.processes import run as programs
from llmux.errors import DriverError, LlmuxError
from llmux.ports import LaunchSpec

GIB = 1 << 30


class Level(StrEnum):
    OK = "OK"
    WARN = "WARN"  # works, or is not needed by this configuration
    FAIL = "FAIL"  # something that is configured, or llmux itself, cannot work


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: what was seen, and when it is not OK, what to do. ``measured``: figures
    for programs, named with their unit."""

    name: str
    level: Level
    seen: str
    remedy: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ran:
    """A program that has ended. ``status`` is None when it is not there or took too long."""

    status: int | None
    output: str


def run(argv: Sequence[str], seconds: float) -> Ran:
    """Programs that only look, so they may be killed when they take too long. Not inside a loop."""
    try:
        done = asyncio.run(programs.run(argv, seconds))
    except DriverError as error:
        return Ran(None, error.message)
    return Ran(done.code, f"{done.stdout}\n{done.stderr}".strip())


def as_engine(spec: LaunchSpec, seconds: float) -> Ran:
    """``spec.argv`` as its engine would run."""
    return Ran(*run_as_engine(spec, seconds))


@dataclass(frozen=True, slots=True)
class Space:
    total: int
    free: int


def space(path: Path) -> Space:
    return Space(*memory.disk_space(path))


def available_and_swap() -> tuple[int, int]:
    return memory.available_bytes(), memory.swap_bytes()


def user_exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def groups_of(name: str) -> Collection[int]:
    """KeyError when there is no such user."""
    return frozenset(os.getgrouplist(name, pwd.getpwnam(name).pw_gid))


@dataclass(frozen=True, slots=True)
class Claim:
    """What one way of parking one model takes: ``host_bytes`` of memory, as the supervisor asks for
    them before it acts, and of the disk ``image_bytes``: what was on the GPU, before zero pages are
    taken out, without the engine's own memory. None where it is not known.
    ``eviction``: None for a restore of its image."""

    model: str
    eviction: Eviction | None
    host_bytes: int | None
    image_bytes: int | None


# The configuration, how its engines start, and each GPU's memory → what its models may take.
Claims = Callable[[Config, Sequence[LaunchSpec], Mapping[int, int]], Sequence[Claim]]


def tell_nobody(doing: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Host:
    """The machine. ``tell``: hears what takes seconds, before it begins."""

    root: Path = Path("/")
    run: Callable[[Sequence[str], float], Ran] = run
    which: Callable[[str], str | None] = shutil.which
    space: Callable[[Path], Space] = space
    memory: Callable[[], tuple[int, int]] = available_and_swap
    user_exists: Callable[[str], bool] = user_exists
    starts: Callable[[Config], Sequence[LaunchSpec]] | None = None  # of the service's engines
    as_engine: Callable[[LaunchSpec, float], Ran] = as_engine
    tell: Callable[[str], None] = tell_nobody
    claims: Claims | None = None  # of the service's models
    groups_of: Callable[[str], Collection[int]] = groups_of
    # What a check found that others use, too: a look may take many seconds.
    found: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    euid: int = field(default_factory=os.geteuid)
    release: str = field(default_factory=lambda: os.uname().release)

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """The text of a file, None when there is none or it may not be read."""
        try:
            return self.path(name).read_text(errors="replace")
        except OSError:
            return None

    def planned(self, config: Config) -> Sequence[LaunchSpec]:
        """How engines would be started: nothing where that cannot be said. Asked for once, since
        it reads the unit's environment."""
        if self.starts is None:
            return ()
        if "starts" not in self.found:
            try:
                self.found["starts"] = self.starts(config)
            except LlmuxError:
                self.found["starts"] = ()  # there is no such user: said where users are looked at
        planned: Sequence[LaunchSpec] = self.found["starts"]
        return planned

    @property
    def kernel(self) -> tuple[int, ...]:
        return version(self.release)


@dataclass(frozen=True, slots=True)
class Needs:
    """What the configured models need, on any rung; nothing without a configuration."""

    cuda: bool = False
    criu: bool = False
    sleep: bool = False
    freeze: bool = False
    ram: bool = False

    @classmethod
    def of(cls, config: Config | None) -> Needs:
        models = config.models.values() if config else ()
        ways = [rung for model in models for rung in model.rungs]
        how = {way.process for way in ways}
        return cls(
            cuda=bool(how & {Process.CUDA_SUSPEND, Process.CHECKPOINT}),
            criu=Process.CHECKPOINT in how,
            sleep=any(way.weights is not Weights.RETAIN for way in ways),
            freeze=bool(how & {Process.FREEZE, Process.CUDA_SUSPEND}),
            ram=Process.CUDA_SUSPEND in how or any(w.weights is Weights.OFFLOAD for w in ways),
        )


def version(text: str) -> tuple[int, ...]:
    """The first dotted number in a text as integers; () when there is none."""
    found = re.search(r"\d+(?:\.\d+)+|\d+", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def bad(needed: bool) -> Level:
    """FAIL when the configuration needs what is missing, else WARN."""
    return Level.FAIL if needed else Level.WARN
