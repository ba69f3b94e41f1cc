"""The set of drivers that the executor works with; built by the composition root only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from llmux.config.schema import ModelConfig
from llmux.image_ports import Checkpointer
from llmux.ports import (
    DeviceCheckpointer,
    Engine,
    EngineOutput,
    EngineUsers,
    Freezer,
    GpuObserver,
    LaunchSpec,
    UnitManager,
    WeightReader,
)


@dataclass(frozen=True, slots=True)
class Places:
    """Directories and the identity of the host's set-up.

    ``runtime``: sockets of the engines, one directory per model below ``engines/``. ``users``: None
    = engines run as we do.
    """

    runtime: str = "/run/llmux"
    users: EngineUsers | None = None
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
    # the same for comparison with another host; the third argument is a salt, in hex
    portable_identity: Callable[[ModelConfig, LaunchSpec, str], Mapping[str, str]]
    checkpointer: Checkpointer | None = None  # None: engines are not in units of their own
    cuda: DeviceCheckpointer | None = None  # None: no CUDA driver, or CRIU's plugin does it
    # returns when an engine can use CUDA as far as that is up to us; None: at once
    cuda_started: Callable[[], Awaitable[None]] | None = None
    keep_images: bool = True
    # whether all files of this model path are on this host; None: not looked at
    files_are_here: Callable[[str, Mapping[str, str]], bool] | None = None
    weights: WeightReader | None = None  # None: weights are not read ahead
    available_memory: Callable[[], int] | None = None  # of the host, in bytes; None: not looked at
