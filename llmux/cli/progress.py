"""Progress of long work on stderr: one line rewritten on a terminal, a line per phase elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self, TextIO

WORDS = {
    "wait": "waiting for its turn",
    "spawn": "starting the engine",
    "wait_healthy": "waiting until the engine is healthy",
    "describe": "asking the engine what it is",
    "canary_record": "first inference",
    "canary_check": "comparing its answer",
    "inference": "inference",
    "sleep": "vLLM releases its memory",
    "wake_up": "vLLM takes its memory",
    "reload_weights": "loading weights",
    "reset_prefix_cache": "vLLM forgets its prefix cache",
    "freeze": "freezing the processes",
    "thaw": "thawing the processes",
    "comm_suspend": "taking the communicators down",
    "comm_resume": "setting the communicators up",
    "cuda_suspend": "CUDA state to host memory",
    "cuda_resume": "CUDA state back to the GPU",
    "dump": "CRIU dump",
    "released": "processes gone",
    "pack": "checksums",
    "sync": "to disk",
    "restore": "CRIU restore",
    "verify_release": "GPU memory being released",
    "terminate": "ending the engine",
    "kill": "killing what is left",
}
CLEAR = "\r\x1b[K"  # ECMA-48: erase to the end of the line


class Progress:
    """A context: its end leaves the cursor on a line of its own."""

    def __init__(self, model: str, out: TextIO | None = None) -> None:
        self._model = model
        self._out = out or sys.stderr
        self._terminal = self._out.isatty()
        self._phase = ""
        self._dirty = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._dirty:
            self._write(CLEAR)

    def __call__(self, phase: str, seconds: float, done: int, total: int) -> None:
        line = f"{self._model}: {WORDS.get(phase, phase)}"
        if self._terminal:
            line += f" {sizes(done, total)}" if done else ""
            self._write(f"{CLEAR}{line}  {seconds:.0f} s")
            self._dirty = True
        elif phase != self._phase:
            self._write(f"{line} ({seconds:.1f} s)\n")
        self._phase = phase

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def sizes(done: int, total: int) -> str:
    return f"{size(done)} of {size(total)}" if total else size(done)


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
