"""Kernels of sampling, which FlashInfer compiles with ninja at the first request that samples."""

from __future__ import annotations

import shutil

TRACEBACK = """
Traceback (most recent call last):
  File "flashinfer/jit/cpp_ext.py", line 343, in run_ninja
    subprocess.run(command, check=True)
FileNotFoundError: [Errno 2] No such file or directory: 'ninja'"""


class Sampler:
    def __init__(self, compiles: bool) -> None:
        self._ready = not compiles

    def complaint(self, temperature: float) -> str | None:
        """What the engine dies of; None when it can answer at this temperature."""
        if self._ready or temperature <= 0:
            return None
        if shutil.which("ninja") is None:
            return TRACEBACK
        self._ready = True
        return None
