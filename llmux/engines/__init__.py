"""The types of engines that llmux can supervise.

A new type is one module here and one entry in ``ENGINE_TYPES``. Below everything but ``errors``:
pure, and importable from everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from llmux.engines.engine_type import EngineType
from llmux.engines.vllm import VLLM

DEFAULT_ENGINE: Final = "vllm"
ENGINE_TYPES: Final[Mapping[str, EngineType]] = MappingProxyType({"vllm": VLLM})

# Where the type of an engine is not at hand, what any of them writes is understood.
METRICS_PREFIXES: Final = tuple(engine.metrics_prefix for engine in ENGINE_TYPES.values())
INFO: Final = 6  # syslog(3)


def line_priority(line: str) -> int:
    """syslog priority of a line of an engine's output; INFO when it has no level."""
    found = (engine.line_priority(line) for engine in ENGINE_TYPES.values())
    return next((priority for priority in found if priority is not None), INFO)


def is_shown_variable(name: str) -> bool:
    """Whether the variable's value is no secret and may stand in messages and manifests."""
    return any(engine.shown_variables.match(name) for engine in ENGINE_TYPES.values())
