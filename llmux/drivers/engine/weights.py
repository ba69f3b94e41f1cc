"""ports.WeightReader: the weights of a model that is next, into the page cache.

One model at a time, in a process of its own (``weights_reader.py``): a file system that hangs then
holds up no thread of ours, and the process can be killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from llmux.drivers.engine.weights_reader import weights_of
from llmux.drivers.images.identity import model_directory
from llmux.drivers.processes.run import run
from llmux.errors import DriverError
from llmux.ports import EngineUser

log = logging.getLogger(__name__)

READER: Final = Path(__file__).with_name("weights_reader.py")
LEAST: Final = 64 << 20  # below it a process costs more than the disk
READ_SECS: Final = 600.0  # 140 GB at 250 MB/s; a start that takes longer reads by itself


def _worth_reading(model_path: str, env: Mapping[str, str]) -> str | None:
    """Where the weights are; None where they are not on this host, or soon read anyway."""
    path = model_directory(model_path, env) or model_path
    try:
        size = sum(os.stat(name).st_size for name in weights_of(path))
    except OSError:
        return None
    return path if size >= LEAST else None


class PageCache:
    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def read(
        self, model: str, model_path: str, env: Mapping[str, str], user: EngineUser | None
    ) -> None:
        async with self._turn:
            path = await asyncio.to_thread(_worth_reading, model_path, env)
            if path is None:
                return
            whom = ["0", "0", ""]
            if user is not None:
                whom = [str(user.uid), str(user.gid), ",".join(map(str, user.groups))]
            argv = [sys.executable, "-I", str(READER), *whom, path]
            began = time.monotonic()
            try:
                done = await run(argv, READ_SECS)
            except DriverError as error:
                log.debug("weights of %s: %s", model, error)
                return
            size = done.stdout.strip()
            if done.code != 0 or not size.isdigit():
                log.debug("weights of %s: %s", model, done.excerpt)
                return
            log.debug(
                "%.2f GiB of weights of %s are in the page cache (%.1f s)",
                int(size) / 2**30,
                model,
                time.monotonic() - began,
                extra={"model": model},
            )
