"""The few vLLM options that llmux must understand inside ``extra_args``. Pure.

vLLM's parser takes ``--name value`` and ``--name=value``, and an underscore for any dash within a
name; of a repeated option the last one counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from llmux.config.marks import quote

GPU_MEMORY: Final = ("--gpu-memory-utilization",)
MAX_MODEL_LEN: Final = ("--max-model-len",)
TENSOR_PARALLEL: Final = ("--tensor-parallel-size", "-tp")
PIPELINE_PARALLEL: Final = ("--pipeline-parallel-size", "-pp")

# What llmux passes itself, and what to write instead.
OWNED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "--port": "llmux sets it; use the model's key `port`, or nothing for a unix socket",
        "--host": "llmux sets it: engines listen on 127.0.0.1 or a unix socket; "
        "clients connect to `gateway.listen`",
        "--uds": "llmux sets it; leave out the model's key `port` for a unix socket",
        "--served-model-name": "llmux sets it to the model's name under `models`",
        "--model": "llmux sets it from `model_path`",
    }
)


@dataclass(frozen=True, slots=True)
class Flag:
    """An option found in a list of arguments; ``value`` is None when nothing follows it."""

    index: int
    name: str
    value: str | None


def split_flag(argument: str) -> tuple[str, str | None]:
    """``--a_b=c`` as (``--a-b``, ``c``); the value is None when it is not in the same word."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = name.replace("_", "-")
    return name, value if equals else None


def find_flag(arguments: Sequence[str], names: Sequence[str]) -> Flag | None:
    found: Flag | None = None
    for index, argument in enumerate(arguments):
        name, value = split_flag(argument)
        if name in names:
            following = arguments[index + 1] if index + 1 < len(arguments) else None
            found = Flag(index, name, following if value is None else value)
    return found


def argument_error(argument: str) -> str | None:
    """Why this word may not stand in ``extra_args``; None when it may."""
    name, _ = split_flag(argument)
    if name in OWNED:
        return f"cannot pass {name} to vLLM: {OWNED[name]}"
    option = re.match(r"(--?[A-Za-z][\w.-]*)\s+(.*)", argument, re.DOTALL)
    if option:
        return (
            f"option and value are in one text; there is no shell to split them, write two items: "
            f"{quote(option[1])}, {quote(option[2])}"
        )
    return None
