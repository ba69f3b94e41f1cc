"""The set of drivers that the executor works with; built by the composition root only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmux.config.schema import ModelConfig
from llmux.ports import (
    DeviceCheckpointer,
    Dumper,
    Engine,
    EngineOutput,
    Freezer,
    GpuObserver,
    LaunchSpec,
    UnitManager,
)


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
    identity: Callable[[ModelConfig, LaunchSpec], Mapping[str, str]]
    dumper: Dumper | None = None  # None: engines are not in units of their own
    cuda: DeviceCheckpointer | None = None  # None: no CUDA driver, or CRIU's plugin does it
    keep_images: bool = True
