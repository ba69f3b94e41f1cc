"""Read an engine's own output for how far its start has come. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of an engine's start. ``done`` of ``total``, in the stage's unit; 0 = unknown."""

    name: str
    done: int = 0
    total: int = 0


READ: Final = 512  # characters of a line: what follows is no progress of vLLM's
# vLLM 0.9 to 0.32; a progress bar's counts are its two groups.
_BAR: Final = r"[^|]*\|[^|]*\|\s*(\d{1,9})/(\d{1,9})\s"
_VLLM: Final = tuple(
    (re.compile(pattern), stage)
    for pattern, stage in (
        (
            r"oading \w+ checkpoint shards.*?:\s*\d+% Completed \| (\d{1,9})/(\d{1,9})\b",
            "load_weights",
        ),
        (r"Capturing CUDA graph[^:]*:" + _BAR, "capture_graphs"),
        (r"Capturing CUDA graph", "capture_graphs"),
        (r"(?:Model loading|Loading weights) took ", "profile"),
        (r"Starting to load model ", "load_weights"),
        (r"torch\.compile|Dynamo bytecode|[Cc]ompil(?:ing a|ed) graph", "compile"),
        (r"Available KV cache memory|GPU KV cache size", "profile"),
        (r"Graph capturing finished|init engine \(profile|Starting vLLM ", "start_server"),
        (r"Started server process|Waiting for application startup", "start_server"),
    )
)


def vllm_stage(line: str) -> Stage | None:
    """The stage that a line of vLLM's output announces; None when it announces none."""
    for pattern, name in _VLLM:
        if (found := pattern.search(line, 0, READ)) is not None:
            counts = [int(group) for group in found.groups()]
            return Stage(name, *counts)
    return None
