"""The stand-in engine as a process of its own, on a unix socket."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gateway_harness import Stage, soon

STANDIN = Path(__file__).parents[2] / "standin" / "standin.py"


@asynccontextmanager
async def standin(
    s: Stage, model: str, *flags: str, aliases: tuple[str, ...] = ()
) -> AsyncIterator[Path]:
    path = s.directory / f"{model}.sock"
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(STANDIN), "serve", f"/models/{model}", "--served-model-name", model,
        *aliases, "--uds", str(path), *flags,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    while b"startup complete" not in (line := await soon(process.stderr.readline())):
        assert line, "the stand-in ended before it was ready"
    stderr = asyncio.ensure_future(process.stderr.read())
    try:
        yield path
    finally:
        process.terminate()
        await soon(process.wait())
        await soon(stderr)
