"""The one door through which programs are run and waited for.

No shell, stdin closed, a fixed locale, an allow-listed environment, capped output, a deadline; the
whole process group is killed and reaped when it overruns. Engines do not come this way: see
spawn.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from llmux.errors import DriverError, DriverTimeout, Unsupported

OUTPUT_CAP: Final = 256 * 1024
_INHERITED: Final = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
_REAP_TIMEOUT: Final = 5.0


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended. ``code`` is -N when signal N killed it."""

    argv: tuple[str, ...]
    code: int
    stdout: str
    stderr: str

    @property
    def excerpt(self) -> str:
        """The last lines it said, for an error message."""
        text = self.stderr.strip() or self.stdout.strip()
        return "; ".join(text.splitlines()[-5:])[-600:]


async def run(
    argv: Sequence[str],
    timeout: float,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str = "/",
    output_cap: int = OUTPUT_CAP,
) -> Completed:
    """Run a program to its end. Any exit status is a result, not an error.

    Raises Unsupported when there is no such program, DriverTimeout after ``timeout`` seconds (then
    it and its process group are gone).
    """
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environment |= {"LC_ALL": "C.UTF-8", **(env or {})}
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise Unsupported(
            "run", argv[0], error.strerror or str(error), hint="is it installed and on the PATH?"
        ) from error
    except OSError as error:
        raise DriverError("run", argv[0], str(error)) from error
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr, code = await asyncio.gather(
                _read(process.stdout, output_cap),
                _read(process.stderr, output_cap),
                process.wait(),
            )
    except BaseException as error:
        await asyncio.shield(_end(process))
        if isinstance(error, TimeoutError):
            raise DriverTimeout(
                "run", argv[0], f"not finished after {timeout:g}s; it was killed"
            ) from None
        raise
    return Completed(tuple(argv), code, stdout, stderr)


async def _read(stream: asyncio.StreamReader, cap: int) -> str:
    """All of it is read, lest the program block; the last ``cap`` bytes are kept."""
    kept = bytearray()
    while data := await stream.read(65536):
        kept += data
        if len(kept) > 2 * cap:
            del kept[:-cap]
    return kept[-cap:].decode(errors="replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(_REAP_TIMEOUT):
            await process.wait()
    # A grandchild in a session of its own may still hold the pipes: let go of them.
    transport = getattr(process, "_transport", None)
    if transport is not None:
        transport.close()
