"""What the steps of an operation, and the stages of an engine's start, are called for people."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

# Steps of plans, stages of an engine's start, and phases of a dump.
_WORDS: Final = MappingProxyType(
    {
        "wait": "waiting for its turn",
        "spawn": "starting the engine",
        "wait_healthy": "waiting until the engine is healthy",
        "load_weights": "loading weights",
        "profile": "measuring memory",
        "compile": "compiling",
        "capture_graphs": "capturing graphs",
        "start_server": "starting its HTTP server",
        "describe": "asking the engine what it is",
        "canary_record": "first inference",
        "canary_sample": "first sampled inference",
        "canary_check": "comparing its answer",
        "inference": "inference",
        "sleep": "the engine releases its memory",
        "wake_up": "the engine takes its memory",
        "reload_weights": "loading weights",
        "reset_prefix_cache": "the engine forgets its prefix cache",
        "discard_cache": "the engine gives up its KV cache",
        "return_cache": "the engine takes memory for its KV cache",
        "freeze": "freezing the processes",
        "thaw": "thawing the processes",
        "comm_suspend": "taking the communicators down",
        "comm_resume": "setting the communicators up",
        "cuda_suspend": "CUDA state to host memory",
        "cuda_resume": "CUDA state back to the GPU",
        "leave_gpu": "CUDA state off the GPU before the kill",
        "check": "checking that it can be dumped",
        "leave_claim": "giving the GPU up",
        "dump": "CRIU dump",
        "released": "processes gone",
        "pack": "checksums",
        "sync": "to disk",
        "done": "image complete",
        "restore": "CRIU restore",
        "verify_release": "GPU memory being released",
        "terminate": "ending the engine",
        "kill": "killing what is left",
        "export": "sending",
        "import": "receiving",
    }
)
_COUNTED: Final = MappingProxyType({"load_weights": "shards", "capture_graphs": "graphs"})


def phase_text(phase: str) -> str:
    """The phase in words; an unknown one is its own name."""
    return _WORDS.get(phase, phase)


def counted(phase: str) -> str:
    """What the phase's progress counts."""
    return _COUNTED.get(phase, "bytes")
