"""The set of drivers that the executor works with; built by the composition root only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmux.ports import Engine, EngineOutput, Freezer, GpuObserver, UnitManager


@dataclass(frozen=True, slots=True)
class Places:
    """Directories and the identity of the host's set-up.

    ``runtime``: sockets of the engines, one directory per model below ``engines/``.
    """

    runtime: str = "/run/llmux"
    engine_user: str | None = None
    vllm_command: tuple[str, ...] = ("vllm",)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Drivers:
    units: UnitManager
    freezer: Freezer
    engine: Engine
    output: EngineOutput
    gpu: GpuObserver
    places: Places
